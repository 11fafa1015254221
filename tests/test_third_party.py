"""Each use of a name that another project does not promise to keep. Versions: with which it was seen to be right.

Where one of these fails after an upgrade, lorafair/third_party.py is what has to change, and nothing else.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from torch import library
from torch.utils.data import DataLoader, TensorDataset

from lorafair import third_party

ROOT = Path(__file__).parents[1]


@contextmanager
def seen_with(**versions: str) -> Iterator[None]:
    """Say, where the block fails, with which versions it did not."""
    try:
        yield
    except Exception as error:
        there = ", ".join(f"{name} {version(name)} is installed, seen with {seen}" for name, seen in versions.items())
        pytest.fail(f"{type(error).__name__}: {error}\n{there}: see lorafair/third_party.py")


# tqdm


@pytest.mark.slow
@pytest.mark.parametrize(("imported", "expected"), [("tqdm.auto", 1), ("lorafair.model.backbone", 0)])
def test_import_timm_says_nothing_of_widgets(imported: str, expected: int) -> None:
    """In a process that looks like a notebook's, whose ipywidgets are missing."""
    code = (
        "import sys, types\n"
        "sys.modules['ipykernel.zmqshell'] = types.ModuleType('ipykernel.zmqshell')\n"
        "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=object)\n"
        "sys.modules['ipywidgets'] = None\n"
        f"import {imported}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    with seen_with(tqdm="4.70.1"):
        assert done.stderr.count("IProgress not found") == expected, done.stderr


# torchvision


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torchvision as an index gives it that has it for another torch: its operators cannot be loaded."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(Path(spec.origin).parent, folder / "torchvision", ignore=ignored)
    (folder / "torchvision" / "_C.so").write_text("compiled for another torch")
    extension = folder / "torchvision" / "extension.py"
    extension.write_text(extension.read_text().partition(third_party.MENDED)[0])  # the Makefile may have mended it
    return folder


def python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code that sees this torchvision first, and `third_party`."""
    path = os.pathsep.join([str(site), str(ROOT)])
    start = (
        "from importlib.util import find_spec\n"
        f"assert find_spec('torchvision').origin.startswith({str(site)!r})\n"
        "from lorafair import third_party\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def unmended(site: Path) -> Path:
    extension = site / "torchvision" / "extension.py"
    extension.write_text(extension.read_text().partition(third_party.MENDED)[0])
    return site


USE = "import timm, torchvision; timm.create_model('test_vit'); assert not torchvision.extension._has_ops()"


@pytest.mark.slow
def test_torchvision_for_another_torch_cannot_be_imported_by_itself(unmended: Path) -> None:
    """Else there is nothing left to mend. Seen with torchvision 0.28.0, torch 2.13.0."""
    done = python(unmended, "import torchvision")
    assert "operator torchvision::nms does not exist" in done.stderr, (
        f"torchvision {version('torchvision')} copes with operators that cannot be loaded: make_torchvision_importable "
        f"and mend_torchvision can go, or look for another name now\n{done.stderr}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        f"third_party.make_torchvision_importable()\n{USE}",
        f"import lorafair.model.backbone\nthird_party.make_torchvision_importable()\n{USE}",  # it calls it, too
    ],
)
def test_make_torchvision_importable(unmended: Path, code: str) -> None:
    """Reads `register_fake("torchvision::<operator>"` in _meta_registrations.py. Seen with torchvision 0.28.0."""
    with seen_with(torchvision="0.28.0", torch="2.13.0"):
        done = python(unmended, code)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_mend_torchvision(unmended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Relies on `_has_ops` and `torch` in extension.py, which is imported first. Seen with torchvision 0.28.0."""
    extension = unmended / "torchvision" / "extension.py"
    before = extension.read_text()
    linked = unmended / "linked_into_another_environment"
    linked.unlink(missing_ok=True)
    os.link(extension, linked)
    monkeypatch.setattr(third_party, "_torchvision_folder", lambda: unmended / "torchvision")
    third_party.mend_torchvision()
    assert "compiled for another torch" in capsys.readouterr().out
    mended = extension.read_text()
    assert mended.startswith(before)
    assert linked.read_text() == before
    third_party.mend_torchvision()
    assert extension.read_text() == mended
    assert capsys.readouterr().out == ""
    with seen_with(torchvision="0.28.0", torch="2.13.0"):
        for code in (
            f"{USE}\nthird_party.make_torchvision_importable()\nimport lorafair.model.backbone",
            f"third_party.make_torchvision_importable()\n{USE}",
        ):
            done = python(unmended, code)
            assert done.returncode == 0, done.stderr


def test_a_torchvision_that_loads_is_left_alone(
    unmended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extension = unmended / "torchvision" / "extension.py"
    before = extension.read_text()
    monkeypatch.setattr(third_party, "_torchvision_folder", lambda: unmended / "torchvision")
    monkeypatch.setattr(third_party, "_loads", lambda folder: True)
    monkeypatch.setattr(library, "define", lambda *given: pytest.fail(f"an operator was declared: {given}"))
    third_party.mend_torchvision()
    third_party.make_torchvision_importable()
    assert extension.read_text() == before
    assert capsys.readouterr().out == ""


# lightning


def launcher_of(strategy: object, environment: object) -> object:
    strategy.cluster_environment = environment  # type: ignore[attr-defined]
    strategy._num_nodes = 1  # type: ignore[attr-defined]
    strategy.parallel_devices = [torch.device("cpu")] * 2  # type: ignore[attr-defined]
    strategy._configure_launcher()  # type: ignore[attr-defined]
    return strategy.launcher  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_run_imports_neither_torchmetrics_nor_the_rest_of_lightning() -> None:
    """`lightning_fabric`, and its asking torchmetrics for a version: lightning 2.6.6."""
    code = (
        "import sys\n"
        "from lorafair import launch\n"
        "from lorafair.config import load_config\n"
        "with launch.in_place(load_config(['fabric.accelerator=cpu']).fabric): pass\n"
        "import lorafair.commands.compare, lorafair.commands.run, lorafair.federation\n"
        "heavy = 'torchmetrics', 'lightning', 'pytorch_lightning', 'scipy', 'matplotlib', 'transformers', 'pandas'\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "import torchmetrics.classification\n"  # the one that is installed
    )
    with seen_with(lightning="2.6.6"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("external", [True, False])
def test_quiet_ddp_strategy(external: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_configure_launcher`, `_launcher`, `_SubprocessScriptLauncher`, `_call_children_scripts`: lightning 2.6.6."""
    with seen_with(lightning="2.6.6"):
        from lightning_fabric.strategies.launchers import subprocess_script

        launcher_class = subprocess_script._SubprocessScriptLauncher
        # What is replaced still does just this: it starts the others, and the thread that is left out.
        replaced = inspect.getsource(launcher_class.launch)
        assert "_launch_process_observer(" in replaced
        assert "self._call_children_scripts()" in replaced
        started: list[bool] = []
        monkeypatch.setattr(launcher_class, "_call_children_scripts", lambda self: started.append(True))
        environment = SimpleNamespace(creates_processes_externally=external, validate_settings=lambda **settings: None)
        strategy = third_party.quiet_ddp_strategy(timedelta(minutes=1))
        launcher = launcher_of(strategy, environment)
        assert isinstance(launcher, launcher_class)
        threads = threading.active_count()
        assert launcher.launch(lambda left, right: left - right, 5, right=2) == 3
        assert started == ([] if external else [True])
        assert threading.active_count() == threads


def test_quiet_ddp_strategy_is_what_fabric_asks_for_its_launcher() -> None:
    """Fabric's strategies make their launcher by `_configure_launcher`: lightning 2.6.6."""
    with seen_with(lightning="2.6.6"):
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment

        strategy = third_party.quiet_ddp_strategy(timedelta(minutes=1))
        Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=[LightningEnvironment()])
        assert type(strategy.launcher).__qualname__.startswith("quiet_ddp_strategy."), type(strategy.launcher)


def test_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`procs` of the launcher, filled by `_call_children_scripts`: lightning 2.6.6."""
    with seen_with(lightning="2.6.6"):
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.strategies.launchers import subprocess_script

        strategy = third_party.quiet_ddp_strategy(timedelta(minutes=1))
        launcher = launcher_of(strategy, LightningEnvironment())
        before = third_party.child_processes(strategy)
        monkeypatch.setattr(subprocess_script.subprocess, "Popen", lambda *args, **kwargs: "a process")
        launcher._call_children_scripts()  # type: ignore[attr-defined]
        assert before is third_party.child_processes(strategy), "lorafair holds a list that is not filled any more"
        assert list(before) == ["a process"]
    assert third_party.child_processes(SimpleNamespace(launcher=None)) == ()  # one process has no launcher


def test_lightning_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rank_zero_only.rank`, which is the same object under both names of the package: lightning 2.6.6."""
    with seen_with(lightning="2.6.6"):
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        monkeypatch.setattr(rank_zero_only, "rank", 3)  # whatever was left in the environment
        written: list[int] = []
        rank_zero_only(written.append)(1)
        with third_party.lightning_logging():
            rank_zero_only(written.append)(2)
        rank_zero_only(written.append)(3)
        assert written == [2]
        assert rank_zero_only.rank == 3


# torch


def test_default_store(tmp_path: Path) -> None:
    """`distributed_c10d._get_default_store`: torch 2.13.0."""
    with seen_with(torch="2.13.0"):
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        try:
            store = third_party.default_store()
            store.set("lorafair", "here")
            assert store.get("lorafair") == b"here"
            assert isinstance(store, dist.Store)
        finally:
            dist.destroy_process_group()


def test_norms_of() -> None:
    """`_foreach_norm`: torch 2.13.0."""
    tensors = [torch.arange(6.0).reshape(2, 3), torch.zeros(2, 2), torch.tensor([3.0, 4.0])]
    with seen_with(torch="2.13.0"):
        found = third_party.norms_of(tensors)
        torch.testing.assert_close(found, torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))


def test_differences_of() -> None:
    """`_foreach_sub`: torch 2.13.0."""
    left, right = [torch.arange(6.0).reshape(2, 3), torch.ones(2)], [torch.full((2, 3), 0.5), torch.tensor([1.0, 3.0])]
    with seen_with(torch="2.13.0"):
        found = third_party.differences_of(left, right)
        assert [f.tolist() for f in found] == [(one - other).tolist() for one, other in zip(left, right, strict=True)]


def test_font_file() -> None:
    """The place of DejaVu Sans: matplotlib 3.11.2."""
    from PIL import ImageFont

    with seen_with(matplotlib="3.11.2"):
        file = third_party.font_file()
        assert file is not None
        assert ImageFont.truetype(str(file), 12).getname() == ("DejaVu Sans", "Book")


def test_end_loader_workers() -> None:
    """`_iterator` and `_shutdown_workers` of a DataLoader with persistent workers: torch 2.13.0."""
    images = TensorDataset(torch.zeros(4, 1))
    with seen_with(torch="2.13.0"):
        third_party.end_loader_workers(DataLoader(images))  # none has been started
        loader = DataLoader(images, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
        assert len(list(loader)) == 4
        workers = list(loader._iterator._workers)  # type: ignore[union-attr]
        assert [worker.is_alive() for worker in workers] == [True]
        third_party.end_loader_workers(loader)
        assert [worker.is_alive() for worker in workers] == [False]


# timm


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
def test_vit_tokens(name: str) -> None:
    """`VisionTransformer._pos_embed`: timm 1.0.31."""
    with seen_with(timm="1.0.31"):
        backbone = timm.create_model(name).eval()
        entered: list[torch.Tensor] = []
        backbone.blocks[0].register_forward_pre_hook(lambda block, inputs: entered.append(inputs[0]))
        size = backbone.pretrained_cfg["input_size"]
        images = torch.linspace(-1, 1, 2 * size[0] * size[1] * size[2]).reshape(2, *size)
        with torch.no_grad():
            backbone.forward_features(images)
            assert torch.equal(third_party.vit_tokens(backbone, images), entered[0])

"""All uses of private names of other packages, and repairs of their installations.

One function for each, with the version it was seen with; tests/test_third_party.py fails when one of them changes.
Nothing is imported, and nothing is changed, before one of them is called.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_fabric.strategies.ddp import DDPStrategy
    from torch import Tensor


def make_torchvision_importable() -> None:
    """Let torchvision be imported beside a torch that it was not compiled for. Call before anything imports it.

    Package indexes without a CPU build of torchvision combine a CPU build of torch with a CUDA build of torchvision.
    Its compiled operators cannot be loaded then, which does not matter here: timm and torchmetrics import it
    for other things. But it registers stand-ins for some operators without looking whether they exist, and fails.
    Declaring those operators first is all that is missing. Seen with torchvision 0.28.0 beside torch 2.13.0+cpu.
    """
    folder = _torchvision_folder()
    if folder is None or _loads(folder):
        return
    import torch
    from torch import library

    for operator in _operators_taken_for_granted(folder):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"torchvision::{operator}", "(Tensor unused) -> Tensor")


def _operators_taken_for_granted(folder: Path) -> list[str]:
    """For which torchvision registers stand-ins without looking whether they exist: nms and qnms in 0.28.0."""
    source = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    return re.findall(r'register_fake\("torchvision::(\w+)"', source)


def _torchvision_folder() -> Path | None:
    spec = find_spec("torchvision")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _loads(folder: Path) -> bool:
    """Whether the compiled operators of an installed torchvision can be loaded."""
    import torch

    try:
        for compiled in folder.glob("_C*.so"):
            torch.ops.load_library(compiled)
    except OSError:
        return False
    return True


def mend_torchvision() -> None:
    """Write the same declarations into an installed torchvision that cannot be imported, for `import timm` alone.

    For an environment of one's own, as the Makefile makes it; installing torchvision again takes them out.
    """
    folder = _torchvision_folder()
    if folder is None or _loads(folder):
        return
    extension = folder / "extension.py"
    source = extension.read_text(encoding="utf-8")
    if MENDED in source:
        return
    mended = extension.with_name("extension.py.mended")  # a new file: the old one may be linked into other environments
    operators = _operators_taken_for_granted(folder)
    mended.write_text(f"{source}\n\n{_MEND.replace('OPERATORS', repr(operators))}", encoding="utf-8")
    os.replace(mended, extension)
    print(f"torchvision was compiled for another torch; it is used without its operators ({extension})")


MENDED = "# Added by lorafair: compiled for another torch, so without the operators that it has stand-ins for."
_MEND = f"""{MENDED}
if not _has_ops():
    from torch import library as _library

    for _name in OPERATORS:
        if not hasattr(torch.ops.torchvision, _name):
            _library.define("torchvision::" + _name, "(Tensor unused) -> Tensor")
"""


def import_fabric() -> None:
    """Import Lightning's Fabric without the rest of Lightning, and without torchmetrics, which it asks for its version.

    `lightning.fabric` and `lightning_fabric` are the same code, both installed by `lightning`, but the first imports
    lightning.pytorch before. Either imports torchmetrics, and that matplotlib, scipy and, where they are installed,
    transformers: 2 of 6 seconds and 100 of 440 MiB. A module with nothing but the version stands in for torchmetrics
    until Fabric is imported. Seen with lightning 2.6.6.
    """
    if "lightning_fabric" in sys.modules or "torchmetrics" in sys.modules:
        return
    stand_in = ModuleType("torchmetrics")
    vars(stand_in)["__version__"] = version("torchmetrics")
    sys.modules["torchmetrics"] = stand_in
    try:
        import_module("lightning_fabric")
    finally:
        del sys.modules["torchmetrics"]


def import_timm() -> ModuleType:
    """Import timm, without what tqdm says in every notebook that has no ipywidgets.

    timm imports huggingface_hub, and that tqdm, which warns there that its progress bars will be text. They are
    for downloads, and text is what a notebook then shows. Seen with tqdm 4.70.1.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")
        return import_module("timm")


def quiet_ddp_strategy(timeout: timedelta) -> DDPStrategy:
    """Fabric's "ddp", but for the thread that ends this process by SIGKILL when one that it has started fails.

    `cluster.watchdog` watches those processes, prints the reason, saves what is done and exits with a status that says
    what happened. Private: `_configure_launcher`, `_launcher`, `_SubprocessScriptLauncher` and its
    `_call_children_scripts`. Seen with lightning 2.6.6.
    """
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

    class Launcher(_SubprocessScriptLauncher):
        def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            if not self.cluster_environment.creates_processes_externally:
                self._call_children_scripts()
            return function(*args, **kwargs)

    class Strategy(DDPStrategy):
        def _configure_launcher(self) -> None:
            assert self.cluster_environment is not None
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    return Strategy(timeout=timeout)


@contextmanager
def lightning_logging() -> Iterator[None]:
    """In the block Lightning's loggers write here: a RANK that is left over in the environment makes them silent.

    They ask `rank_zero_only.rank`, which is read from the environment at import. Seen with lightning 2.6.6.
    """
    import_fabric()
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    before = rank_zero_only.rank  # type: ignore[attr-defined]
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = before  # type: ignore[attr-defined]


def child_processes(strategy: Any) -> Sequence[Any]:
    """The processes that a strategy of Fabric starts at launch; filled by then. Seen with lightning 2.6.6."""
    return getattr(strategy.launcher, "procs", ())


def default_store() -> Any:
    """The store of the process group. PyTorch has no public name for it. Seen with torch 2.13.0."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The Frobenius norm of each of N tensors, (N,), in few operations. Private: `_foreach_norm`; torch 2.13.0."""
    import torch

    return torch.stack(torch._foreach_norm(list(tensors)))


def differences_of(left: Sequence[Tensor], right: Sequence[Tensor]) -> Sequence[Tensor]:
    """left − right, tensor by tensor, in few operations. Private: `_foreach_sub`; torch 2.13.0."""
    import torch

    return torch._foreach_sub(list(left), list(right))


def font_file() -> Path | None:
    """DejaVu Sans, which matplotlib brings along, without importing it; None where it is not there.

    Private: its place, mpl-data/fonts/ttf. Seen with matplotlib 3.11.2.
    """
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return file if file.is_file() else None


@contextmanager
def one_error_of_events() -> Iterator[None]:
    """In the block TensorBoard's threads print no traceback of a file they cannot write: the caller gets the error.

    Private: the name of the class. Seen with tensorboard 2.21.0.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        of_events = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (of_events and issubclass(arguments.exc_type, OSError)):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def vit_tokens(backbone: Any, patches: Tensor) -> Tensor:
    """What enters the first block of a timm ViT, (N, T, D), from its normalised images (N, 3, S, S).

    Private: `_pos_embed`. Seen with timm 1.0.31.
    """
    tokens: Tensor = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(patches))))
    return tokens


def end_loader_workers(loader: Any) -> None:
    """End the worker processes of a DataLoader, if there are any.

    Private: `_iterator`, `_shutdown_workers`. Seen with torch 2.13.0.
    """
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()

"""The command as a user types it: on two processes, killed and continued, and with mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorafair.aggregation import AGGREGATORS
from lorafair.checkpoint import list_checkpoints, load_checkpoint
from lorafair.cli import main, take_part
from lorafair.comparison import load_comparison
from lorafair.config import describe_options, load_config
from lorafair.submission import take_options
from tests.conftest import damaged_folder

ROOT = Path(__file__).parent.parent
TINY = (
    "data.source=synthetic", "model.name=test_vit", "model.weights=random", "model.image_size=32", "model.lora.rank=4",
    "model.lora.last_blocks=2", "client.optimizer=adamw", "client.learning_rate=0.005", "client.batch_size=16",
    "fabric.accelerator=cpu", "checkpoint.every=1",
)  # fmt: skip


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK")
    }
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def adapter(run_dir: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(run_dir)[-1]).tensors["adapter"]


def test_two_processes_killed_in_the_middle_and_continued(tmp_path: Path) -> None:
    """The whole command in processes of its own; SIGKILL to all of them once round 3 is saved; bit-equal at the end."""
    arguments = [*TINY, "rounds=40", "fabric.devices=2"]
    killed = start([*arguments, f"run_dir={tmp_path / 'killed'}"])
    whole = start([*arguments, f"run_dir={tmp_path / 'whole'}"])
    deadline = time.monotonic() + 120
    while not any(path.name >= "round_000003" for path in list_checkpoints(tmp_path / "killed")):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    code, out, err = finish(start([*arguments, f"run_dir={tmp_path / 'killed'}"]))
    assert code == 0, err
    assert re.search(r"continuing after round \d+ of 40", out)
    code, out, err = finish(whole)
    assert code == 0, err
    assert "lorafair 0.1.0: 2 processes on cpu" in out
    assert re.search(r"^mean +\d+\.\d", out, re.MULTILINE)
    assert torch.equal(adapter(tmp_path / "killed"), adapter(tmp_path / "whole"))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "whole")]
    assert results[0]["accuracy"] == results[1]["accuracy"]


def test_a_started_process_that_is_killed_ends_its_starter_with_a_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*TINY, "rounds=400", "client.steps=60", "fabric.devices=2", f"run_dir={run}"]
    process = start(arguments)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        os.killpg(process.pid, signal.SIGKILL)
        pytest.skip("no list of child processes")
    deadline = time.monotonic() + 120
    while not list_checkpoints(run):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = (int(number) for number in children.read_text().split())
    os.kill(child, signal.SIGKILL)
    status, _, errors = finish(process)
    assert status == 1
    assert "error: process 0 on " in errors
    assert "process 1 was ended by SIGKILL" in errors


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process; it must end with status 2 and one line."""
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.name=lora_fare"], r"method\.name=lora_fare is unknown; did you mean lora_fair\?"),
        (["method.name=fedit", "method.solver=sgd"], r"method\.solver is no option of fedit; it belongs to lora_fair"),
        (["method.rescale=3"], r"method\.rescale=3 must be true or false"),
        (["method.regularization=-1"], r"method\.regularization"),
        (["model.lora.targets=[attn.qk]"], r"model\.lora\.targets: attn\.qk matches no linear layer"),
        (
            ["data.source=folder", "data.root=/nowhere/at/all"],
            r"data\.root=/nowhere/at/all is not a folder that exists",
        ),
        (["data.domains=[plain, colourful]"], r"data\.domains: synthetic has no domain colourful; there are plain"),
        (["federation.clients_per_round=4"], r"federation\.clients_per_round=4: there are 3 clients"),
        (["partition.scheme=dirichlet", "partition.min_images=500"], r"too few for partition\.clients_per_domain=5"),
        (["resume=/nowhere"], r"/nowhere is not a readable checkpoint"),
        ([f"run_dir={__file__}"], r"run_dir=.*test_command\.py cannot be written to \(File exists\)"),
    ],
)
def test_a_mistake_ends_with_one_clear_line(
    changes: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert re.search(message, fails(capsys, *TINY, f"run_dir={tmp_path}", *changes))


def picture_folder(root: Path) -> Path:
    for domain in ("photo", "sketch"):
        for index, name in enumerate(("cat", "dog")):
            (root / domain / name).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (40, 30), (200 * index, 20 * number, 90)).save(root / domain / name / f"{number}.png")
    return root


def test_a_folder_of_pictures_is_trained_on_and_a_corrupt_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = picture_folder(tmp_path / "pictures")
    arguments = [*TINY, "data.source=folder", f"data.root={root}", "rounds=1"]
    assert main([*arguments, f"run_dir={tmp_path / 'run'}"]) == 0
    corrupt = root / "sketch" / "dog" / "3.png"
    corrupt.write_bytes(corrupt.read_bytes()[:60])
    capsys.readouterr()
    assert str(corrupt) in fails(capsys, *arguments, f"run_dir={tmp_path / 'other'}")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=1"]) == 0
    capsys.readouterr()
    message = fails(capsys, *TINY, f"run_dir={tmp_path}", "rounds=2", "model.name=test_vit2")
    assert "model.name is test_vit there and test_vit2 here" in message


def test_a_truncated_checkpoint_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=2"]) == 0
    expected = adapter(tmp_path)
    file = list_checkpoints(tmp_path)[-1] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=2"]) == 0
    assert "round_000002 is damaged" in capsys.readouterr().out
    assert "has 2 rounds already" in fails(capsys, *TINY, f"run_dir={tmp_path}", "rounds=1")
    assert torch.equal(adapter(tmp_path), expected)


def test_a_client_with_fewer_images_than_a_batch_is_trained_on_all_it_has(tmp_path: Path) -> None:
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=1", "client.batch_size=500"]) == 0
    assert (tmp_path / "result.json").exists()


def test_help_shows_every_option_of_the_run_and_of_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    keys = [key for key, _, _ in describe_options()]
    keys += [key for method in AGGREGATORS.values() for key, _, _ in describe_options(method, "method.")]
    assert [key for key in keys if f"  {key}=" not in shown] == []


def commands(text: str) -> list[list[str]]:
    """The train.py commands in the code blocks of a document."""
    blocks = re.findall(r"```(?:bash|console|sh)?\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python train.py")]


def test_the_commands_of_the_readme_are_right() -> None:
    readme = (ROOT / "README.md").read_text()
    found = commands(readme)
    assert len(found) >= 5
    for arguments in found:
        if arguments[0] == "slurm":
            _, arguments = take_options(arguments[1:])
        _, options = take_part([argument for argument in arguments if argument not in ("prepare", "--doctor")])
        if "--help" not in arguments and load_comparison(options) is None:
            load_config(options)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used: Any = set(re.findall(r"`?make ([a-z]+)", readme))
    assert {"demo", "test"} <= used <= targets


def test_a_damaged_image_ends_the_command_and_its_workers(tmp_path: Path) -> None:
    """Only decoding finds it, in a worker process, and these ignore the signals of a scheduler."""
    root = damaged_folder(tmp_path / "pictures")
    process = start(
        [*TINY, "data.source=folder", f"data.root={root}", "data.workers=2", "model.prefix_cache=never",
         "fabric.devices=2", f"run_dir={tmp_path / 'run'}"]
    )  # fmt: skip
    status, _, errors = finish(process)
    assert status == 2
    assert len([line for line in errors.splitlines() if "cannot be decoded" in line]) == 1
    assert "Traceback" not in errors

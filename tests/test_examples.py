"""The worked example under examples/, which lies outside the package: every way to run it, and what it brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafair
from lorafair import cli
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.commands.run import RunResult
from lorafair.federation import run_federation
from tests.conftest import TINY, run_ranks

SHAPES = Path(__file__).parents[1] / "examples" / "shapes"


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example, seen from another working directory."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return SHAPES / "shapes.yaml"


def adapters(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(run_dir)[-1]).tensors


def test_the_command_runs_it_from_anywhere(shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert cli.main([str(shapes), f"run_dir={run_dir}", "rounds=2"]) == 0
    printed = capfd.readouterr().out
    assert "trimmed_mean" in printed
    assert "best round: " in printed, "the callback has a word at the end"
    result = RunResult(run_dir)
    assert set(result.accuracy) == {"filled", "lines"}
    assert set(result.metrics["eval/macro_recall"]) == {1, 2}
    assert set(result.metrics["eval/macro_recall/lines"]) == {1, 2}
    lines = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[-1]["eval/macro_recall"] == pytest.approx(result.metrics["eval/macro_recall"][2], abs=1e-6)


@pytest.mark.slow
def test_python_gives_the_bits_of_the_command(shapes: Path, tmp_path: Path) -> None:
    by_command, by_python = tmp_path / "command", tmp_path / "python"
    assert cli.main(["run", str(shapes), f"run_dir={by_command}", "rounds=1"]) == 0
    result = lorafair.run(shapes, rounds=1, run_dir=str(by_python))
    assert result.mean_accuracy == RunResult(by_command).mean_accuracy
    one, other = adapters(by_command), adapters(by_python)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one(shapes: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        run_ranks(ranks, _on_a_rank, str(shapes), [f"run_dir={tmp_path / str(ranks)}", "data.workers=2"])
    one, two = adapters(tmp_path / "1"), adapters(tmp_path / "2")
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [(tmp_path / ranks / "rounds.jsonl").read_text().count('"eval/accuracy"') for ranks in ("1", "2")]
    assert lines == [2, 2], "one process writes to a logger"


def _on_a_rank(fabric: Any, file: str, overrides: list[str]) -> None:
    run_federation(fabric, lorafair.load_config(file, *overrides, rounds=2))


@pytest.mark.slow
def test_two_processes_started_from_python(shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = lorafair.run(shapes, "fabric.devices=2", "rounds=1", run_dir=str(tmp_path / "run"))
    assert set(result.accuracy) == {"filled", "lines"}
    printed = capfd.readouterr()
    assert "best round: 1" in printed.out, "the lines of the child are shown"
    assert "2 processes on cpu" in printed.out
    assert "distributed_backend" not in printed.out + printed.err, "nothing of Lightning's"


@pytest.mark.slow
def test_a_comparison_of_it(shapes: Path, tmp_path: Path) -> None:
    comparison = lorafair.compare(shapes.with_name("compare.yaml"), run_dir=str(tmp_path / "comparison"), rounds=1)
    assert {method for _, method, _ in comparison.runs} == {"fedit", "trimmed_mean", "untrimmed"}
    assert "trimmed_mean" in comparison.report


def test_the_batch_script_of_it(shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["slurm", str(shapes), f"run_dir={tmp_path / 'run'}"]) == 0
    script = capfd.readouterr().out
    assert str(shapes) in script
    assert f"run_dir={tmp_path / 'run'}" in script


def test_another_method_under_the_same_name_does_not_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "methods.py"
    file.write_text((SHAPES / "methods.py").read_text().replace("trimmed_mean", "my_trimmed_mean"))
    arguments = [*TINY, f"plugins=[{file}]", "method.name=my_trimmed_mean", f"run_dir={tmp_path / 'run'}"]
    assert cli.main([*arguments, "rounds=1"]) == 0
    file.write_text(file.read_text() + "\n# changed\n")
    assert cli.main([*arguments, "rounds=2"]) == 2
    assert "the file that defines method my_trimmed_mean has changed" in capfd.readouterr().err

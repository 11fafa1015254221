"""The script for a GPU, benchmarks/gpu.py: all parts with a tiny model on the CPU, and what becomes of failures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lorafair.config import LoRAConfig, ModelConfig
from lorafair.model.backbone import build_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module("gpu")
    for name in set(sys.modules) - known:
        if name == "gpu" or name.partition(".")[0] == "gpu_parts":
            del sys.modules[name]


@pytest.fixture
def part(gpu: ModuleType, tmp_path: Path) -> Any:
    return gpu.Part("one", torch.device("cpu"), True, tmp_path, tmp_path / "one.json", 60.0, peak_tflops=1.0)


def left_by(part: Any) -> dict[str, Any]:
    return dict(json.loads(part.out.read_text()))


@pytest.mark.slow
def test_all_parts_with_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--device", "cpu", "--here", "--peak", "0.1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {"card", "versions", "commit", "command", "card before"} <= report["header"].keys()
    tables = {name: [t["rows"] for t in part["tables"]] for name, part in report["parts"].items()}
    assert list(tables) == ["correctness", "training", "cohorts", "server", "rounds", "data", "start"]
    for name, part in report["parts"].items():
        assert part["status"] == "done", name
        assert part["seconds"] > 0, name
        assert tables[name], name
        assert all(rows for rows in tables[name]), name
    checks = [check["check"] for check in report["parts"]["correctness"]["checks"]]
    assert checks == [
        "a client with NaN is left out", "killed and resumed = uninterrupted",
        "one process, a group of its own, over gloo", "every method as on the CPU", "server steps as on the CPU",
    ]  # fmt: skip
    ways = {row["way"]: row for row in tables["training"][0]}
    halves = {f"bf16-{kind}{way}" for kind in ("true", "mixed") for way in ("", ": bare loop", ", compiled")}
    assert {*halves, "bf16-mixed: peft", "bf16-true, dropout 0.1", "float32, TF32 off"} <= ways.keys()
    for row in [*ways.values(), *tables["cohorts"][0]]:
        assert len(row["images/s"]) == 2
        assert min(row["images/s"]) > 0
        assert min(row["MFU %"]) > 0
    assert [row["side by side"] for row in tables["cohorts"][0]] == ["1", "2", "4", "4, compiled"]
    phases = {row["phase"]: row["% of the round"] for row in tables["rounds"][0]}
    assert phases["train"][0] > phases["gather"][0] > 0
    assert phases["round"] == [100.0]
    assert tables["start"][0][0]["s"] > 0
    goals = [goal for part in report["parts"].values() for goal in part["goals"]]
    assert len(goals) == 8
    assert all(goal["verdict"] == "met" or goal["verdict"].startswith("short by ") for goal in goals)
    text = (tmp_path / "gpu.md").read_text()
    assert "| bf16-true: bare loop |" in text
    assert "nan" not in text.lower().replace("a client with nan", "")


def test_what_fails_is_kept_and_the_rest_goes_on(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert part.attempt("a row", lambda: part.table("numbers", "a", "b").row([1.0, 3.0, 2.0], True)) is None
    assert part.attempt("what fails", lambda: 1 / 0) is None
    assert part.attempt("the next one", lambda: 7) == 7
    part.ended = True
    part.goal("speed", 0.5, 1.0)
    left = left_by(part)
    assert left["status"] == "failed"
    assert "ZeroDivisionError" in left["failures"]["what fails"]
    assert left["tables"] == [{"title": "numbers", "rows": [{"a": [1.0, 3.0, 2.0], "b": True}]}]
    assert left["goals"][0]["verdict"] == "short by 0.5"
    printed = capsys.readouterr().out
    assert "2 (1–3) | yes" in printed
    assert "ZeroDivisionError" in printed


def test_a_check_that_does_not_hold_fails_and_a_goal_that_is_missed_does_not(part: Any) -> None:
    part.ended = True
    part.goal("speed", 0.5, 1.0)
    part.check("bits", True, "equal")
    assert left_by(part)["status"] == "done"
    part.check("bits", False, "not equal")
    assert left_by(part)["status"] == "failed"


def test_nothing_is_begun_after_the_time_of_a_part_and_memory_is_no_failure(part: Any) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    part.attempt("much", too_large)
    part.seconds = 0.0
    part.attempt("late", lambda: pytest.fail("begun"))
    left = left_by(part)
    assert not left["failures"]
    assert [note.partition(":")[0] for note in left["notes"]] == ["much", "left out, as the time of this part is over"]


@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_is_recorded(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's own process goes on with the next part, and ends with status 1."""
    good = json.dumps({"status": "done", "seconds": 1.0, "tables": [], "checks": [], "goals": [], "notes": [],
                       "failures": {}})  # fmt: skip
    code = {
        "server": "import os; os.abort()",
        "rounds": "import time; time.sleep(60)",
        "data": f"open({str(tmp_path / 'in_work' / 'data.json')!r}, 'w').write({good!r})",
    }

    def child(options: Any, name: str, *_: Any, **__: Any) -> Any:
        return subprocess.Popen([sys.executable, "-S", "-c", code[name]], start_new_session=True)

    monkeypatch.setattr(gpu, "child", child)
    monkeypatch.setattr(gpu, "GRACE", -3.5)
    given = ["gpu.py", "--device", "cpu", "--only", "d", "e", "data", "--minutes", "0.2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    assert gpu.main() == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "server": "failed", "rounds": "failed", "data": "done",
    }  # fmt: skip
    assert parts["server"]["failures"] == {"the process": "ended with status -6"}
    assert parts["rounds"]["notes"][0].startswith("killed after ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.0), ("NVIDIA L4", 121.0),
     ("NVIDIA L40S", 362.0), ("NVIDIA GeForce", None)],
)  # fmt: skip
def test_the_peak_of_a_card(
    gpu: ModuleType, name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "name_of_card", lambda: name)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.peak(gpu.arguments()) == expected
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--peak", "5"])
    assert gpu.peak(gpu.arguments()) == 5


@pytest.mark.parametrize(
    ("model", "gflop"), [("vit_base_patch16_224", 71.5), ("mixer_b16_224", 51.8), ("vit_large_patch16_224", 249.5)]
)
@pytest.mark.usefixtures("gpu")
def test_arithmetic_of_an_image(model: str, gflop: float) -> None:
    timing = importlib.import_module("gpu_parts.timing")
    with torch.device("meta"):
        built = build_model(ModelConfig(name=model, weights="random", lora=LoRAConfig(rank=16)), classes=100, seed=0)
    assert timing.flop_of_an_image(built, 224) / 1e9 == pytest.approx(gflop, abs=0.05)


@pytest.mark.usefixtures("gpu")
def test_gaps_of_a_trace() -> None:
    """Two streams: the second one is busy while the first is not; copies count as work, other events do not."""
    rounds = importlib.import_module("gpu_parts.rounds")

    def event(name: str, start: float, duration: float, kind: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration}

    events = [
        event("third", 1200, 100), event("first", 0, 100), event("second", 50, 150),
        event("copy", 210, 90, "gpu_memcpy"), event("annotation", 0, 5000, "gpu_user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    idle = rounds.idle_time(events, rounds.KERNELS)
    assert (idle.span, idle.kernels) == (pytest.approx(1300e-6), 4)
    assert idle.idle == pytest.approx(910e-6)
    assert idle.gaps == [rounds.Gap(pytest.approx(900e-6), "copy", "third")]  # the one of 10 µs is too short
    with pytest.raises(ValueError, match="no event of the categories kernel"):
        rounds.idle_time([], rounds.KERNELS)


@pytest.mark.usefixtures("gpu")
def test_the_server_step_of_every_method_is_timed_once_for_each_number_of_clients() -> None:
    server = importlib.import_module("gpu_parts.server")
    turns = [(count, method) for count, methods in server.turns(tiny=False) for method in methods]
    assert sorted(turns) == sorted((count, method) for count in (6, 18, 100) for method in server.METHODS)
    assert turns[: len(server.FIRST)] == [(100, method) for method in server.FIRST]
    assert [method for _, method in turns[-3:]] == [server.SLOW] * 3


@pytest.mark.usefixtures("gpu")
def test_one_process_that_counts_as_a_group() -> None:
    grouped = importlib.import_module("gpu_parts.grouped_run").Grouped(1)
    assert grouped > 1
    assert grouped not in (0, 1)
    assert grouped != 1
    assert list(range(grouped)) == [0]
    assert [0] * grouped == [0]
    assert 3 * grouped == 3


def test_without_a_card_it_says_so(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "name_of_card", lambda: "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 2
    assert capsys.readouterr().err.startswith("error: --device cuda: torch sees no CUDA device")

"""Scalars in TensorBoard and metrics.csv, and pictures."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafair.console import table
from lorafair.reporting.pictures import confusion_picture
from lorafair.reporting.tracker import Tracker


def read_csv(run_dir: Path) -> list[list[str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_scalars_go_to_tensorboard_and_csv(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, completed_rounds=0, settings={"seed": 0, "run_dir": tmp_path}, loggers=[])
    tracker.scalars({"eval/accuracy/a": 0.25}, 1)
    tracker.scalars({"eval/accuracy/a": 0.5}, 2)
    tracker.final({"final/accuracy": 0.5})
    tracker.close("success")
    assert read_csv(tmp_path) == [
        ["round", "name", "value"],
        ["1", "eval/accuracy/a", "0.25"],
        ["2", "eval/accuracy/a", "0.5"],
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/accuracy/a")] == [(1, 0.25), (2, 0.5)]
    assert "final/accuracy" in events.Tags()["scalars"]


def test_a_continued_run_replaces_the_rounds_after_its_checkpoint(tmp_path: Path) -> None:
    first = Tracker(tmp_path, completed_rounds=0, settings={}, loggers=[])
    for completed in (1, 2, 3):
        first.scalars({"x": float(completed)}, completed)
    first.close("failed")
    second = Tracker(tmp_path, completed_rounds=1, settings={}, loggers=[])
    second.scalars({"x": 20.0}, 2)
    second.close("success")
    assert [row[2] for row in read_csv(tmp_path)[1:]] == ["1.0", "20.0"]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(1, 1.0), (2, 20.0)]


def test_a_logger_gets_the_same_scalars_and_hears_how_it_ended(tmp_path: Path) -> None:
    heard: list[tuple[Any, ...]] = []
    logger: Any = SimpleNamespace(
        log_metrics=lambda metrics, step=None: heard.append((metrics, step)),
        log_hyperparams=lambda settings: heard.append((settings,)),
        finalize=lambda status: heard.append((status,)),
    )
    tracker = Tracker(
        tmp_path, completed_rounds=0, settings={"client": {"steps": None}, "run_dir": tmp_path}, loggers=[logger]
    )
    tracker.scalars({"x": 1.0}, 1)
    tracker.final({"final/accuracy": 0.5})
    tracker.close("success")
    assert heard == [
        ({"client.steps": "None", "run_dir": str(tmp_path)},),
        ({"x": 1.0}, 1),
        ({"final/accuracy": 0.5}, None),
        ("success",),
    ]


def test_a_logger_that_fails_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[object] = []

    class Broken:
        def log_hyperparams(self, settings: object) -> None:
            heard.append(settings)

        def log_metrics(self, metrics: object, step: int | None = None) -> None:
            heard.append(step)
            raise ConnectionError("no route to host\nat all")

    broken: Any = Broken()
    tracker = Tracker(tmp_path, completed_rounds=0, settings={"seed": 0}, loggers=[broken])
    tracker.scalars({"x": 1.0}, 1)
    tracker.scalars({"x": 2.0}, 2)
    tracker.close("success")
    assert heard == [{"seed": 0}, 1]
    said = "logger Broken failed and gets nothing more of this run (ConnectionError: no route to host at all)"
    assert said in capsys.readouterr().out
    assert [row[2] for row in read_csv(tmp_path)[1:]] == ["1.0", "2.0"]


def test_a_table_lines_up() -> None:
    assert table(["domain", "accuracy %"], [["a", "7.5"], ["longer", "70.5"]]).splitlines() == [
        "domain  accuracy %",
        "------  ----------",
        "a              7.5",
        "longer        70.5",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "largest"), [(3, 2000), (30, 2000), (150, 3000)])
def test_the_confusion_picture_is_dark_where_predictions_are(classes: int, largest: int) -> None:
    counts = torch.eye(classes, dtype=torch.int64) * 5
    picture = confusion_picture(counts, [f"class {i}" for i in range(classes)], "sketch")
    assert picture is not None
    assert str(picture.dtype) == "uint8"
    assert max(picture.shape) < largest
    dark = (picture.sum(2) < 300).mean()
    assert dark > 0.5 / classes / 2
    assert dark < 0.5


def test_a_larger_picture_is_not_drawn() -> None:
    assert confusion_picture(torch.eye(345, dtype=torch.int64), [str(i) for i in range(345)], "sketch") is None


def test_names_are_no_formulas_and_may_be_of_any_script(recwarn: pytest.WarningsRecorder) -> None:
    names = ["a$b_{$", "\u732b", r"back\slash"]
    assert confusion_picture(torch.eye(3, dtype=torch.int64), names, "cost $5^$") is not None
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]

"""What a run leaves to look at."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafair.tables import table
from lorafair.tracking import Tracker, confusion_picture


def read_csv(run_dir: Path) -> list[list[str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_scalars_go_to_tensorboard_and_csv(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, completed_rounds=0, rounds=2)
    tracker.scalars({"eval/accuracy/a": 0.25}, 1)
    tracker.scalars({"eval/accuracy/a": 0.5}, 2)
    tracker.finish({"seed": 0, "run_dir": tmp_path}, {"final/accuracy": 0.5}, {"mean_accuracy": 0.5})
    assert read_csv(tmp_path) == [
        ["round", "name", "value"],
        ["1", "eval/accuracy/a", "0.25"],
        ["2", "eval/accuracy/a", "0.5"],
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/accuracy/a")] == [(1, 0.25), (2, 0.5)]
    assert "final/accuracy" in events.Tags()["scalars"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"mean_accuracy": 0.5}


def test_a_continued_run_replaces_the_rounds_after_its_checkpoint(tmp_path: Path) -> None:
    first = Tracker(tmp_path, completed_rounds=0, rounds=3)
    for completed in (1, 2, 3):
        first.scalars({"x": float(completed)}, completed)
    first.close()
    second = Tracker(tmp_path, completed_rounds=1, rounds=3)
    second.scalars({"x": 20.0}, 2)
    second.close()
    assert [row[2] for row in read_csv(tmp_path)[1:]] == ["1.0", "20.0"]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(1, 1.0), (2, 20.0)]


def test_the_progress_line_says_how_long_it_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, completed_rounds=8, rounds=12)
    tracker.progress(9, ["loss 1.000", "accuracy 50.0 %"])
    assert capsys.readouterr().out == "round  9/12  loss 1.000  accuracy 50.0 %  ETA 0:00\n"


def test_a_table_lines_up() -> None:
    assert table(["domain", "accuracy %"], [["a", "7.5"], ["longer", "70.5"]]).splitlines() == [
        "domain  accuracy %",
        "------  ----------",
        "a              7.5",
        "longer        70.5",
    ]


@pytest.mark.parametrize("classes", [3, 30, 345])
def test_the_confusion_picture_is_dark_where_predictions_are(classes: int) -> None:
    counts = np.eye(classes, dtype=np.int64) * 5
    picture = confusion_picture(counts, [f"class {i}" for i in range(classes)], "sketch")
    assert picture.dtype == np.uint8
    assert picture.shape[0] < 2000
    dark = (picture.sum(2) < 300).mean()
    assert dark > 0.5 / classes / 2
    assert dark < 0.5

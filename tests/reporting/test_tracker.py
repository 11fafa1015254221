"""Scalars in TensorBoard and metrics.csv, and pictures."""

from __future__ import annotations

import csv
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafair.console import table
from lorafair.errors import ConfigError
from lorafair.files.writing import UnwritableFile
from lorafair.reporting.pictures import confusion_picture
from lorafair.reporting.run_dir import read_metrics
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
    assert [(e.step, e.value) for e in events.Scalars("1 accuracy/on a")] == [(1, 0.25), (2, 0.5)]


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
    assert len(list(tmp_path.glob("events*"))) == 1


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


@pytest.mark.parametrize(("classes", "largest"), [(3, 400), (30, 1100), (150, 2500)])
def test_the_confusion_picture_is_dark_where_predictions_are(classes: int, largest: int) -> None:
    counts = torch.eye(classes, dtype=torch.int64) * 5
    picture = confusion_picture(counts, [f"class {i}" for i in range(classes)], "sketch")
    assert picture is not None
    assert str(picture.dtype) == "uint8"
    assert max(picture.shape) < largest
    assert abs(picture.shape[0] - picture.shape[1]) < 80, "cells are square"
    dark = (picture.sum(2) < 300).mean()
    assert dark > 0.5 / classes / 3
    assert dark < 0.5


@pytest.mark.parametrize("classes", [2, 12, 60])
def test_titles_and_labels_are_whole(classes: int) -> None:
    names = [f"a class with a long name of its own {i}" for i in range(classes)]
    picture = confusion_picture(
        torch.eye(classes, dtype=torch.int64), names, "a domain with words enough for lines " * 4
    )
    assert picture is not None
    for edge in (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]):
        assert edge.min() == 255, "nothing is cut at an edge"
    many, few = (confusion_picture(torch.eye(60, dtype=torch.int64), [n] * 60, "x") for n in (names[0], "a"))
    assert many is not None
    assert few is not None
    left = [(picture[:, : picture.shape[1] // 4] < 100).any(axis=(1, 2)).sum() for picture in (many, few)]
    assert left[0] > 60 * 8, "a label for each of 60 classes, some pixels high"


def test_a_larger_picture_is_not_drawn() -> None:
    assert confusion_picture(torch.eye(345, dtype=torch.int64), [str(i) for i in range(345)], "sketch") is None


def test_names_are_no_formulas_and_may_be_of_any_script(recwarn: pytest.WarningsRecorder) -> None:
    names = ["a$b_{$", "\u732b", r"back\slash"]
    assert confusion_picture(torch.eye(3, dtype=torch.int64), names, "cost $5^$") is not None
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def metrics_of(run_dir: Path, content: bytes, completed_rounds: int) -> list[list[str]]:
    """What a run keeps of metrics.csv that it finds when it continues."""
    (run_dir / "metrics.csv").write_bytes(content)
    Tracker(run_dir, completed_rounds, settings={}, loggers=[]).close("success")
    return read_csv(run_dir)[1:]


HEADER, FIRST, SECOND = b"round,name,value\r\n", b"1,x,0.5\r\n", b"2,x,0.25\r\n"


@pytest.mark.parametrize(
    ("content", "kept", "said"),
    [
        (HEADER + FIRST + SECOND[:-4], ["0.5"], "1 line cannot be read; nothing is left of 1 round, the first is 2"),
        (HEADER + FIRST + b"2,\xff\xfe,1.0\r\n" + SECOND, ["0.5", "0.25"], "1 line cannot be read; the file"),
        (HEADER + FIRST + b"2,x\r\n" + SECOND, ["0.5", "0.25"], "1 line cannot be read; the file"),
        (b"\x00" * 40, [], "1 line cannot be read; nothing is left of 2 rounds, the first is 1; the file"),
        (b"", [], "is damaged: nothing is left of 2 rounds, the first is 1; the file"),
    ],
)
def test_a_damaged_metrics_file_is_said_and_kept(
    content: bytes, kept: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [row[2] for row in metrics_of(tmp_path, content, completed_rounds=2)] == kept
    printed = capsys.readouterr().out
    assert said in printed
    assert "kept as metrics.csv.damaged; the run goes on" in printed
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content


def test_what_a_killed_run_has_begun_to_write_after_its_checkpoint_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [row[0] for row in metrics_of(tmp_path, HEADER + FIRST + SECOND + b"3,x", 2)] == ["1", "2"]
    assert [row[0] for row in metrics_of(tmp_path, HEADER + FIRST + SECOND[:-4], 1)] == ["1"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [FIRST[:-3], b"1,x\r\n", b"1,\xff,1.0\r\n", b"1,x,a\r\n", b"\x00\r\n"])
def test_curves_are_not_read_from_a_damaged_metrics_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(HEADER + FIRST)
    assert read_metrics(tmp_path) == {"x": {1: 0.5}}
    (tmp_path / "metrics.csv").write_bytes(HEADER + content)
    with pytest.raises(ConfigError, match=r"metrics\.csv cannot be read \("):
        read_metrics(tmp_path)


def test_a_full_disk_under_metrics_and_events_is_one_error_with_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, completed_rounds=0, settings={}, loggers=[])
    tracker._csv_file = open("/dev/full", "w")  # noqa: SIM115
    tracker._csv = csv.writer(tracker._csv_file)
    with pytest.raises(UnwritableFile, match=rf"^{tmp_path}/metrics\.csv cannot be written: No space left on device$"):
        tracker.scalars({"x": 1.0}, 1)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, most))
    try:
        with pytest.raises(UnwritableFile, match=r"/events\.out\.tfevents\.\S+ cannot be written: File too large$"):
            tracker.scalars({"x": 1.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert capfd.readouterr().err == ""

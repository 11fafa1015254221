"""One event file of a run: what is kept of it, and what is said where it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

from lorafair.reporting.event_file import EventFile
from tests.reporting.events import steps_of


def written(run_dir: Path, completed_rounds: int, steps: list[int]) -> Path:
    """A part of a run; the file."""
    file = EventFile(run_dir, completed_rounds)
    for step in steps:
        file.write(Summary(value=[Summary.Value(tag="x" if step else "start", simple_value=float(step))]), step)
    file.close()
    (path,) = run_dir.glob("*.lorafair")
    return path


def test_a_continued_run_has_one_file_with_each_round_once(tmp_path: Path) -> None:
    first = written(tmp_path, 0, [0, 1, 2, 3])
    second = written(tmp_path, 2, [0, 3, 4])
    assert not first.exists()
    assert second.name > first.name, "TensorBoard reads files in the order of their names"
    assert steps_of(tmp_path) == {"start": [0], "x": [1, 2, 3, 4]}
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("x")] == [1, 2, 3, 4]
    written(tmp_path, 0, [0, 1])
    assert steps_of(tmp_path) == {"start": [0], "x": [1]}, "the rounds before the first checkpoint are repeated"


def test_a_run_that_was_killed_while_it_copied_has_each_round_once(tmp_path: Path) -> None:
    first = written(tmp_path, 0, [1, 2, 3])
    content = first.read_bytes()
    written(tmp_path, 3, [4])
    first.write_bytes(content)
    written(tmp_path, 4, [5])
    assert steps_of(tmp_path) == {"x": [1, 2, 3, 4, 5]}


def test_what_a_killed_run_has_not_written_to_its_end_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, 0, [1, 2, 3])
    file.write_bytes(file.read_bytes()[:-5])
    written(tmp_path, 2, [3])
    assert steps_of(tmp_path) == {"x": [1, 2, 3]}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", [lambda content: content[:-5], lambda content: content[:60] + b"?" * 70])
def test_a_damaged_file_is_said_and_kept(change: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, 0, [1, 2, 3])
    damaged = change(file.read_bytes())  # type: ignore[operator]
    file.write_bytes(damaged)
    written(tmp_path, 3, [4])
    assert f"{file} is damaged and kept as events.damaged" in capsys.readouterr().out
    assert (tmp_path / "events.damaged").read_bytes() == damaged
    assert steps_of(tmp_path)["x"][-1] == 4


def test_files_of_others_stay(tmp_path: Path) -> None:
    other = tmp_path / "events.out.tfevents.1.of-a-callback"
    other.write_bytes(b"theirs")
    written(tmp_path, 0, [1])
    written(tmp_path, 1, [2])
    assert other.read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 2

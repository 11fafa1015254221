"""The work of every round in its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafair.errors import ConfigError
from lorafair.virtual_time.record import WORK_FILE, RoundWork, WorkFile, has_work, read_work
from tests.virtual_time.test_timeline import work


@pytest.mark.parametrize(
    "made",
    [
        work(),
        work(images=(5, 5, 5), down=(8, 8, 8)),
        work(late=(9, 4), late_images=(1, 1), late_down=(2, 3), late_up=(4, 4), waited=2.5),
    ],
)
def test_a_line_has_all_of_it(made: RoundWork) -> None:
    assert RoundWork.of_line(made.to_line()) == made


def test_equal_numbers_are_written_once() -> None:
    line = json.loads(work(images=(5, 5, 5)).to_line())
    assert line["images"] == 5
    assert line["down"] == [1_000_000, 2_000_000, 3_000_000]
    assert not [name for name in line if name.startswith("late") or name == "waited"]


def test_a_continued_run_keeps_the_rounds_that_are_done(tmp_path: Path) -> None:
    first = WorkFile(tmp_path, 0)
    for round in (1, 2, 3):
        first.write(work(round=round))
    first.close()
    with (tmp_path / WORK_FILE).open("a") as file:
        file.write('{"round": 4, "cli')  # killed while it wrote
    again = WorkFile(tmp_path, 2)
    again.write(work(round=3, server_seconds=7.0))
    again.close()
    read = read_work(tmp_path)
    assert [each.round for each in read] == [1, 2, 3]
    assert read[2].server_seconds == 7.0
    WorkFile(tmp_path, 0).close()
    assert read_work(tmp_path) == [], "a run that begins anew has no rounds of an earlier one"


def test_damage_is_said_and_kept_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / WORK_FILE).write_text(f"{work().to_line()}\nnonsense\n{work(round=3).to_line()}\n")
    WorkFile(tmp_path, 3).close()
    assert f"{tmp_path / WORK_FILE}: 1 line cannot be read; the file is kept as {WORK_FILE}.damaged" in (
        capsys.readouterr().out
    )
    assert "nonsense" in (tmp_path / f"{WORK_FILE}.damaged").read_text()
    with pytest.raises(ConfigError, match=r"has no work of 1 round, the first is 2: an older version of lorafair"):
        read_work(tmp_path)


def test_a_run_of_an_older_version_is_named(tmp_path: Path) -> None:
    assert not has_work(tmp_path)
    with pytest.raises(
        ConfigError, match=r"has recorded no work \(work\.jsonl\): an older version of lorafair made it"
    ):
        read_work(tmp_path)

"""Finished clients of a round that is not: written, found again, and not used where they do not fit."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafair.checkpointing import rows
from lorafair.checkpointing.folder import CheckpointError
from lorafair.checkpointing.partial_round import PartialRound, drop_unfinished, list_unfinished


def partial(tmp_path: Path, start: str = "s", seconds: float = 60) -> PartialRound:
    return PartialRound(tmp_path, 3, lambda: start, seconds)


def found(tmp_path: Path, start: str = "s") -> dict[tuple[int, ...], list[list[float]]]:
    reader = partial(tmp_path, start)
    reader.read()
    return {cohort: rows.tolist() for cohort, rows in reader.found.items()}


def test_finished_cohorts_come_back(tmp_path: Path) -> None:
    round_4 = partial(tmp_path)
    round_4.add((7, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    round_4.add((5,), torch.tensor([[5.0, 6.0]]))
    assert found(tmp_path) == {}  # so soon, nothing is written
    round_4.write()
    assert found(tmp_path) == {(7, 2): [[1, 2], [3, 4]], (5,): [[5, 6]]}
    assert list_unfinished(tmp_path).keys() == {3}


def test_a_long_round_is_written_as_it_goes(tmp_path: Path) -> None:
    round_4 = partial(tmp_path, seconds=0)
    for client in (4, 1):
        round_4.add((client,), torch.full((1, 2), float(client)))
        assert (client,) in found(tmp_path)
    assert len(list((tmp_path / "checkpoints" / "unfinished_000004").iterdir())) == 2


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_named_and_ignored(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    round_4 = partial(tmp_path, seconds=0)
    for client in (4, 1):
        round_4.add((client,), torch.full((1, 2), float(client)))
    damage(tmp_path / "checkpoints" / "unfinished_000004" / "clients_000004.safetensors")
    assert found(tmp_path) == {(1,): [[1, 1]]}
    [line] = capsys.readouterr().out.splitlines()
    assert "clients_000004.safetensors is not used" in line
    round_4 = partial(tmp_path, seconds=0)
    round_4.add((4,), torch.full((1, 2), 4.0))
    assert found(tmp_path).keys() == {(1,), (4,)}


def test_clients_that_started_from_something_else_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial(tmp_path, seconds=0).add((4,), torch.ones(1, 2))
    assert found(tmp_path, start="another seed") == {}
    assert "started from something else" in capsys.readouterr().out


def test_clients_that_cannot_be_written_are_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"finished clients could not be saved as .*unfinished_000004"):
        partial(tmp_path, seconds=0).add((4,), torch.ones(1, 2))


def test_the_error_that_ends_a_round_is_raised_where_its_clients_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    of_round = partial(tmp_path, seconds=60)
    of_round.add((4,), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^the reason$"), of_round.kept_on_failure():
        raise ValueError("the reason")
    assert capsys.readouterr().out.startswith("warning: finished clients could not be saved as ")


def test_copies_of_unfinished_rounds_are_neither_read_nor_removed(tmp_path: Path) -> None:
    for name in ("unfinished_000004", "unfinished_000004.bak", "unfinished_000004 (1)", "unfinished_old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list_unfinished(tmp_path).keys() == {3}
    drop_unfinished(tmp_path, completed_rounds=9)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["unfinished_000004 (1)", "unfinished_000004.bak", "unfinished_old"]


def test_clients_that_cannot_be_read_now_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial(tmp_path, seconds=0).add((4,), torch.ones(1, 2))

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        with pytest.raises(
            CheckpointError, match=r"unfinished_000004 cannot be read now \(Input/output error\); nothing"
        ):
            found(tmp_path)
    monkeypatch.setattr(rows, "safe_open", fail)
    with pytest.raises(CheckpointError, match=r"clients_000004.safetensors cannot be read now \(Input/output error\)"):
        found(tmp_path)

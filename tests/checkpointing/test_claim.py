"""All ranks end together where one of them cannot have, or does not see, the run directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorafair.checkpointing import claim
from lorafair.checkpointing.checkpoint import find_checkpoint
from lorafair.checkpointing.claim import check_shared, holding
from lorafair.checkpointing.lock import acquire
from lorafair.errors import LorafairError
from tests.conftest import run_ranks


def alone() -> Any:
    """What `check_shared` needs of a Fabric on rank 0, without others."""
    return SimpleNamespace(is_global_zero=True, world_size=1, broadcast=lambda value: value)


def test_what_a_start_leaves_that_was_killed_meanwhile_is_not_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lock = acquire(run_dir)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        check_shared(alone(), run_dir, lock)
    lock.release()
    assert len(list(run_dir.iterdir())) == 1
    assert find_checkpoint(run_dir, "never", {}) is None
    assert list(tmp_path.iterdir()) == [run_dir], "there was nothing to move aside"


def test_a_directory_may_be_in_one_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a home directory of mode 711."""
    mark = tmp_path / "run" / "mark"
    mark.parent.mkdir()
    listed = []

    def listing(folder: Path) -> list[str]:
        listed.append(folder)
        if folder == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        mark.touch()
        return []

    monkeypatch.setattr(os, "listdir", listing)
    assert claim._is_seen(mark)
    assert listed == [tmp_path, mark.parent]


def outcomes(fabric: Any, here: Path, there: Path) -> list[str]:
    """How three starts end on a rank: in a free directory, in one of its own, and in one that another process has."""
    claim.SECONDS_UNTIL_SEEN = 1.0
    ended = []
    for number, run_dir in enumerate((here, here if fabric.is_global_zero else there, here / "held")):
        other = acquire(run_dir) if number == 2 and fabric.is_global_zero else None
        try:
            with holding(fabric, run_dir) as lock:
                ended.append(f"held: {lock is not None}")
        except LorafairError as error:
            ended.append(str(error))
        except SystemExit as leave:
            ended.append(f"status {leave.code}")
        if other is not None:
            other.release()
    return ended


@pytest.mark.slow
def test_all_ranks_hold_one_directory_or_none(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "held").mkdir(parents=True)
    first, second = run_ranks(2, outcomes, here, there)
    assert first[0] == "held: True"
    assert first[1].startswith("process 1 on ")
    assert first[1].endswith(
        f"does not see what process 0 writes to run_dir={there}; choose a run_dir on a disk that all nodes share, as "
        "an absolute path"
    )
    assert first[2].startswith(f"run_dir={here / 'held'} is in use by process ")
    assert second == ["held: False", "status 2", "status 2"]
    assert list(here.rglob("*")) == [here / "held"]  # nothing is left of any of them

"""All ranks end together where one of them cannot have, or does not see, the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafair.checkpointing import claim
from lorafair.checkpointing.claim import holding
from lorafair.checkpointing.lock import acquire
from lorafair.errors import LorafairError
from tests.conftest import run_ranks


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

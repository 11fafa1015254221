"""What Slurm says about a job, read the same way wherever it is asked."""

from __future__ import annotations

import pytest

from lorafair.cluster import slurm
from lorafair.cluster.slurm import Job, has_ended, step_has_ended

GONE = "slurm_load_jobs error: Invalid job id specified"


@pytest.mark.parametrize(
    ("status", "output", "job_has_ended", "its_processes_have"),
    [
        *((0, state, True, True) for state in ("COMPLETED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "REVOKED")),
        *((0, state, False, True) for state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")),
        (0, "SUSPENDED", False, False),
        (0, "COMPLETING", False, None),
        (0, "COMPLETED\nFAILED", True, True),  # tasks of an array
        (0, "COMPLETED\nPENDING", False, True),
        (0, "", False, None),
        (1, GONE, True, None),
        (1, "slurm_load_jobs error: Unable to contact slurm controller", False, None),
        (127, "No such file or directory: 'squeue'", False, None),
    ],
)
def test_whether_a_job_has_ended_and_whether_its_processes_have(
    status: int, output: str, job_has_ended: bool, its_processes_have: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that waits for its next start has no processes, but has not ended."""
    monkeypatch.setattr(slurm, "_slurm", lambda *command: (status, f"{output}\n"))
    assert has_ended(Job("42", 0)) == job_has_ended
    assert step_has_ended("42", "batch") == its_processes_have

"""What happens when a run is stopped: which jobs are requeued, and how the command ends."""

from __future__ import annotations

import re
import signal

import pytest
import torch

from lorafair import launch
from lorafair.cluster.signals import TIME_LIMIT, Interrupted
from lorafair.cluster.slurm import Job

RUNNING, ENDING = ("RUNNING", "None"), ("COMPLETING", "None")


@pytest.mark.parametrize(
    ("reason", "job", "state", "refusal", "status", "line", "requeued"),
    [
        (signal.SIGUSR1, Job("7_1", 0), RUNNING, "", 75, "job 7_1 is requeued and continues", True),
        (TIME_LIMIT, Job("7", 2), RUNNING, "", 75, "job 7 is requeued", True),
        (signal.SIGTERM, Job("7", 0), ("COMPLETING", "TimeLimit"), "", 75, "job 7 is requeued", True),
        (signal.SIGTERM, Job("7", 0), RUNNING, "", 75, "job 7 is requeued", True),  # preempted
        (signal.SIGTERM, Job("7", 0), ENDING, "", 75, r"Slurm ends job 7 \(COMPLETING\) by itself", False),  # scancel
        (signal.SIGUSR1, Job("7", 3), RUNNING, "", 1, "requeued 3 times, and fabric.max_requeues=3 ends that", False),
        (signal.SIGUSR1, Job("7", 0), RUNNING, "not allowed", 75, r"could not be requeued \(not allowed\)", True),
        (signal.SIGUSR1, Job("7", 0), ("", ""), "no scontrol", 75, r"could not be requeued \(no scontrol\)", True),
        (signal.SIGTERM, None, RUNNING, "", 75, "the same command continues", False),
        (signal.SIGINT, Job("7", 0), RUNNING, "", 130, "the same command continues", False),
    ],
)
def test_who_is_requeued_and_how_the_command_ends(
    reason: int, job: Job | None, state: tuple[str, str], refusal: str, status: int, line: str, requeued: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked_for = []
    monkeypatch.setattr(launch, "state_of_job", lambda job: state)
    monkeypatch.setattr(launch, "requeue", lambda job: asked_for.append(job) or refusal)
    assert launch.after_stop(Interrupted(reason, "in round 1"), job, max_requeues=3)[0] == status
    assert asked_for == ([job] if requeued else [])
    assert_matches(line, launch.after_stop(Interrupted(reason, "in round 1"), job, max_requeues=3)[1])


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_a_job_about_to_be_ended_waits_for_it_where_it_cannot_be_requeued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preempted job whose processes end by themselves counts as completed; one that is killed is requeued."""
    waited: list[float] = []
    monkeypatch.setattr(launch, "state_of_job", lambda job: ("", ""))
    monkeypatch.setattr(launch, "requeue", lambda job: "scontrol: not found")
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    assert launch.after_stop(Interrupted(signal.SIGTERM, "in round 1"), Job("7", 0), max_requeues=3)[0] == 75
    assert waited == [launch.SECONDS_UNTIL_KILLED]
    assert "waiting for Slurm to end it" in capsys.readouterr().out


def test_products_on_a_gpu_are_as_exact_as_asked_and_a_notebooks_setting_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def setting() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = setting()
    assert launch.set_matmul_precision("medium") == before == setting()  # no GPU: it would concern the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        assert launch.set_matmul_precision("highest") == before
        assert setting() == ("highest", False)  # PyTorch's default has TF32 in convolutions
        launch.set_matmul_precision("high")
        assert setting() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

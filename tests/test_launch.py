"""What happens when a run is stopped: which jobs are requeued, and how the command ends."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lorafair import launch
from lorafair.cluster import saved
from lorafair.cluster.arithmetic import set_matmul_precision, set_threads, warn_of_slow_bfloat16
from lorafair.cluster.signals import TIME_LIMIT, Interrupted
from lorafair.cluster.slurm import Job, TimeLimit, lead_in, slurm_job
from tests.conftest import launched


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests before have saved in this process is forgotten."""
    monkeypatch.setattr(saved, "_state", saved._State())


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


@pytest.mark.parametrize(
    ("resume", "is_saved", "line"),
    [
        ("auto", True, "the same command continues"),
        ("never", True, "the same command with resume=auto continues"),
        ("auto", False, "nothing was saved yet, and the same command begins anew"),
    ],
)
def test_a_stopped_run_says_what_the_same_command_does(resume: str, is_saved: bool, line: str) -> None:
    saved.begin_start()
    saved.note_resume(resume)
    if is_saved:
        saved.note_saved()
    assert launch.after_stop(Interrupted(signal.SIGTERM, "in round 1"), None, max_requeues=3)[1] == line


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
    set_matmul_precision("medium")()
    assert setting() == before  # no GPU: it would concern the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_back = set_matmul_precision("highest")
    try:
        assert setting() == ("highest", False)  # PyTorch's default has TF32 in convolutions
        set_matmul_precision("high")
        assert setting() == ("high", True)
    finally:
        set_back()
    assert setting() == before


def precision_of_products() -> list[str]:
    """As the present API of PyTorch shows it, for products of matrices, on a CPU too, and for convolutions."""
    backends = torch.backends
    kinds = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn
    return [kind.fp32_precision for kind in kinds]


@pytest.fixture
def chosen_by_the_present_api(request: pytest.FixtureRequest) -> Iterator[str]:
    """Somebody has chosen TF32, for products of matrices or for everything."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch has it since 2.9")
    place = torch.backends if request.param == "everything" else torch.backends.cuda.matmul
    before, all_before = place.fp32_precision, precision_of_products()
    place.fp32_precision = "tf32"
    try:
        yield request.param
    finally:
        place.fp32_precision = before
    assert precision_of_products() == all_before, "what followed the choice follows it still"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("chosen_by_the_present_api", ["products", "everything"], indirect=True)
@pytest.mark.parametrize(("precision", "on_gpu"), [("highest", "ieee"), ("high", "tf32")])
def test_a_setting_by_pytorchs_present_api_comes_back_too(
    chosen_by_the_present_api: str, precision: str, on_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = precision_of_products()
    set_matmul_precision(precision)()
    assert precision_of_products() == before  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_back = set_matmul_precision(precision)
    assert precision_of_products() == [on_gpu] * 4
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, on_gpu == "tf32")
    set_back()
    assert precision_of_products() == before


LIMIT = TimeLimit(limit=120.0, left=55.0, preempted=False, lead=60.0)


@pytest.mark.parametrize(
    ("reason", "restarts", "state", "limit", "futile"),
    [
        (signal.SIGUSR1, 0, RUNNING, LIMIT, True),
        (signal.SIGTERM, 0, ("COMPLETING", "TimeLimit"), TimeLimit(None, None, preempted=False, lead=None), True),
        (TIME_LIMIT, 0, RUNNING, TimeLimit(None, None, preempted=False, lead=None), True),
        (signal.SIGUSR1, 0, RUNNING, replace(LIMIT, left=280.0, lead=None), True),  # --signal of the command line
        (signal.SIGUSR1, 0, RUNNING, replace(LIMIT, left=280.0), False),  # sent by hand
        (signal.SIGTERM, 0, RUNNING, replace(LIMIT, preempted=True), False),
        # Slurm's commands are not there, as in a container: a second start without anything
        (signal.SIGUSR1, 0, ("", ""), TimeLimit(None, None, preempted=False, lead=None), False),
        (signal.SIGUSR1, 1, ("", ""), TimeLimit(None, None, preempted=False, lead=None), True),
    ],
)
def test_a_start_that_has_gained_nothing_before_the_time_limit_is_not_repeated(
    reason: int, restarts: int, state: tuple[str, str], limit: TimeLimit, futile: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked_for: list[Job] = []
    monkeypatch.setattr(launch, "state_of_job", lambda job: state)
    monkeypatch.setattr(launch, "time_limit_of", lambda job: limit)
    monkeypatch.setattr(launch, "requeue", lambda job: asked_for.append(job) or "")
    saved.begin_start()
    job, stop = Job("7", restarts), Interrupted(reason, "in round 1")
    status, line = launch.after_stop(stop, job, max_requeues=3, gained=False)
    assert (status, asked_for) == ((1, []) if futile else (75, [job]))
    if futile:
        assert "\n" not in line
        assert_matches(r"job 7 is not requeued: the time limit.*--time.*--signal=USR1@.*client.steps", line)
        assert ("of 2 minutes" in line) == (limit.limit is not None)
        assert ("60 seconds before which its --signal asks to stop" in line) == (limit.lead is not None)
    assert launch.after_stop(stop, job, max_requeues=3, gained=True)[0] == 75


def test_what_an_earlier_start_has_saved_counts_where_nothing_is_known_of_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "time_limit_of", lambda job: TimeLimit(None, None, preempted=False, lead=None))
    saved.begin_start()
    assert launch.why_futile(Job("7", 1), at_limit=False)
    saved.note_saved(before=True)
    assert not launch.why_futile(Job("7", 1), at_limit=False)


def test_a_shell_in_an_allocation_does_not_wait_for_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "state_of_job", lambda job: RUNNING)
    monkeypatch.setattr(launch, "requeue", lambda job: "Only batch jobs are accepted or processed for job 7")
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} seconds"))
    job = slurm_job({"SLURM_JOB_ID": "7"})
    status, line = launch.after_stop(Interrupted(signal.SIGTERM, "in round 1"), job, max_requeues=3)
    assert status == 75
    assert_matches("could not be requeued .*Only batch jobs.*; the same command continues", line)
    batch = slurm_job({"SLURM_JOB_ID": "7", "ENVIRONMENT": "BATCH"})
    assert batch is not None
    assert not batch.is_interactive


@pytest.mark.parametrize(
    ("script", "lead"),
    [
        ("#!/bin/bash\n#SBATCH --signal=USR1@120   # so\n", 120),
        ("#SBATCH --requeue --signal=B:TERM@30 --time=5\n#SBATCH --signal USR2@90\n", 90),
        ("#SBATCH --signal=10\n", 60),
        ("srun --signal=USR1@10 x\n", None),
        ("", None),
    ],
)
def test_the_lead_of_the_signal_in_a_batch_script(script: str, lead: float | None) -> None:
    assert lead_in(script) == lead


def test_what_happens_to_the_work_is_said_only_where_it_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "_state", saved._State())
    assert saved.outlook() == ""  # as in `lorafair export`
    saved.begin_start()
    assert saved.outlook() == "; nothing was saved yet, and the same command begins anew"
    saved.note_saved()
    assert saved.outlook() == "; what is saved stays, and the same command continues from it"


@pytest.mark.parametrize(
    ("precision", "device", "supported", "warned"),
    [
        ("bf16-true", "cpu", False, True),
        ("bf16-mixed", "cpu", False, True),
        ("bf16-true", "cpu", True, False),
        ("bf16-true", "cuda", False, False),
        ("32-true", "cpu", False, False),
    ],
)
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_warned_of(
    precision: str,
    device: str,
    supported: bool,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    with caplog.at_level("WARNING"):
        warn_of_slow_bfloat16(precision, device)
    assert ("set fabric.precision=32-true" in caplog.text) == warned


@pytest.mark.parametrize("given", ["0", "many", "", "²"])
def test_a_number_of_threads_that_is_none_is_not_taken(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    try:
        assert set_threads(launched(1), None) >= 1
    finally:
        torch.set_num_threads(before)

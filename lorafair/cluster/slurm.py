"""The Slurm job of this process: its name, queries to Slurm, and requeueing."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

_SECONDS_FOR_SLURM = 30
# A signal of `sbatch --signal` that comes so long before the time limit, or less, is one for it.
_LEAD_UNKNOWN, _LEAD_TOLERANCE = 300.0, 60.0  # Slurm looks at limits twice a minute
_HALTED = {"SUSPENDED", "STOPPED"}
_WITH_PROCESSES = _HALTED | {"RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT"}
# Of a job that is about to start, perhaps again.
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "POWER_UP_NODE"}


@dataclass(frozen=True)
class Job:
    """The Slurm job of this process."""

    name: str  # what scontrol and squeue take: 42, or 42_1 for a task of an array
    restarts: int  # how often it was requeued
    is_interactive: bool = field(default=False, compare=False)  # of salloc, or of srun alone: it cannot be requeued


@dataclass(frozen=True)
class TimeLimit:
    """The time limit of a job, and how near it is."""

    limit: float | None  # seconds; None: none is known
    left: float | None
    preempted: bool  # the job makes room for another one
    lead: float | None  # from the signal of sbatch --signal to the limit; None where the script does not say


def slurm_job(environ: Mapping[str, str]) -> Job | None:
    """The Slurm job of this process; None outside of one."""
    number = environ.get("SLURM_JOB_ID")
    if not number:
        return None
    # The number of an array's task may be that of the whole array, which must not be requeued with it.
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return Job(
        f"{array}_{task}" if array and task else number,
        int(environ.get("SLURM_RESTART_COUNT") or 0),
        is_interactive="ENVIRONMENT" not in environ,  # BATCH in a batch script and its steps
    )


def seconds_left(job: Job) -> float | None:
    """Time until the job's limit; None where there is none or Slurm does not say."""
    return parse_time_left(_slurm("squeue", "-h", "-j", job.name, "-o", "%L")[1])


def parse_time_left(text: str) -> float | None:
    """Seconds from [[days-]hours:]minutes:seconds; None of UNLIMITED, NOT_SET or INVALID."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text.strip())
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def state_of_job(job: Job) -> tuple[str, str]:
    """The job's state and the reason that Slurm gives for it, e.g. ("COMPLETING", "TimeLimit")."""
    state, _, reason = _slurm("squeue", "-h", "-t", "all", "-j", job.name, "-o", "%T|%r")[1].strip().partition("|")
    return state, reason


def has_ended(job: Job) -> bool:
    """Whether Slurm says that the job has no processes any more, and gets none; False where it says nothing."""
    states, message = _states_of(job.name)
    return not states & (_WITH_PROCESSES | _WAITING) if states else "Invalid job id" in message


def time_limit_of(job: Job) -> TimeLimit:
    """What Slurm says about the time limit of a job."""
    words = _slurm("squeue", "-h", "-j", job.name, "-O", "TimeLimit,TimeLeft,PreemptTime")[1].split()
    if len(words) != 3:
        return TimeLimit(None, None, preempted=False, lead=None)
    script = _slurm("scontrol", "write", "batch_script", job.name, "-")[1]
    limit, left, preemption = words
    return TimeLimit(parse_time_left(limit), parse_time_left(left), preemption[:1].isdigit(), lead_in(script))


def lead_in(script: str) -> float | None:
    """Seconds from the signal to the time limit, from the last --signal of a batch script; None without one."""
    found = re.findall(r"^#SBATCH\b.*?--signal[= ](?:[BR]+:)?[A-Za-z0-9]+(?:@(\d+))?", script, re.MULTILINE)
    return float(found[-1] or 60) if found else None  # 60 is Slurm's default


def is_near(limit: TimeLimit) -> bool | None:
    """Whether a signal that has come now is the one before the time limit; None where that is not known."""
    if limit.preempted:
        return False
    if limit.left is None:
        return None
    return limit.left <= (_LEAD_UNKNOWN if limit.lead is None else limit.lead + _LEAD_TOLERANCE)


def step_has_ended(name: str, step: str) -> bool | None:
    """Whether a step of a job has ended, or all of the job; None where Slurm does not say.

    A `step` that is no number, such as batch, ends with the job at the latest.
    """
    states, _ = _states_of(name)
    if not states:
        return None
    if not states & _WITH_PROCESSES:
        return True
    if states & _HALTED:  # its processes give no sign of life
        return False
    if not step.isdigit():
        return None
    status, output = _slurm("squeue", "-h", "-s", "-j", name, "-o", "%i")
    return None if status else not any(line.strip().endswith(f".{step}") for line in output.splitlines())


def _states_of(name: str) -> tuple[set[str], str]:
    """The states of a job, or of the tasks of an array; none, and what is said instead, where Slurm does not say."""
    status, output = _slurm("squeue", "-h", "-t", "all", "-j", name, "-o", "%T")
    return (set(), output) if status else (set(output.split()), "")


def requeue(job: Job) -> str:
    """Put the job back into the queue, which ends all of its processes; returns why Slurm did not, or an empty text."""
    status, output = _slurm("scontrol", "requeue", job.name)
    return "" if status == 0 else " ".join(output.split()) or f"scontrol ended with {status}"


def _slurm(*command: str) -> tuple[int, str]:
    """Exit status and output of one of Slurm's commands; 127 and what is wrong where it cannot be run.

    Slurm signals every process of a job, also the one that requests a requeue, which must report the result.
    """
    main = threading.current_thread() is threading.main_thread()  # only this one can set handlers
    ignored = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) if main else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}  # a new program inherits this
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS_FOR_SLURM,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return done.returncode, done.stdout

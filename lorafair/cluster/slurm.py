"""The Slurm job of this process: its name, queries to Slurm, and requeueing."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_SECONDS_FOR_SLURM = 30


@dataclass(frozen=True)
class Job:
    """The Slurm job of this process."""

    name: str  # what scontrol and squeue take: 42, or 42_1 for a task of an array
    restarts: int  # how often it was requeued


def slurm_job(environ: Mapping[str, str]) -> Job | None:
    """The Slurm job of this process; None outside of one."""
    number = environ.get("SLURM_JOB_ID")
    if not number:
        return None
    # The number of an array's task may be that of the whole array, which must not be requeued with it.
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return Job(f"{array}_{task}" if array and task else number, int(environ.get("SLURM_RESTART_COUNT") or 0))


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


def requeue(job: Job) -> str:
    """Put the job back into the queue, which ends all of its processes; returns why Slurm did not, or an empty text."""
    status, output = _slurm("scontrol", "requeue", job.name)
    return "" if status == 0 else " ".join(output.split()) or f"scontrol ended with {status}"


def _slurm(*command: str) -> tuple[int, str]:
    """Exit status and output of one of Slurm's commands; 127 and what is wrong where it cannot be run.

    Slurm signals every process of a job, also the one that requests a requeue, which must report the result.
    """
    ignored = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
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

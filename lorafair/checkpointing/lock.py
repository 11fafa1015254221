"""The lock of a run directory: one process at a time writes there, on any node. Nothing heavy is imported.

The file run.lock names its holder. It is made by a hard link, which only one process can succeed with, on network file
systems too; file locks (fcntl) do not reach every node. A holder that has ended without removing its file leaves
nothing stuck. Its process decides where this process sees it. Else Slurm does, where it knows the job: a job that was
requeued takes over from its former start. Else the file's time does: its holder renews it every BEAT_SECONDS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lorafair.cluster.slurm import slurm_job, step_has_ended
from lorafair.console import duration_text, log
from lorafair.errors import LorafairError
from lorafair.files.writing import naming

LOCK = "run.lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 180.0  # without a sign of life, a holder that nothing else is known of counts as ended
_CHECK_SECONDS = 1.0  # between two looks of the holder at its own file
_SECONDS_FOR_THREAD = 2.0  # to end in; a file server that does not answer holds it up
_TRIES, _SECONDS_BETWEEN_TRIES = 20, 0.05  # of a file that others create and remove meanwhile
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory, as its file says it."""

    token: str
    host: str
    pid: int
    started: int = 0  # of the process, in ticks since the machine was: a number that another process had before is free
    kernel: str = ""  # the machine's start and the namespace of process numbers: where they are equal, so is `pid`
    job: str = ""  # of Slurm; empty outside of one
    step: str = ""
    restarts: int = 0
    cluster: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        """Of the process that calls."""
        job, pid = slurm_job(os.environ), os.getpid()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=pid,
            started=_state_and_start(pid)[1],
            kernel=_kernel(),
            job=job.name if job else "",
            step=os.environ.get("SLURM_STEP_ID", "batch") if job else "",
            restarts=job.restarts if job else 0,
            cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
        )

    @classmethod
    def from_text(cls, text: str) -> Holder | None:
        """From the content of a file; None of one that is cut or not ours."""
        try:
            values = json.loads(text)
            kinds = {field.name: {"str": str, "int": int}[str(field.type)] for field in dataclasses.fields(cls)}
            return cls(**{name: kind(values[name]) for name, kind in kinds.items()})
        except (ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


class RunDirInUse(LorafairError):
    """Another process has the run directory."""

    def __init__(self, file: Path, holder: Holder | None) -> None:
        self.holder = str(holder or "a process that has not written its name")
        text = f"run_dir={file.parent} is in use by {self.holder}; wait until it has ended, or choose another run_dir"
        if holder is None or _process_has_ended(holder, Holder.this_process()) is None:
            text += (
                f". Its last sign of life is {duration_text(round(_age(file)))} old; without one for "
                f"{duration_text(STALE_SECONDS)} it counts as ended, unless Slurm says that it runs. Where you know "
                f"that it has ended, remove {file}"
            )
        super().__init__(text)


class RunLock:
    """A run directory that this process holds, until `release`."""

    def __init__(self, file: Path, holder: Holder) -> None:
        self.holder = holder
        self._file, self._checked = file.absolute(), time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Raise LorafairError where another process has taken the run directory over."""
        if time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        try:
            text = _read(self._file)
            if text is None and _create(self._file, self.holder):
                log.warning(f"{self._file} was removed while this run goes on; it is made again")
                return
        except OSError:  # the disk does not answer now, or is full: whatever is written next says so
            return
        other = Holder.from_text(text or "")
        if other is None or other.token != self.holder.token:
            raise LorafairError(
                f"{self._file.parent} was taken over by {other or 'another process'}, so this run ends: its lock "
                f"{self._file.name} was removed, or not renewed for too long"
            )

    def release(self) -> None:
        """Give the run directory back."""
        self._released.set()
        self._thread.join(_SECONDS_FOR_THREAD)  # a caller in a notebook finds no thread left
        with contextlib.suppress(OSError):  # then the process's end tells the next one
            if self._is_ours():
                self._file.unlink()

    def _is_ours(self) -> bool:
        found = Holder.from_text(_read(self._file) or "")
        return found is not None and found.token == self.holder.token

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # until the disk answers again
                if self._is_ours():
                    os.utime(self._file)  # without a time: the file server's clock


def acquire(run_dir: Path) -> RunLock:
    """Hold a run directory that exists. Raises RunDirInUse, and UnwritableFile where the disk is full or fails."""
    file, mine = run_dir / LOCK, Holder.this_process()
    for _ in range(_TRIES):
        with naming(file):
            if _create(file, mine):
                return RunLock(file, mine)
            text = _read(file)
        if text is None:  # just released
            time.sleep(_SECONDS_BETWEEN_TRIES)
            continue
        holder = Holder.from_text(text)
        if not _has_ended(file, holder, mine):
            raise RunDirInUse(file, holder)
        with naming(file):
            removed = _remove(file, text, mine)
        if removed:
            log.info(f"{holder or 'a process'} has left {file} and has ended; this process takes the run over")
    mark = _mark_of_removal(file)
    if (text := _read(mark)) is not None:
        raise RunDirInUse(mark, Holder.from_text(text))
    raise LorafairError(f"{file} is made and removed by other processes all the time; choose another run_dir")


def check_free(run_dir: Path) -> None:
    """Raise RunDirInUse where a process of this machine holds a run directory: known before any process is started."""
    try:
        holder = Holder.from_text(_read(run_dir / LOCK) or "")
    except OSError:  # `acquire` says what is wrong
        return
    if holder is not None and _process_has_ended(holder, Holder.this_process()) is False:
        raise RunDirInUse(run_dir / LOCK, holder)


def in_progress(run_dir: Path) -> str:
    """Who holds a run directory, as far as can be told without Slurm; empty if nobody does."""
    try:
        text = _read(run_dir / LOCK)
        if text is None:
            return ""
        holder = Holder.from_text(text)
        ended = _has_ended(run_dir / LOCK, holder, Holder.this_process(), ask_slurm=False)
    except OSError:
        return ""
    return "" if ended else str(holder or "another process")


def move_aside(run_dir: Path, aside: Path) -> None:
    """Rename a run directory, and hold the new, empty one in place of it where this process holds it. Raises OSError.

    In between another process may take the new one; this one is then refused, as it would be at its start.
    """
    run_dir.rename(aside)
    holder = Holder.from_text(_read(aside / LOCK) or "")
    if holder is None:
        return
    run_dir.mkdir(exist_ok=True)
    if not _create(run_dir / LOCK, holder):
        raise RunDirInUse(run_dir / LOCK, Holder.from_text(_read(run_dir / LOCK) or ""))
    (aside / LOCK).unlink()


def _create(file: Path, holder: Holder) -> bool:
    """Make the file if there is none; whether it was made. Its content is whole from the first moment."""
    content = json.dumps(dataclasses.asdict(holder), indent=1) + "\n"
    own = file.with_name(f".{LOCK}.{holder.token}")
    try:
        own.write_text(content, encoding="utf-8")
        try:
            os.link(own, file)
        except FileExistsError:
            return own.stat().st_nlink == 2  # a network file system may repeat what had succeeded
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_exclusively(file, content)
        return True
    finally:
        with contextlib.suppress(OSError):
            own.unlink()


def _create_exclusively(file: Path, content: str) -> bool:
    """The same on disks without hard links, where others may see the file before its content."""
    try:
        with file.open("x", encoding="utf-8") as created:
            created.write(content)
    except FileExistsError:
        return False
    except OSError:
        with contextlib.suppress(OSError):
            file.unlink()
        raise
    return True


def _remove(file: Path, text: str, mine: Holder) -> bool:
    """Remove a file that an ended process has left; whether this process did.

    One process at a time, so that none removes the file of the one that has just taken over.
    """
    mark = _mark_of_removal(file)
    if not _create(mark, mine):
        left = _read(mark)
        if left is not None and _has_ended(mark, Holder.from_text(left), mine) and _read(mark) == left:
            mark.unlink(missing_ok=True)  # of a process that was killed here
        time.sleep(_SECONDS_BETWEEN_TRIES)
        return False
    try:
        was_left = _read(file) == text
        if was_left:
            file.unlink()
        return was_left
    finally:
        mark.unlink(missing_ok=True)


def _mark_of_removal(file: Path) -> Path:
    """There while one process removes the file."""
    return file.with_name(f".{LOCK}.removing")


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _age(file: Path) -> float:
    """Seconds since the last sign of life, both times by the clock of the file's disk, which may be another node's."""
    with contextlib.suppress(FileNotFoundError):
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{LOCK}.") as new:
            now = os.fstat(new.fileno()).st_mtime
        return max(0.0, now - file.stat().st_mtime)
    return 0.0


def _has_ended(file: Path, holder: Holder | None, mine: Holder, *, ask_slurm: bool = True) -> bool:
    ended = None if holder is None else _process_has_ended(holder, mine)
    if ask_slurm and ended is None and holder is not None and holder.job:
        ended = _job_has_ended(holder, mine)
    return _age(file) > STALE_SECONDS if ended is None else ended


def _process_has_ended(holder: Holder, mine: Holder) -> bool | None:
    """Whether the holder's process has ended; None where it is not one that can be seen from here."""
    if holder.kernel != mine.kernel or (not mine.kernel and holder.host != mine.host):
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # there is one, of another user
        pass
    state, started = _state_and_start(holder.pid)
    return state != "" and (state in "ZX" or started != holder.started)


def _job_has_ended(holder: Holder, mine: Holder) -> bool | None:
    """Whether the holder's part of a Slurm job has ended; None where Slurm cannot tell."""
    if holder.cluster and mine.cluster and holder.cluster != mine.cluster:
        return None
    if holder.job == mine.job and holder.restarts != mine.restarts:
        return holder.restarts < mine.restarts  # Slurm has ended all processes of the start before
    return step_has_ended(holder.job, holder.step)


def _state_and_start(pid: int) -> tuple[str, int]:
    """A process's state (R, S, Z, ...) and when it started, in ticks; empty and 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""

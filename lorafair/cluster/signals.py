"""Requests to stop a run before it is done: a signal of the scheduler, Ctrl-C, or the end of the time that a job has.

Handlers only set a flag, which a round checks where it can stop (federation.py); before the first round, where there is
nothing to finish, Ctrl-C ends the process at once. Handlers are installed before the heavy imports; processes forked
later, such as data workers, ignore them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import ClassVar

from lorafair.cluster.backstop import stderr_number
from lorafair.console import ERASE_LINE, is_rank_0
from lorafair.errors import LorafairError

# Reasons, in rising priority; the ranks agree on the largest.
NO_REASON, ANOTHER_RANK, TIME_LIMIT = 0, 1, 100
SCHEDULER_SIGNALS = ("USR1", "USR2", "TERM")

# Exit statuses besides 0 and 2 (an error that the user can fix): sysexits.h calls 75 a temporary failure, "try again".
FAILED, SAVED, INTERRUPTED = 1, 75, 130

MARGIN_SECONDS = 10.0  # before the time limit, for saving and for the error of the prediction
MARGIN_FRACTION = 0.1

_SECONDS_TO_END = 2.0  # Ctrl-C is not heard again while it ends the process


class Interrupted(Exception):
    """The run has stopped where it can go on; raised on every rank after everything is saved."""

    def __init__(self, reason: int, where: str) -> None:
        super().__init__(f"stopped by {reason_text(reason)} {where}")
        self.reason = reason


@dataclass
class _State:
    process: int = 0  # the one whose flag this is
    requested: int = NO_REASON
    ctrl_c: bool = False
    starting: bool = False  # there is nothing to finish yet: Ctrl-C ends the process at once
    at_once: float | None = None  # when Ctrl-C began to end the process, on the monotonic clock
    deadline: float | None = None  # on the monotonic clock


_state = _State()


@contextmanager
def handling_signals(*, starting: bool = False) -> Iterator[None]:
    """Take signals as requests to stop, from now until the end of the block.

    `starting`: outside of a `finishing_clients` block, Ctrl-C ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    reset()
    _state.process, _state.starting = os.getpid(), starting
    numbers = [signal.SIGINT, *(_number(name) for name in SCHEDULER_SIGNALS)]
    before = {number: signal.signal(number, _handle) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # what is blocked is inherited, from a fork server too
    try:
        yield
    except Exception as error:
        if _state.at_once is not None:  # a library may turn it into an error of its own
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        reset()
        _state.starting = False


@contextmanager
def finishing_clients() -> Iterator[None]:
    """In the block, a first Ctrl-C lets the clients in training finish; a second one ends the process at once.

    After it, too, where a stop has been asked for or an error is to be reported: that is not interrupted.
    """
    before, _state.starting = _state.starting, False
    is_over = True  # the next run of a comparison may start
    try:
        yield
    except BaseException as error:
        is_over = isinstance(error, LorafairError | SystemExit)  # of this run alone
        raise
    finally:
        if is_over:
            _state.starting = before and _state.requested == NO_REASON


def ctrl_c_ends_at_once() -> bool:
    """Whether a first Ctrl-C ends the process now."""
    return _state.starting


def handle_only(names: Sequence[str]) -> None:
    """Give the scheduler's signals that are not among `names` (USR1, USR2, TERM) their usual effect back."""
    for name in SCHEDULER_SIGNALS:
        if name not in names and signal.getsignal(_number(name)) is _handle:
            signal.signal(_number(name), signal.SIG_DFL)


def request_stop(reason: int) -> None:
    """Ask this process to stop."""
    _state.requested = max(_state.requested, reason)


def stop_requested() -> int:
    """What has asked this process to stop: a signal's number, TIME_LIMIT, ANOTHER_RANK or NO_REASON."""
    return _state.requested


def reset() -> None:
    """Clear the request; for a process that continues with other work."""
    _state.requested, _state.ctrl_c, _state.at_once, _state.deadline = NO_REASON, False, None, None


def set_time_limit(seconds: float | None) -> None:
    """The job ends after so many seconds; None: no known limit."""
    _state.deadline = None if seconds is None else time.monotonic() + seconds


def request_stop_before_time_limit(seconds: float) -> None:
    """Ask this process to stop if work of this duration, with a margin, would not end before the job does."""
    needed = seconds * (1 + MARGIN_FRACTION) + MARGIN_SECONDS
    if _state.deadline is not None and time.monotonic() + needed > _state.deadline:
        request_stop(TIME_LIMIT)


def reason_text(reason: int) -> str:
    """For lines on the console."""
    if reason == TIME_LIMIT:
        return "the job's time limit"
    return "another process" if reason == ANOTHER_RANK else signal.Signals(reason).name


class SignalNumbers:
    """The numbers of the signals that come, readable in any thread; none where another thread than the main makes it.

    Python's own handlers wait until the main thread runs Python again.
    """

    _in_use: ClassVar[set[int]] = set()  # the pipes into which this process writes
    _forks_are_known: ClassVar[bool] = False

    def __init__(self) -> None:
        self._reader = self._writer = -1
        if threading.current_thread() is threading.main_thread():
            self._leave_out_forks()
            self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._in_use.add(self._writer)

    def read(self) -> bytes:
        """Those that have come since the last time."""
        try:
            return os.read(self._reader, 64)
        except OSError:  # none has come, or this is closed
            return b""

    def close(self) -> None:
        """Give back what was set."""
        if self._reader >= 0 and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._before)
            self._in_use.discard(self._writer)
            for number in (self._reader, self._writer):
                os.close(number)
            self._reader = self._writer = -1

    @classmethod
    def _leave_out_forks(cls) -> None:
        """Processes forked from this one, such as data workers, would write into its pipe: Ctrl-C goes to all."""
        if not cls._forks_are_known:  # what is registered stays for the life of the process
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) if cls._in_use else None)
            cls._forks_are_known = True


def _number(name: str) -> int:
    return signal.Signals[f"SIG{name}"]


def _handle(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _state.process:
        return  # forked with the handler: the scheduler signals every process of a job
    if number == signal.SIGINT:
        if _state.at_once is not None and time.monotonic() - _state.at_once < _SECONDS_TO_END:
            return
        if _state.starting or _state.ctrl_c:
            _state.at_once = time.monotonic()
            raise KeyboardInterrupt
        _state.ctrl_c = True
        if is_rank_0():  # a terminal interrupts all processes of the node
            _tell("stopping once the clients in training are done; press Ctrl-C again to stop at once")
    request_stop(number)


def _tell(line: str) -> None:
    """Print from a handler, which may have interrupted a print; nothing where stderr cannot be written."""
    start = ERASE_LINE if os.isatty(stderr_number()) else ""  # in place of a progress line
    with suppress(OSError):
        os.write(stderr_number(), f"{start}{line}\n".encode())

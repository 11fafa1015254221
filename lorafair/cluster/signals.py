"""Requests to stop a run before it is done: a signal of the scheduler, Ctrl-C, or the end of the time that a job has.

Handlers only set a flag, which the rounds look at where they can stop (federation.py). They are installed before the
heavy imports, and whoever is forked later, as data loaders are, does not act on them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Reasons, in rising order of weight; ranks agree on the largest that any of them has.
NOTHING, ANOTHER_RANK, TIME_LIMIT = 0, 1, 100
SCHEDULER_SIGNALS = ("USR1", "USR2", "TERM")

# Exit statuses besides 0 and the 2 of mistakes: sysexits.h calls 75 a temporary failure, "try again".
FAILED, SAVED, INTERRUPTED = 1, 75, 130

MARGIN_SECONDS = 10.0  # before the time limit, for saving and for what the prediction is off
MARGIN_FRACTION = 0.1


class Interrupted(Exception):
    """The run has stopped where it can go on; raised on every rank after everything is saved."""

    def __init__(self, reason: int, where: str) -> None:
        super().__init__(f"stopped by {reason_text(reason)} {where}")
        self.reason = reason


@dataclass
class _State:
    process: int = 0  # the one whose flag this is
    requested: int = NOTHING
    ctrl_c: bool = False
    at_once: bool = False  # Ctrl-C came twice
    deadline: float | None = None  # on the monotonic clock


_state = _State()


@contextmanager
def handling_signals() -> Iterator[None]:
    """Take signals as requests to stop, from now until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    reset()
    _state.process = os.getpid()
    numbers = [signal.SIGINT, *(_number(name) for name in SCHEDULER_SIGNALS)]
    before = {number: signal.signal(number, _handle) for number in numbers}
    try:
        yield
    except Exception as error:
        if _state.at_once:  # a library may turn it into an error of its own
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        reset()


def handle_only(names: Sequence[str]) -> None:
    """Give the scheduler's signals that are not among `names` (USR1, USR2, TERM) their usual effect back."""
    for name in SCHEDULER_SIGNALS:
        if name not in names and signal.getsignal(_number(name)) is _handle:
            signal.signal(_number(name), signal.SIG_DFL)


def request_stop(reason: int) -> None:
    """Ask this process to stop."""
    _state.requested = max(_state.requested, reason)


def stop_requested() -> int:
    """What has asked this process to stop: a signal's number, TIME_LIMIT, ANOTHER_RANK or NOTHING."""
    return _state.requested


def reset() -> None:
    """Take back what was asked; for a process that goes on to other work."""
    _state.requested, _state.ctrl_c, _state.at_once, _state.deadline = NOTHING, False, False, None


def set_time_limit(seconds: float | None) -> None:
    """The job ends after so many seconds; None: nobody knows of an end."""
    _state.deadline = None if seconds is None else time.monotonic() + seconds


def request_stop_unless_it_fits(seconds: float) -> None:
    """Ask this process to stop if something that takes so long, with a margin, would not end before the job does."""
    needed = seconds * (1 + MARGIN_FRACTION) + MARGIN_SECONDS
    if _state.deadline is not None and time.monotonic() + needed > _state.deadline:
        request_stop(TIME_LIMIT)


def reason_text(reason: int) -> str:
    """For lines on the console."""
    if reason == TIME_LIMIT:
        return "the job's time limit"
    return "another process" if reason == ANOTHER_RANK else signal.Signals(reason).name


def _number(name: str) -> int:
    return signal.Signals[f"SIG{name}"]


def _handle(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _state.process:
        return  # forked with the handler: the scheduler signals every process of a job
    if number == signal.SIGINT:
        if _state.ctrl_c:
            _state.at_once = True
            raise KeyboardInterrupt
        _state.ctrl_c = True
        os.write(2, b"stopping once the clients in training are done; press Ctrl-C again to stop at once\n")
    request_stop(number)

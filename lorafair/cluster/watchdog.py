"""The watchdog: ends this process with a message when its work hangs or another process is lost.

Without it a collective would wait for minutes for a process that is stopped or whose node is down, and for ever for a
client that hangs. One thread checks once a second; another one uses the process group's store, where it may block.
Both end with the process. Where C code holds the interpreter's lock, neither runs: cluster/backstop.py is for that.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from subprocess import Popen
from typing import Any, TypeVar

from lorafair.cluster.backstop import Backstop, stderr_number
from lorafair.cluster.placement import PARENT
from lorafair.cluster.saved import outlook
from lorafair.cluster.signals import (
    FAILED,
    INTERRUPTED,
    NO_REASON,
    SCHEDULER_SIGNALS,
    SignalNumbers,
    ctrl_c_ends_at_once,
    stop_requested,
)
from lorafair.console import ERASE_LINE, duration_text, write_error
from lorafair.errors import LorafairError

T = TypeVar("T")
_MONITOR_SECONDS = 1.0
_HEARTBEAT_SECONDS = 2.0
_GRACE_SECONDS = 3.0  # time for a failing process to print its own error
_SAVE_SECONDS = 20.0  # saving from a device that hangs never ends
_CTRL_C_SECONDS = 3.0  # time for Python's own handling of Ctrl-C
_DONE, _FAILED = "done", "failed"
WAITING = "waiting for the other processes"
CALLER = "LORAFAIR_CALLED_BY"  # the number of the process in which lorafair.run has started the command


@dataclass
class _Task:
    what: str
    seconds: float | None  # None: no limit
    since: float  # of its last step, on the monotonic clock
    key: str = ""  # the option that sets the limit
    stoppable: bool = False  # by any signal that asks to stop, at once


class Watchdog:
    """The threads that watch a process; call `stop` before it ends normally."""

    def __init__(self, process: str, *, is_child: bool = False) -> None:
        self._process = process
        self.children: Sequence[Popen[Any]] = ()  # the processes that this one has started
        # From the environment: a parent that is gone by now is not os.getppid() any more.
        self._parent = int(os.environ.get(PARENT, os.getppid())) if is_child else None
        os.environ[PARENT] = str(os.getpid())
        caller = os.environ.pop(CALLER, "")
        self._caller = int(caller) if caller else None
        self._task: _Task | None = None
        self._save: Callable[[], None] | None = None
        self._saved_on_request = False
        self.has_begun = False  # clients may be done that are not saved
        self._peers: _Peers | None = None
        self._silent_seconds: float | None = None  # after so long without a heartbeat the others take it for lost
        self.seconds_for_others: float | None = None  # in a collective
        self._backstop = Backstop()
        self._signals, self._ctrl_c, self._ctrl_c_at = SignalNumbers(), 0, 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._monitor, name="watchdog", daemon=True)
        self._thread.start()

    def watch_peers(self, store: Any, rank: int, world_size: int, seconds: float) -> None:
        """Exchange heartbeats with the other ranks through a store; a rank without one for `seconds` is lost."""
        self._peers = _Peers(store, rank, world_size, seconds, self._stopped, lambda: self.place)
        self._silent_seconds = seconds

    def stop(self, *, failed: bool = False) -> None:
        """Stop watching; the other ranks learn whether this one has failed."""
        if self._peers is not None:
            self._peers.last_word = _FAILED if failed else _DONE
        self._stopped.set()
        self._thread.join(timeout=2 * _MONITOR_SECONDS)
        self._backstop.disarm()
        self._signals.close()
        if self._peers is not None:
            self._peers.join(timeout=2 * _HEARTBEAT_SECONDS)

    @property
    def place(self) -> str:
        """What this process is doing; empty if that has no name."""
        return self._task.what if self._task is not None else ""

    @contextmanager
    def deadline(self, what: str, seconds: float | None, *, key: str = "", stoppable: bool = False) -> Iterator[None]:
        """The block must call `heartbeat` at least every so many seconds (None: no limit), which the option `key` sets.

        `stoppable`: a request to stop ends the process at once. Python's own handlers have to wait until the main
        thread returns from what it waits for, such as a process that never comes.
        """
        outer, self._task = self._task, _Task(what, seconds, time.monotonic(), key, stoppable)
        self._move_backstop()
        try:
            yield
        finally:
            self._task = outer
            self.heartbeat()

    def heartbeat(self) -> None:
        """The work in the `deadline` block has made progress."""
        if self._task is not None:
            self._task.since = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In the block this process waits for the others, which may work longer than the limit of its own work."""
        what = f"{self.place}, {WAITING}" if self.place else WAITING
        with self.deadline(what, self.seconds_for_others, key="fabric.timeout_minutes"):
            yield

    @contextmanager
    def saving(self, save: Callable[[], None]) -> Iterator[None]:
        """If the watchdog ends the process in the block, it calls `save` first; also once when a stop is requested.

        The scheduler may kill the process before the block ends.
        """
        self._save, self._saved_on_request, self.has_begun = save, False, True
        try:
            yield
        finally:
            self._save = None

    def lost_process(self) -> str:
        """Which other process of the run is lost; empty if none is known to be."""
        if self._parent not in (None, os.getppid()):
            return "the process that has started this one is gone"
        for number, child in enumerate(self.children, start=1):
            if status := child.poll():
                if status == INTERRUPTED:
                    return f"process {number} was stopped by Ctrl-C"
                how = (
                    f"was ended by {signal.Signals(-status).name}" if status < 0 else f"has failed with status {status}"
                )
                return f"process {number} {how}{self._last_place(number)}"
        return self._peers.lost() if self._peers is not None else ""

    def places(self) -> str:
        """Where the other processes known to this one were last; empty if that is not known."""
        return self._peers.places() if self._peers is not None else ""

    def kill_children(self) -> None:
        """Kill the processes that this one has started; they may hang."""
        for child in self.children:
            child.send_signal(signal.SIGKILL)

    def _last_place(self, number: int) -> str:
        place = self._peers.place_of(number) if self._peers is not None else ""
        return f", last in {place}" if place else ""

    def _hung(self) -> str:
        task = self._task
        if task is None or task.seconds is None or time.monotonic() - task.since <= task.seconds:
            return ""
        key = f" ({task.key})" if task.key else ""
        return f"{task.what} has got no further for {duration_text(task.seconds)}{key}"

    def _monitor(self) -> None:
        while not self._stopped.wait(_MONITOR_SECONDS):
            if self._caller not in (None, os.getppid()):
                self._caller = None
                os.kill(os.getpid(), signal.SIGTERM)  # stops the run where it can be continued; its caller is gone
            self._move_backstop()
            if stopped := self._stopped_by():
                self._end(f"stopped by {stopped}" + (f" in {self.place}" if self.place else ""), status=INTERRUPTED)
            elif hung := self._hung():
                faulthandler.dump_traceback(stderr_number(), all_threads=True)
                self._end(hung)
            elif (lost := self.lost_process()) and not self._stopped.wait(_GRACE_SECONDS):
                self._end(f"{lost}, while this process was in {self.place}" if self.place else lost)
            elif stop_requested() != NO_REASON and self._save is not None and not self._saved_on_request:
                self._saved_on_request = True
                self._save_in_time(self._save)

    def _move_backstop(self) -> None:
        """Called where Python runs: the interpreter's lock is not held for long."""
        task, now = self._task, time.monotonic()
        left = [] if self._silent_seconds is None else [self._silent_seconds]
        left += [task.since + task.seconds - now] if task is not None and task.seconds is not None else []
        if left:
            self._backstop.arm(min(left))
        else:
            self._backstop.disarm()

    def _stopped_by(self) -> str:
        """The signal that ends the process now; empty if there is none."""
        task, numbers = self._task, self._signals.read()
        if task is not None and task.stoppable:
            stopping = {signal.SIGINT, *(signal.Signals[f"SIG{name}"] for name in SCHEDULER_SIGNALS)}
            return next((signal.Signals(number).name for number in numbers if number in stopping), "")
        # Python's handler ends the process, unless its main thread does not return from C code or a library hides that.
        self._ctrl_c += numbers.count(signal.SIGINT)
        if self._ctrl_c < (1 if ctrl_c_ends_at_once() else 2):
            return ""
        self._ctrl_c_at = self._ctrl_c_at or time.monotonic()
        patience = _CTRL_C_SECONDS if self._save is None else _SAVE_SECONDS
        return "SIGINT" if time.monotonic() - self._ctrl_c_at > patience else ""

    def _end(self, why: str, status: int = FAILED) -> None:
        start = ERASE_LINE if os.isatty(stderr_number()) else ""  # in place of a progress line
        if self._save is not None:
            self._save_in_time(self._save)
        write_error(f"{start}error: {self._process}: {why}{outlook()}")
        # This process may wait where Python does not handle Ctrl-C.
        status = INTERRUPTED if any(child.poll() == INTERRUPTED for child in self.children) else status
        self.kill_children()
        os._exit(status)

    def _save_in_time(self, save: Callable[[], None]) -> None:
        def try_to_save() -> None:
            try:
                save()
            except LorafairError as error:
                write_error(f"warning: {self._process}: {error}")

        saver = threading.Thread(target=try_to_save, daemon=True)
        saver.start()
        saver.join(_SAVE_SECONDS)


class _Peers(threading.Thread):
    """Heartbeats: every rank counts up a number of its own; rank 0 checks all of them, the others check rank 0's."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        seconds: float,
        stopped: threading.Event,
        place: Callable[[], str],
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._rank, self._seconds, self._stopped = store.clone(), rank, seconds, stopped
        self._place, self.last_word = place, _DONE
        self._store.set_timeout(timedelta(seconds=seconds))
        self._changed = dict.fromkeys(range(1, world_size) if rank == 0 else [0], time.monotonic())
        self._last: dict[int, bytes] = {}
        self._lost = ""
        self.start()

    def run(self) -> None:
        """Exchange heartbeats until the watchdog is stopped, or the store, which rank 0 holds, is gone."""
        beats = 0
        try:
            while not self._stopped.wait(_HEARTBEAT_SECONDS):
                beats += 1
                self._store.set(self._key(self._rank), f"{beats}\n{self._place()}".encode(errors="replace").decode())
                for rank in self._changed:
                    self._read(rank)
            self._store.set(self._key(self._rank), self.last_word)
        except RuntimeError as error:
            self._lost = f"process 0 is gone ({str(error).splitlines()[0]})"

    def lost(self) -> str:
        """The process without a heartbeat; empty if there is none."""
        for rank, since in self._changed.items():
            last = self._last.get(rank, b"").decode()
            if last == _FAILED:
                return f"process {rank} has failed"
            if last != _DONE and time.monotonic() - since > self._seconds:
                place = f", last in {self.place_of(rank)}" if self.place_of(rank) else ""
                return f"process {rank} has sent no heartbeat for {duration_text(self._seconds)}{place}"
        return self._lost

    def place_of(self, rank: int) -> str:
        """What another rank was doing at its last heartbeat; empty if that is not known."""
        return self._last.get(rank, b"").decode().partition("\n")[2]

    def places(self) -> str:
        """What the other ranks were doing, those that do not wait."""
        known = [(rank, self.place_of(rank)) for rank in self._changed]
        busy = [(rank, place) for rank, place in known if place and WAITING not in place]
        return ", ".join(f"process {rank} was last in {place}" for rank, place in busy[:3])

    def _read(self, rank: int) -> None:
        if self._store.check([self._key(rank)]) and (value := self._store.get(self._key(rank))) != self._last.get(rank):
            self._last[rank], self._changed[rank] = value, time.monotonic()

    @staticmethod
    def _key(rank: int) -> str:
        return f"lorafair/alive/{rank}"


# The watchdog of this process, if it has one.
_watchdog: Watchdog | None = None


def start_watchdog(process: str, *, is_child: bool = False) -> Watchdog:
    """Start the watchdog of this process."""
    global _watchdog
    _watchdog = Watchdog(process, is_child=is_child)
    return _watchdog


def current_watchdog() -> Watchdog:
    """The watchdog of this process."""
    assert _watchdog is not None, "start_watchdog() comes first"
    return _watchdog


@contextmanager
def deadline(what: str, minutes: float | None, key: str = "") -> Iterator[None]:
    """As `Watchdog.deadline`, if this process has a watchdog; in minutes, as options are."""
    if _watchdog is None:
        yield
    else:
        with _watchdog.deadline(what, None if minutes is None else 60 * minutes, key=key):
            yield


def within(what: str, minutes: float | None, key: str, work: Callable[[], T]) -> T:
    """The result of `work`, done in a `deadline`. Tracebacks have a line of this name.

    That of the backstop has nothing else to say which client it was.
    """
    named = types.FunctionType(_call.__code__.replace(co_name=what), globals())
    with deadline(what, minutes, key):
        result: T = named(work)
    return result


def _call(work: Callable[[], T]) -> T:
    return work()


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """As `Watchdog.waiting`, if this process has a watchdog."""
    if _watchdog is None:
        yield
    else:
        with _watchdog.waiting():
            yield


@contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """As `Watchdog.saving`, if this process has a watchdog."""
    if _watchdog is None:
        yield
    else:
        with _watchdog.saving(save):
            yield


def heartbeat() -> None:
    """As `Watchdog.heartbeat`, if this process has a watchdog."""
    if _watchdog is not None:
        _watchdog.heartbeat()


def places_of_others() -> str:
    """As `Watchdog.places`, if this process has a watchdog."""
    return "" if _watchdog is None else _watchdog.places()


def end_children_of_a_start() -> None:
    """Kill the processes that this one has started, unless clients may be done there; for Ctrl-C."""
    if _watchdog is not None and not _watchdog.has_begun:
        _watchdog.kill_children()


def stop_watchdog(*, failed: bool = False) -> str:
    """Stop the watchdog; returns which other process is lost, if that is known."""
    global _watchdog
    if _watchdog is None:
        return ""
    stopping, _watchdog = _watchdog, None
    lost = stopping.lost_process()
    stopping.stop(failed=failed)
    return lost

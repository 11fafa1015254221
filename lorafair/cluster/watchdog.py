"""The watchdog: ends this process with a message when a client hangs or another process is lost.

Without it a collective would wait for minutes for a process that is stopped or whose node is down, and for ever for a
client that hangs. One thread checks once a second; another one uses the process group's store, where it may block.
Both end with the process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from subprocess import Popen
from typing import Any

from lorafair.cluster.signals import FAILED, INTERRUPTED, SCHEDULER_SIGNALS
from lorafair.console import ERASE_LINE, duration_text

CONTINUES = "what is saved stays, and the same command continues from it"
_MONITOR_SECONDS = 1.0
_HEARTBEAT_SECONDS = 2.0
_GRACE_SECONDS = 3.0  # time for a failing process to print its own error
_SAVE_SECONDS = 20.0  # saving from a device that hangs never ends
_DONE = b"done"
_PARENT = "LORAFAIR_STARTED_BY"  # the number of a process, for those that it starts
CALLER = "LORAFAIR_CALLED_BY"  # the number of the process in which lorafair.run has started the command


@dataclass
class _Task:
    what: str
    seconds: float
    since: float  # of its last step, on the monotonic clock
    signals: int | None  # from which to read the numbers of signals that end the process at once


class Watchdog:
    """The threads that watch a process; call `stop` before it ends normally."""

    def __init__(self, process: str, children: Sequence[Popen[Any]] = (), *, is_child: bool = False) -> None:
        self._process, self._children = process, children
        # From the environment: a parent that is gone by now is not os.getppid() any more.
        self._parent = int(os.environ.get(_PARENT, os.getppid())) if is_child else None
        os.environ[_PARENT] = str(os.getpid())
        caller = os.environ.pop(CALLER, "")
        self._caller = int(caller) if caller else None
        self._task: _Task | None = None
        self._save: Callable[[], None] | None = None
        self._peers: _Peers | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._monitor, name="watchdog", daemon=True).start()

    def watch_peers(self, store: Any, rank: int, world_size: int, seconds: float) -> None:
        """Exchange heartbeats with the other ranks through a store; a rank without one for `seconds` is lost."""
        self._peers = _Peers(store, rank, world_size, seconds, self._stopped)

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._peers is not None:
            self._peers.join(timeout=2 * _HEARTBEAT_SECONDS)

    @contextmanager
    def deadline(self, what: str, seconds: float | None, *, stoppable: bool = False) -> Iterator[None]:
        """The block must call `heartbeat` at least every so many seconds (None: no limit).

        `stoppable`: a request to stop ends the process at once. Python's own handlers have to wait until the main
        thread returns from what it waits for, such as a process that never comes.
        """
        outer = self._task
        with _signal_numbers() if stoppable else nullcontext() as signals:
            self._task = None if seconds is None else _Task(what, seconds, time.monotonic(), signals)
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
    def saving(self, save: Callable[[], None]) -> Iterator[None]:
        """If the watchdog ends the process in the block, it calls `save` first."""
        self._save = save
        try:
            yield
        finally:
            self._save = None

    def lost_process(self) -> str:
        """Which other process of the run is lost; empty if none is known to be."""
        if self._parent not in (None, os.getppid()):
            return "the process that has started this one is gone"
        for number, child in enumerate(self._children, start=1):
            if status := child.poll():
                if status == INTERRUPTED:
                    return f"process {number} was stopped by Ctrl-C"
                how = (
                    f"was ended by {signal.Signals(-status).name}" if status < 0 else f"has failed with status {status}"
                )
                return f"process {number} {how}"
        return self._peers.lost() if self._peers is not None else ""

    def kill_children(self) -> None:
        """Kill the processes that this one has started; they may hang."""
        for child in self._children:
            child.send_signal(signal.SIGKILL)

    def _hung(self) -> str:
        task = self._task
        late = task is not None and time.monotonic() - task.since > task.seconds
        return f"{task.what} has got no further for {duration_text(task.seconds)}" if task is not None and late else ""

    def _monitor(self) -> None:
        while not self._stopped.wait(_MONITOR_SECONDS):
            if self._caller not in (None, os.getppid()):
                self._caller = None
                os.kill(os.getpid(), signal.SIGTERM)  # stops the run where it can be continued; its caller is gone
            if (task := self._task) is not None and (stopped := _stopped_by(task)):
                self._end(f"stopped by {stopped} in {task.what}", status=INTERRUPTED)
            elif hung := self._hung():
                faulthandler.dump_traceback(all_threads=True)
                self._end(hung)
            elif (lost := self.lost_process()) and not self._stopped.wait(_GRACE_SECONDS):
                self._end(lost)

    def _end(self, why: str, status: int = FAILED) -> None:
        start = ERASE_LINE if sys.stderr.isatty() else ""  # in place of a progress line
        print(f"{start}error: {self._process}: {why}; {CONTINUES}", file=sys.stderr, flush=True)
        if self._save is not None:
            saver = threading.Thread(target=self._save, daemon=True)
            saver.start()
            saver.join(_SAVE_SECONDS)
        # This process may wait where Python does not handle Ctrl-C.
        status = INTERRUPTED if any(child.poll() == INTERRUPTED for child in self._children) else status
        self.kill_children()
        os._exit(status)


@contextmanager
def _signal_numbers() -> Iterator[int | None]:
    """A file descriptor to which the number of each signal is written as it comes; None outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def _stopped_by(task: _Task) -> str:
    """The signal that has come in a task that may be stopped at any moment; empty if none has."""
    if task.signals is None:
        return ""
    try:
        numbers = os.read(task.signals, 64)
    except OSError:  # none has come, or the task has just ended
        return ""
    stopping = {signal.SIGINT, *(signal.Signals[f"SIG{name}"] for name in SCHEDULER_SIGNALS)}
    return next((signal.Signals(number).name for number in numbers if number in stopping), "")


class _Peers(threading.Thread):
    """Heartbeats: every rank counts up a number of its own; rank 0 checks all of them, the others check rank 0's."""

    def __init__(self, store: Any, rank: int, world_size: int, seconds: float, stopped: threading.Event) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._rank, self._seconds, self._stopped = store.clone(), rank, seconds, stopped
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
                self._store.set(self._key(self._rank), str(beats))
                for rank in self._changed:
                    self._read(rank)
            self._store.set(self._key(self._rank), _DONE)
        except RuntimeError as error:
            self._lost = f"process 0 is gone ({str(error).splitlines()[0]})"

    def lost(self) -> str:
        """The process without a heartbeat; empty if there is none."""
        for rank, since in self._changed.items():
            if self._last.get(rank) != _DONE and time.monotonic() - since > self._seconds:
                return f"process {rank} has sent no heartbeat for {duration_text(self._seconds)}"
        return self._lost

    def _read(self, rank: int) -> None:
        if self._store.check([self._key(rank)]) and (value := self._store.get(self._key(rank))) != self._last.get(rank):
            self._last[rank], self._changed[rank] = value, time.monotonic()

    @staticmethod
    def _key(rank: int) -> str:
        return f"lorafair/alive/{rank}"


# The watchdog of this process, if it has one.
_watchdog: Watchdog | None = None


def start_watchdog(process: str, children: Sequence[Popen[Any]] = (), *, is_child: bool = False) -> Watchdog:
    """Start the watchdog of this process."""
    global _watchdog
    _watchdog = Watchdog(process, children, is_child=is_child)
    return _watchdog


@contextmanager
def deadline(what: str, minutes: float | None) -> Iterator[None]:
    """As `Watchdog.deadline`, if this process has a watchdog; in minutes, as options are."""
    if _watchdog is None:
        yield
    else:
        with _watchdog.deadline(what, None if minutes is None else 60 * minutes):
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


def stop_watchdog() -> str:
    """Stop the watchdog; returns which other process is lost, if that is known."""
    global _watchdog
    if _watchdog is None:
        return ""
    watchdog, _watchdog = _watchdog, None
    lost = watchdog.lost_process()
    watchdog.stop()
    return lost

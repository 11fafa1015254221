"""Ends this process, with a line that says why, where waiting is of no use: a client hangs, or a process is gone.

Without it a collective would wait for minutes for a process that is stopped or whose node is dead, and for a client
that hangs for ever. One thread looks once a second; another one talks to the process group's store, where it may get
stuck itself. Both end with the process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from signal import SIGKILL, Signals
from subprocess import Popen
from typing import Any

from lorafair.cluster.signals import FAILED, INTERRUPTED
from lorafair.console import duration_text

CONTINUES = "what is saved stays, and the same command continues from it"
_MONITOR_SECONDS = 1.0
_HEARTBEAT_SECONDS = 2.0
_GRACE_SECONDS = 3.0  # in which a process that already ends by itself tells better why
_SAVE_SECONDS = 20.0  # a device that hangs gives nothing back
_DONE = b"done"
_PARENT = "LORAFAIR_STARTED_BY"  # the number of a process, for those that it starts


@dataclass
class _Task:
    what: str
    seconds: float
    since: float  # of its last step, on the monotonic clock


class Watchdog:
    """The threads that watch over a process; `stop` them before it ends in good order."""

    def __init__(self, process: str, children: Sequence[Popen[Any]] = (), *, is_child: bool = False) -> None:
        self._process, self._children = process, children
        # From the environment: a parent that is gone by now is not os.getppid() any more.
        self._parent = int(os.environ.get(_PARENT, os.getppid())) if is_child else None
        os.environ[_PARENT] = str(os.getpid())
        self._task: _Task | None = None
        self._save: Callable[[], None] | None = None
        self._peers: _Peers | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._monitor, name="watchdog", daemon=True).start()

    def watch_peers(self, store: Any, rank: int, world_size: int, seconds: float) -> None:
        """Exchange signs of life with the other ranks through a store of PyTorch's, and give up after `seconds`."""
        self._peers = _Peers(store, rank, world_size, seconds, self._stopped)

    def stop(self) -> None:
        """Look no longer."""
        self._stopped.set()
        if self._peers is not None:
            self._peers.join(timeout=2 * _HEARTBEAT_SECONDS)

    @contextmanager
    def deadline(self, what: str, seconds: float | None) -> Iterator[None]:
        """In the block, `heartbeat` is called at least every so many seconds (None: whenever it likes)."""
        outer = self._task
        self._task = None if seconds is None else _Task(what, seconds, time.monotonic())
        try:
            yield
        finally:
            self._task = outer
            self.heartbeat()

    def heartbeat(self) -> None:
        """What is expected gets on."""
        if self._task is not None:
            self._task.since = time.monotonic()

    @contextmanager
    def saving(self, save: Callable[[], None]) -> Iterator[None]:
        """If the process is ended in the block, save first what is done."""
        self._save = save
        try:
            yield
        finally:
            self._save = None

    def lost_process(self) -> str:
        """Which other process of the run is gone; empty if none is known to be."""
        if self._parent not in (None, os.getppid()):
            return "the process that has started this one is gone"
        for number, child in enumerate(self._children, start=1):
            if status := child.poll():
                if status == INTERRUPTED:
                    return f"process {number} was stopped by Ctrl-C"
                how = f"was ended by {Signals(-status).name}" if status < 0 else f"has failed with status {status}"
                return f"process {number} {how}"
        return self._peers.lost() if self._peers is not None else ""

    def kill_children(self) -> None:
        """End the processes that this one has started, which may be stuck."""
        for child in self._children:
            child.send_signal(SIGKILL)

    def _hung(self) -> str:
        task = self._task
        late = task is not None and time.monotonic() - task.since > task.seconds
        return f"{task.what} has got no further for {duration_text(task.seconds)}" if task is not None and late else ""

    def _monitor(self) -> None:
        while not self._stopped.wait(_MONITOR_SECONDS):
            if hung := self._hung():
                faulthandler.dump_traceback(all_threads=True)
                self._end(hung)
            elif (lost := self.lost_process()) and not self._stopped.wait(_GRACE_SECONDS):
                self._end(lost)

    def _end(self, why: str) -> None:
        print(f"error: {self._process}: {why}; {CONTINUES}", file=sys.stderr, flush=True)
        if self._save is not None:
            saver = threading.Thread(target=self._save, daemon=True)
            saver.start()
            saver.join(_SAVE_SECONDS)
        # This process may wait where Python hears of no Ctrl-C.
        status = INTERRUPTED if any(child.poll() == INTERRUPTED for child in self._children) else FAILED
        self.kill_children()
        os._exit(status)


class _Peers(threading.Thread):
    """Signs of life: every rank counts up a number of its own; rank 0 looks at all of them, the others at rank 0's."""

    def __init__(self, store: Any, rank: int, world_size: int, seconds: float, stopped: threading.Event) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._rank, self._seconds, self._stopped = store.clone(), rank, seconds, stopped
        self._store.set_timeout(timedelta(seconds=seconds))
        self._changed = dict.fromkeys(range(1, world_size) if rank == 0 else [0], time.monotonic())
        self._last: dict[int, bytes] = {}
        self._lost = ""
        self.start()

    def run(self) -> None:
        """Exchange signs of life until the watchdog is stopped, or the store, which rank 0 keeps, is gone."""
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
        """Who has been silent for too long; empty if nobody has."""
        for rank, since in self._changed.items():
            if self._last.get(rank) != _DONE and time.monotonic() - since > self._seconds:
                return f"process {rank} has given no sign of life for {duration_text(self._seconds)}"
        return self._lost

    def _read(self, rank: int) -> None:
        if self._store.check([self._key(rank)]) and (value := self._store.get(self._key(rank))) != self._last.get(rank):
            self._last[rank], self._changed[rank] = value, time.monotonic()

    @staticmethod
    def _key(rank: int) -> str:
        return f"lorafair/alive/{rank}"


# The watchdog of this process, where there is one: what it watches does not have to know.
_watchdog: Watchdog | None = None


def start_watchdog(process: str, children: Sequence[Popen[Any]] = (), *, is_child: bool = False) -> Watchdog:
    """Begin to watch over this process."""
    global _watchdog
    _watchdog = Watchdog(process, children, is_child=is_child)
    return _watchdog


@contextmanager
def deadline(what: str, minutes: float | None) -> Iterator[None]:
    """As `Watchdog.deadline`, where this process is watched over; in minutes, as options are."""
    if _watchdog is None:
        yield
    else:
        with _watchdog.deadline(what, None if minutes is None else 60 * minutes):
            yield


@contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """As `Watchdog.saving`, where this process is watched over."""
    if _watchdog is None:
        yield
    else:
        with _watchdog.saving(save):
            yield


def heartbeat() -> None:
    """As `Watchdog.heartbeat`, where this process is watched over."""
    if _watchdog is not None:
        _watchdog.heartbeat()


def stop_watchdog() -> str:
    """End what `start_watchdog` has begun; returns which other process is gone, if that is known."""
    global _watchdog
    if _watchdog is None:
        return ""
    watchdog, _watchdog = _watchdog, None
    lost = watchdog.lost_process()
    watchdog.stop()
    return lost

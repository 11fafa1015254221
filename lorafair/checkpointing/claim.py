"""The run directory of a run in progress, for all ranks: rank 0 holds it, and every rank sees it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorafair.checkpointing.checkpoint import make_run_dir
from lorafair.checkpointing.lock import LOCK, RunLock, acquire
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.errors import ConfigError
from lorafair.files.writing import naming

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SECONDS_UNTIL_SEEN = 30.0  # nodes keep what they know of a network file system for some seconds
_SECONDS_BETWEEN_LOOKS = 0.2


@contextmanager
def holding(fabric: Fabric, run_dir: Path, lock: RunLock | None = None) -> Iterator[RunLock | None]:
    """Hold a run directory for the block, unless the caller holds it by `lock`; yields the lock on rank 0.

    Raises LorafairError on all ranks where another process has it, or a rank does not see it.
    """
    with ExitStack() as stack:
        with same_error_on_all_ranks(fabric):
            if fabric.is_global_zero and lock is None:
                make_run_dir(run_dir)
                lock = acquire(run_dir)
                stack.callback(lock.release)
        if fabric.world_size > 1:
            check_shared(fabric, run_dir, lock)
        yield lock


def check_shared(fabric: Fabric, run_dir: Path, lock: RunLock | None) -> None:
    """See that every rank sees the directory that rank 0 writes to. Raises LorafairError on all ranks."""
    name: str = fabric.broadcast(f".{LOCK}.seen_by_all.{lock.holder.token}" if lock else "")
    mark = run_dir / name
    try:
        with same_error_on_all_ranks(fabric):
            if fabric.is_global_zero:
                with naming(mark):
                    mark.touch()
        with same_error_on_all_ranks(fabric):
            if not fabric.is_global_zero and not _is_seen(mark):
                raise ConfigError(
                    f"process {fabric.global_rank} on {socket.gethostname()} does not see what process 0 writes to "
                    f"run_dir={run_dir}; choose a run_dir on a disk that all nodes share, as an absolute path"
                )
    finally:
        if fabric.is_global_zero:
            mark.unlink(missing_ok=True)


def _is_seen(mark: Path) -> bool:
    until = time.monotonic() + SECONDS_UNTIL_SEEN
    while not mark.exists():
        if time.monotonic() > until:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        for folder in (mark.parent.parent, mark.parent):  # listing one has its content asked for again
            with contextlib.suppress(OSError):  # it may be entered and not listed
                os.listdir(folder)
    return True

"""Large arrays in files: filled once by the ranks of a node together, found again by later runs, mapped into memory.

A file is a .npy with the CRC-32 of every part of the array behind it. It is written aside, flushed and renamed, so that
what has the final name is complete; that nothing has happened to it since is checked whenever a run begins to use it.

Letters: N rows, U parts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafair.cluster.saved import note_saved
from lorafair.cluster.signals import NO_REASON, Interrupted, stop_requested
from lorafair.cluster.watchdog import heartbeat
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.collectives import on_all_ranks, smallest_over_ranks
from lorafair.console import EVERY_RANK, Progress, log
from lorafair.data.loading import Indices
from lorafair.errors import ConfigError
from lorafair.files.cache import CacheError, cache_dir

if TYPE_CHECKING:
    from lightning_fabric import Fabric


GIGABYTE = 1e9
UNUSED_DAYS = 30
_THREADS = 8  # reading to check, which waits for a network file system
_ABSENT, _DAMAGED, _GOOD = range(3)


@dataclass(frozen=True)
class SharedArray:
    """An array (N, ...) in a file, checked and filled in parts of so many rows."""

    file: Path
    shape: tuple[int, ...]
    dtype: type[np.generic]
    rows: int

    @property
    def parts(self) -> list[Indices]:
        """The rows of each of the U parts."""
        return [np.arange(i, min(i + self.rows, self.shape[0])) for i in range(0, self.shape[0], self.rows)]

    @property
    def bytes(self) -> int:
        """Size of the array."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def create(self, file: Path) -> None:
        """An empty file of this layout, whose blocks are reserved: a mapped page without one would kill the process.

        Raises CacheError where there is no room.
        """
        array = np.lib.format.open_memmap(file, mode="w+", dtype=self.dtype, shape=self.shape)
        size = array.offset + self.bytes + 4 * len(self.parts)
        with file.open("r+b") as created:
            try:
                created.truncate(size)
                if sys.platform == "linux":
                    os.posix_fallocate(created.fileno(), 0, size)
            except OSError as error:
                raise CacheError(
                    f"{file.parent} has no room for {size / GIGABYTE:.1f} GB ({error.strerror}); make room, set "
                    "XDG_CACHE_HOME to another folder, or data.cache and model.prefix_cache to never"
                ) from error

    def open(self, file: Path, mode: Any = "r") -> tuple[np.memmap[Any, Any], np.memmap[Any, Any]]:
        """The array (N, ...) and its sums (U,). Raises ValueError or OSError where the file is not of this layout."""
        array = np.lib.format.open_memmap(file, mode=mode)
        size = array.offset + self.bytes + 4 * len(self.parts)
        if (array.shape, array.dtype, file.stat().st_size) != (self.shape, np.dtype(self.dtype), size):
            raise ValueError(f"{array.dtype} {array.shape} in {file.stat().st_size} bytes, not {size}")
        sums = np.memmap(file, dtype=np.uint32, mode=mode, offset=array.offset + self.bytes, shape=(len(self.parts),))
        return array, sums

    def fault(self, some: slice = slice(None)) -> str:
        """What is wrong with the file, looking at some of its parts; empty if nothing is."""
        try:
            array, sums = self.open(self.file)
        except ValueError as error:
            return str(error)
        parts = list(enumerate(self.parts))[some]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda part: _sum(array[part[1][0] : part[1][-1] + 1]), parts)
            wrong = [u for (u, _), checksum in zip(parts, found, strict=True) if checksum != sums[u]]
        return f"checksum of rows {self.rows * wrong[0]} to {self.parts[wrong[0]][-1]} differs" if wrong else ""


def build_together(
    fabric: Fabric, array: SharedArray, fill: Callable[[Sequence[Indices]], Iterator[NDArray[Any]]], what: str
) -> Path:
    """The file of `array`, found undamaged, or filled by the ranks of each node together. Call on every rank.

    `fill(parts)` yields the rows of each of these index arrays, in order. `what` is being made, for the progress line.
    Raises Interrupted on every rank where a signal asks to stop.
    """
    mine = slice(fabric.local_rank, None, int(getattr(fabric.strategy, "num_processes", 1)))  # of the parts
    state = _ABSENT
    with same_error_on_all_ranks(fabric):
        state = _state(array, mine)
    state = smallest_over_ranks(fabric, state)  # all ranks act alike: building has barriers
    if state != _GOOD:
        unique = fabric.broadcast(uuid.uuid4().hex)  # another run may build the same on this node
        partial = array.file.with_name(f"{array.file.stem}.{socket.gethostname()}.{unique}.partial")
        try:
            with same_error_on_all_ranks(fabric):
                if fabric.local_rank == 0:
                    _remove_unused(array.file.parent)
                    if state == _DAMAGED:
                        array.file.unlink(missing_ok=True)
                    array.create(partial)
            full = False
            with same_error_on_all_ranks(fabric) as agreed:
                full = _fill(array, partial, mine, fill, what)
            if not on_all_ranks(fabric, full):
                raise Interrupted(agreed.stop, f"before the first round, while {what}: that begins anew")
            with same_error_on_all_ranks(fabric):
                if fabric.local_rank == 0:
                    _keep(partial, array.file)
        finally:
            if fabric.local_rank == 0:
                partial.unlink(missing_ok=True)
    with contextlib.suppress(PermissionError):  # another user's
        os.utime(array.file)  # in use: not to be removed
    return array.file


def cache_folder(name: str, instead: str) -> Path:
    """`cache_dir()/name`, made if need be. ConfigError where that cannot be, which proposes `instead`."""
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written, or "
            f"{instead}"
        ) from error
    return folder


def lack_of_room(array: SharedArray, limit_gb: float, key: str) -> str:
    """Why an array is too large for the limit set by `key`, or for the disk; empty if it is not."""
    folder, needed = array.file.parent, array.bytes / GIGABYTE
    free = shutil.disk_usage(folder).free / GIGABYTE
    if needed > limit_gb:
        return f"it needs {needed:.1f} GB and {key}={limit_gb:g}"
    if needed > 0.9 * free:
        return f"it needs {needed:.1f} GB and {folder} has {free:.1f} GB free"
    return ""


def _sum(rows: NDArray[Any]) -> int:
    heartbeat()
    return zlib.crc32(np.ascontiguousarray(rows).data)


def _state(array: SharedArray, some: slice) -> int:
    if not array.file.exists():
        return _ABSENT
    fault = array.fault(some)
    if fault:
        log.warning(f"{array.file} is damaged ({fault}); it is made again", extra=EVERY_RANK)
    return _DAMAGED if fault else _GOOD


def _fill(
    array: SharedArray,
    partial: Path,
    some: slice,
    fill: Callable[[Sequence[Indices]], Iterator[NDArray[Any]]],
    what: str,
) -> bool:
    """Fill some of the parts; returns whether all of it is done, which it is not where a signal asks to stop."""
    target, sums = array.open(partial, "r+")
    parts, mine = array.parts, list(range(len(array.parts)))[some]
    progress = Progress(what, array.shape[0], "images")
    for u, values in zip(mine, fill([parts[u] for u in mine]), strict=True):
        if stop_requested() != NO_REASON:
            return False
        target[parts[u][0] : parts[u][-1] + 1] = values
        sums[u] = _sum(values)
        if progress.is_due:
            progress.show(min(int(np.count_nonzero(sums)) * array.rows, array.shape[0]))  # by all ranks of the node
    progress.close()
    target.flush()
    sums.flush()
    return True


def _keep(partial: Path, file: Path) -> None:
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    if not file.exists():  # another run may read it already; on a network file system a replaced file is lost to it
        os.replace(partial, file)
    note_saved()


def _remove_unused(folder: Path) -> None:
    """Remove files unused for so long that no job needs them: on a network file system an open file can vanish."""
    for file in folder.iterdir():
        days = 1 if file.suffix == ".partial" else UNUSED_DAYS
        with contextlib.suppress(FileNotFoundError):  # another run removes it too
            if time.time() - file.stat().st_mtime > days * 86400:
                file.unlink()

"""The cache folder: what is fetched or built once and kept, so that later runs need no network.

Everything lies below `cache_dir()`. A folder there is either complete or absent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lorafair.console import EVERY_RANK, log
from lorafair.errors import LorafairError
from lorafair.files.writing import fsync

_ONE_DAY = 86400.0  # seconds
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


class CacheError(LorafairError):
    """The cache folder cannot be written."""


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/lorafair, or ~/.cache/lorafair; it need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lorafair"
    except RuntimeError as error:
        raise CacheError("there is no home folder to cache data in; set XDG_CACHE_HOME to a folder") from error


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `cache_dir()/name`, filled by `build(folder)` on first use.

    `build` gets an empty sibling folder, which is renamed when all of it is on the disk; a build that fails or is
    interrupted leaves nothing under the name. Processes of one machine wait for each other; where file locks do not
    reach (another node of a cluster), both build and the first to finish wins.

    Raises CacheError where the cache cannot be written, and whatever `build` raises.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    with _cache_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{name}.lock")):
            if not target.is_dir():
                _build(target, build)
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    _remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    partial.mkdir()  # not tempfile.mkdtemp: a shared cache keeps the permissions that the umask gives
    log.info(f"building {target} (once)", extra=EVERY_RANK)
    try:
        build(partial)
        _flush(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another node was faster; its folder has the same content
                raise
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Delete what killed builds left. Only after a day: another node may be building, unseen by the lock."""
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _ONE_DAY:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then both build
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cache_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise CacheError(
            f"{target} cannot be written ({error.strerror or error}); set XDG_CACHE_HOME to a folder with room for it"
        ) from error


def _flush(folder: Path) -> None:
    """Force all files to the disk, so that the rename cannot overtake their content in a crash."""
    for where, _, files in os.walk(folder):
        for file in files:
            fsync(Path(where, file))
        fsync(Path(where))

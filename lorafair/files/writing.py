"""Files that are whole at all times: written aside, forced to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafair.errors import LorafairError

_OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
}  # fmt: skip


class UnwritableFile(LorafairError, OSError):
    """A file cannot be written: no space, no right, a disk that fails. It is an OSError for those who handle them."""

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(f"{path} cannot be written: {os.strerror(cause.errno or errno.EIO)}")
        self.errno = cause.errno


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """In the block `path` is written: an error of the disk, which often names no file, is raised as UnwritableFile."""
    try:
        yield
    except UnwritableFile:
        raise
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise UnwritableFile(path, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the block it is forced to the disk and takes the place of `path`.

    Where the block fails, `path` stays as it was and what was written is removed. Raises OSError, which is an
    UnwritableFile where the disk is full or fails.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            yield partial
            fsync(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to raise
                partial.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees the old file or the new one. Raises OSError as `replacing` does."""
    with replacing(path) as partial:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            partial.write_text(content, encoding="utf-8")


def open_to_others(path: Path) -> None:
    """Give a file the rights of every new file (umask): safetensors makes its own readable by the owner alone."""
    mask = os.umask(0o077)  # it can only be read by being set
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

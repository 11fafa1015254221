"""A node's own copy of the files that every batch is read from, where its disk is faster than the shared one."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.console import EVERY_RANK, log
from lorafair.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def staging_folder(setting: str, environ: Mapping[str, str]) -> Path | None:
    """Where data.stage asks copies to be on this node; None for auto without $SLURM_TMPDIR and $TMPDIR."""
    base = (environ.get("SLURM_TMPDIR") or environ.get("TMPDIR")) if setting == "auto" else setting
    return Path(base, f"lorafair-{os.getuid()}") if base else None  # /tmp may be shared by all users


def staged(fabric: Fabric, file: Path, setting: str | None) -> Path:
    """The copy of `file` on this node, made by its first rank if it is not there yet; `file` if there is no room.

    Raises ConfigError where the folder cannot be written for another reason. Call on every rank.
    """
    if setting is None:
        return file
    folder = staging_folder(setting, os.environ)
    with same_error_on_all_ranks(fabric):
        if fabric.local_rank == 0 and folder is not None and not _is_copy(folder / file.name, file):
            _copy(file, folder, setting)
    return folder / file.name if folder is not None and _is_copy(folder / file.name, file) else file


def _is_copy(copy: Path, file: Path) -> bool:
    return copy.is_file() and copy.stat().st_size == file.stat().st_size  # the name follows from the content


def _copy(file: Path, folder: Path, setting: str) -> None:
    size, host = file.stat().st_size, socket.gethostname()
    partial = folder / f"{file.name}.{uuid.uuid4().hex}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB are free")
        shutil.copyfile(file, partial)
        with partial.open("rb") as copied:
            os.fsync(copied.fileno())
        if partial.stat().st_size != size:
            raise OSError(errno.ENOSPC, f"only {partial.stat().st_size:,} of {size:,} bytes arrived")
        os.replace(partial, folder / file.name)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise ConfigError(
                f"data.stage={setting}: {folder} cannot be written on {host} ({error.strerror}); give a folder on the "
                "nodes' own disks, auto, or null"
            ) from error
        log.info(
            f"staging skipped on {host}: {size / 1e9:.1f} GB do not fit into {folder} ({error.strerror}); using {file}",
            extra=EVERY_RANK,
        )
    else:
        log.info(f"staged on {host}: {folder / file.name} ({size / 1e9:.1f} GB)", extra=EVERY_RANK)
    finally:
        if partial.exists():
            partial.unlink()

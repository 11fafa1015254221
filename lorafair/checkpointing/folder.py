"""The folder of a run's checkpoints: which entries are the run's, what is set aside, and what killed runs leave."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

from lorafair.console import log
from lorafair.errors import LorafairError

FOLDER = "checkpoints"
ROUND, UNFINISHED = "round_", "unfinished_"
_NUMBER = r"(\d{6}|[1-9]\d{6,})"
_SET_ASIDE = re.compile(rf"{ROUND}{_NUMBER}\.(damaged|later|replaced)(\.\d+)?")
_LEFT_OVER = re.compile(rf"\.{ROUND}{_NUMBER}\.partial")


class CheckpointError(LorafairError):
    """A checkpoint cannot be written, read, or does not belong to this run."""


def numbered(run_dir: Path, prefix: str) -> dict[int, Path]:
    """The folders with exactly the names that a run gives them, by the number in it, in its order."""
    pattern, found = re.compile(f"{prefix}{_NUMBER}"), {}
    for entry in entries(run_dir / FOLDER):
        if (match := pattern.fullmatch(entry.name)) and (entry.is_symlink() or entry.is_dir()):
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint, so that it is neither used nor overwritten; returns where it is."""
    aside = free_name(path, why)
    path.rename(aside)
    return aside


def free_name(path: Path, why: str) -> Path:
    """<name>.<why>, or <name>.<why>.2 and so on: the first that is not taken."""
    names = itertools.chain([f"{path.name}.{why}"], (f"{path.name}.{why}.{n}" for n in itertools.count(2)))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


def tidy(run_dir: Path) -> None:
    """Remove checkpoints that a killed run has not written to the end; name what looks like one of ours and is not."""
    ours = {*numbered(run_dir, ROUND).values(), *numbered(run_dir, UNFINISHED).values()}
    others = []
    for entry in entries(run_dir / FOLDER):
        if _LEFT_OVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif entry not in ours and not _SET_ASIDE.fullmatch(entry.name) and entry.name.startswith((ROUND, UNFINISHED)):
            others.append(entry.name)
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        log.warning(f"{run_dir / FOLDER}: {shown}: not the name of a checkpoint, so neither read nor removed")


def entries(folder: Path) -> list[Path]:
    """What a folder holds, in its order; unlike `glob`, a LorafairError where that cannot be known now."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable_now(folder, error.strerror or str(error)) from error


def unreadable_now(path: Path, why: str) -> CheckpointError:
    """Of what may be right, so that nothing is taken in place of it."""
    return CheckpointError(
        f"{path} cannot be read now ({why}); nothing was changed, and the same command continues once it can"
    )

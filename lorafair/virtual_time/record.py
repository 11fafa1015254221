"""The work of every round, as a run records it: which clients, how many images, how many bytes. One JSON line a round.

Everything but the measured seconds of the server is the same on any number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorafair.console import format_count, log
from lorafair.errors import ConfigError
from lorafair.files.writing import naming, replacing

WORK_FILE = "work.jsonl"


@dataclass(frozen=True)
class RoundWork:
    """What the clients and the server of one round have done."""

    round: int  # from 1
    clients: tuple[int, ...]  # (K,) whose update was aggregated, or was not finite
    images: tuple[int, ...]  # (K,) visited by each in local training
    down: tuple[int, ...]  # (K,) bytes that each received
    up: tuple[int, ...]  # (K,) bytes that each sent
    late: tuple[int, ...]  # (L,) clients that were asked and were late
    late_images: tuple[int, ...]  # (L,) as `images`
    late_down: tuple[int, ...]  # (L,) as `down`
    late_up: tuple[int, ...]  # (L,) what each would have sent
    waited: float | None  # the deadline in virtual seconds, where the server waited until then
    classes: int  # of the head
    server_seconds: float  # measured, of the server step

    @property
    def bytes(self) -> int:
        """What has travelled. The upload of late clients does not count: the server does not take it."""
        return sum(self.down) + sum(self.up) + sum(self.late_down)

    def to_line(self) -> str:
        """As JSON; a list of equal numbers as one of them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        short = {
            n: _short(v) if n not in ("clients", "late") and isinstance(v, tuple) else v for n, v in values.items()
        }
        absent = [name for name in short if name.startswith("late") and not values["late"]]
        return json.dumps({n: v for n, v in short.items() if n not in absent and v is not None})

    @staticmethod
    def of_line(line: str) -> RoundWork:
        """From `to_line`. Raises ValueError, KeyError or TypeError for anything else."""
        found: dict[str, Any] = {"late": [], "late_images": [], "late_down": [], "late_up": [], "waited": None}
        found |= json.loads(line)
        for name, clients in (
            ("images", "clients"), ("down", "clients"), ("up", "clients"), ("late_images", "late"),
            ("late_down", "late"), ("late_up", "late"),
        ):  # fmt: skip
            count, value = len(found[clients]), found[name]
            found[name] = tuple(map(int, value)) if isinstance(value, list) else (int(value),) * count
            if len(found[name]) != count:
                raise ValueError(f"{name} has {len(found[name])} numbers for {count} clients")
        found["clients"], found["late"] = tuple(map(int, found["clients"])), tuple(map(int, found["late"]))
        return RoundWork(**{f.name: found[f.name] for f in fields(RoundWork)})


def _short(values: Sequence[int]) -> int | list[int]:
    return values[0] if values and len(set(values)) == 1 else list(values)


class WorkFile:
    """Written a line a round. A continued run keeps the lines of the rounds that are done, and no others."""

    def __init__(self, run_dir: Path, completed_rounds: int) -> None:
        self._path = run_dir / WORK_FILE
        kept = _lines_of(self._path, completed_rounds) if completed_rounds else []
        with replacing(self._path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, work: RoundWork) -> None:
        """Add a round. Raises UnwritableFile."""
        with naming(self._path):
            self._file.write(f"{work.to_line()}\n")
            self._file.flush()

    def close(self) -> None:
        """Close it. Raises UnwritableFile."""
        with naming(self._path):
            self._file.close()


def _lines_of(path: Path, completed_rounds: int) -> list[str]:
    """The lines of the rounds that are done. A file that is damaged is kept aside, which is said."""
    if not path.exists():  # of an older version, or of another directory whose checkpoint is continued
        return []
    *lines, _ = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    found, unreadable = {}, 0
    for line in lines:
        try:
            work = RoundWork.of_line(line)
        except (ValueError, KeyError, TypeError):
            unreadable += 1
        else:
            found[work.round] = line
    if unreadable:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, aside)
        log.warning(f"{path}: {format_count(unreadable, 'line')} cannot be read; the file is kept as {aside.name}")
    return [line for round, line in sorted(found.items()) if round <= completed_rounds]


def has_work(run_dir: Path) -> bool:
    """Whether the run has recorded the work of all rounds so far. `read_work` says why not."""
    try:
        return bool(read_work(run_dir))
    except ConfigError:
        return False


def read_work(run_dir: Path) -> list[RoundWork]:
    """The work of all rounds since round 1, in their order. ConfigError where some of it is not there."""
    path = run_dir / WORK_FILE
    again = f"remove {run_dir} to repeat the run"
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} has recorded no work ({WORK_FILE}): an older version of lorafair made it; {again}"
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is being written
        works = [RoundWork.of_line(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {again}") from error
    missing = sorted({*range(1, max((w.round for w in works), default=0) + 1)} - {w.round for w in works})
    if missing:
        rounds = format_count(len(missing), "round")
        raise ConfigError(
            f"{path} has no work of {rounds}, the first is {missing[0]}: an older version of lorafair began the run, "
            f"or another directory has them; {again}"
        )
    return sorted(works, key=lambda work: work.round)

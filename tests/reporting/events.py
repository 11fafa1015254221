"""What TensorBoard reads of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader


def values_of(run_dir: Path) -> Iterator[tuple[int, Any]]:
    """(step, value) of everything in the one event file of a run."""
    (file,) = run_dir.glob("*tfevents*")
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            yield event.step, value


def steps_of(run_dir: Path) -> dict[str, list[int]]:
    """The steps of each tag."""
    steps: dict[str, list[int]] = {}
    for step, value in values_of(run_dir):
        steps.setdefault(value.tag, []).append(step)
    return steps

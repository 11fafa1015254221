"""The file of a comparison's folder that says what was compared. Nothing heavy is imported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafair.comparison.draws import Draws
from lorafair.comparison.plan import Comparison, Options, Tuning
from lorafair.errors import ConfigError
from lorafair.files.writing import write_atomically

RECORD_FILE = "comparison.json"


@dataclass(frozen=True)
class Record:
    """What was compared, as the folder tells."""

    methods: Mapping[str, Options]
    settings: Mapping[str, Options]
    seeds: tuple[int, ...]
    baseline: str
    tuning: Tuning | None = None
    draws: Draws | None = None
    decision_level: float | None = None
    profiles: tuple[str, ...] = ()
    targets: tuple[float, ...] = ()


def write_record(comparison: Comparison) -> None:
    """Write what is compared into the comparison's folder."""
    content: dict[str, Any] = {
        "methods": comparison.methods,
        "settings": comparison.settings,
        "seeds": comparison.seeds,
        "baseline": comparison.baseline,
    }
    if comparison.draws is not None:
        content |= {"draws": dataclasses.asdict(comparison.draws), "decision_level": comparison.decision_level}
    if comparison.profiles:
        content |= {"profiles": comparison.profiles, "targets": comparison.targets}
    write_atomically(comparison.folder / RECORD_FILE, json.dumps(content, indent=1, default=str) + "\n")


def read_record(folder: Path) -> Record | None:
    """What was compared; None where the folder is none of a comparison. ConfigError where it cannot be read."""
    file = folder / RECORD_FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        methods, settings = dict(content["methods"]), dict(content["settings"])
        record = Record(methods, settings, tuple(map(int, content["seeds"])), str(content["baseline"]))
        if "draws" in content:
            level = content["decision_level"]
            record = dataclasses.replace(record, draws=Draws(**content["draws"]), decision_level=level)
        profiles, targets = tuple(map(str, content.get("profiles", ()))), tuple(map(float, content.get("targets", ())))
        record = dataclasses.replace(record, profiles=profiles, targets=targets)
        if record.baseline not in methods or not all("method.name" in options for options in methods.values()):
            raise ValueError("it is not the record of a comparison")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); lorafair compare FILE --report writes it anew") from error
    return record

"""The files of a run directory: what they are called, and how they are read back. Nothing heavy is imported."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from lorafair.errors import ConfigError

CONFIG_FILE, METRICS_FILE, RESULT_FILE = "config.yaml", "metrics.csv", "result.json"
VERSION_LINE = "# lorafair "  # the first line of config.yaml begins with it

Curve = dict[int, float]  # round -> value


def read_result(run_dir: Path) -> dict[str, Any]:
    """The result of a finished run. ConfigError where there is none, or it cannot be read."""
    file = run_dir / RESULT_FILE
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"rounds", "mean_accuracy", "versions"} <= result.keys():
            raise ValueError("it is not the result of a run")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove {run_dir} to repeat the run") from error
    return result


def read_metrics(run_dir: Path) -> dict[str, Curve]:
    """The scalars of a run by name and round. ConfigError where metrics.csv cannot be read."""
    metrics: dict[str, Curve] = {}
    try:
        with (run_dir / METRICS_FILE).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                metrics.setdefault(row["name"], {})[int(row["round"])] = float(row["value"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{run_dir / METRICS_FILE} cannot be read ({error}); remove {run_dir} to repeat the run"
        ) from error
    return metrics


def version_of(run_dir: Path) -> str | None:
    """The version of lorafair that began the run; None where there is no run."""
    file = run_dir / CONFIG_FILE
    if not file.exists():
        return None
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix(VERSION_LINE) if first.startswith(VERSION_LINE) else "an unknown version"

"""The files of a run directory: what they are called, and how they are read back. Nothing heavy is imported."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafair.config.layers import VERSION_LINE
from lorafair.errors import ConfigError
from lorafair.files.writing import write_atomically

CONFIG_FILE, METRICS_FILE, RESULT_FILE = "config.yaml", "metrics.csv", "result.json"

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Curve = dict[int, float]  # round -> value


def write_result_file(run_dir: Path, result: dict[str, Any]) -> None:
    """Write result.json, in strict JSON: NaN and infinity, which it does not have, as the texts NaN and Infinity."""
    write_atomically(run_dir / RESULT_FILE, json.dumps(_mapped(result, _as_text), indent=1, default=str) + "\n")


def read_result(run_dir: Path) -> dict[str, Any]:
    """The result of a finished run. ConfigError where there is none, or it cannot be read."""
    file = run_dir / RESULT_FILE
    try:
        result = _mapped(json.loads(file.read_text(encoding="utf-8")), _as_number)
        if not isinstance(result, dict) or not {"rounds", "mean_accuracy", "versions"} <= result.keys():
            raise ValueError("it is not the result of a run")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove {run_dir} to repeat the run") from error
    return result


def read_metrics(run_dir: Path, *, in_progress: bool = False) -> dict[str, Curve]:
    """The scalars of a run by name and round. ConfigError where metrics.csv cannot be read.

    `in_progress`: the run may write to it, so a last line that is cut is left out.
    """
    metrics: dict[str, Curve] = {}
    try:
        content = (run_dir / METRICS_FILE).read_text(encoding="utf-8")
        if in_progress:
            content = content[: content.rfind("\n") + 1] or "\n"
        if not content.endswith("\n"):
            raise ValueError("its last line is cut")
        for row in csv.DictReader(io.StringIO(content)):
            metrics.setdefault(row["name"], {})[int(row["round"])] = float(row["value"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConfigError(
            f"{run_dir / METRICS_FILE} cannot be read ({error}); remove {run_dir} to repeat the run"
        ) from error
    return metrics


def version_of(run_dir: Path) -> str | None:
    """The version of lorafair that began the run; None where there is no run. ConfigError where that cannot be read."""
    file = run_dir / CONFIG_FILE
    try:
        first = file.read_text(encoding="utf-8").partition("\n")[0]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); put the file back, or choose another run_dir") from error
    return first.removeprefix(VERSION_LINE) if first.startswith(VERSION_LINE) else "an unknown version"


def _mapped(node: Any, change: Callable[[Any], Any]) -> Any:
    """Nested groups and lists with every value in them changed."""
    if isinstance(node, dict):
        return {key: _mapped(value, change) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_mapped(value, change) for value in node]
    return change(node)


def _as_text(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return next(text for text, number in _NOT_FINITE.items() if str(number) == str(value))


def _as_number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value

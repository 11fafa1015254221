"""The runs of a comparison as text. Nothing heavy is imported."""

from __future__ import annotations

from lorafair.checkpointing.lock import in_progress
from lorafair.comparison.plan import Comparison, Options, Run, failure_of
from lorafair.console import format_count, format_value, table
from lorafair.errors import ConfigError


def options_text(options: Options) -> str:
    """Options in one line, e.g. `learning_rate=0.002`: the last part of each key, unless two share it."""
    names = short_names(options)
    return ", ".join(f"{names[key]}={format_value(value)}" for key, value in options.items())


def list_runs(comparison: Comparison) -> str:
    """The table of all runs with their indices and states, and below it what stands in the way of any."""
    rows, problems = [], []
    for run in comparison.runs:
        state: str
        try:
            state, _ = comparison.state(run)
            if state in ("unfinished", "failed") and in_progress(run.folder):
                state = "in progress"
        except ConfigError as error:
            state = "conflict"
            problems.append(f"{run.index}: {error}")
        rows.append([str(run.index), run.setting, run.method, str(run.seed), state, _options_of(comparison, run)])
        if state == "failed" and (message := failure_of(run)):
            problems.append(f"{run.index}: {message}")
    lines = [table(["index", "setting", "method", "seed", "state", "options"], rows, left=6), *problems]
    lines += [f"setting {label}: {_keys_text(options)}" for label, options in comparison.settings.items() if options]
    count = len(comparison.runs)
    return "\n".join([*lines, f"{format_count(count, 'run')} (--index 0 to {count - 1}) in {comparison.folder}"])


def _options_of(comparison: Comparison, run: Run) -> str:
    """What sets a run apart from the others of its setting and seed, beyond its label."""
    own = {k: v for k, v in comparison.methods[run.method].items() if (k, v) != ("method.name", run.method)}
    text = [_keys_text(own)] if own else []
    if comparison.tuning is not None:
        options = [options_text(c) for c in comparison.candidates]
        choice = comparison.choice(run.setting, run.method) if run.candidate is None else None
        if run.candidate is not None:
            text.append(f"tuning {options[run.candidate]}")
        elif choice is not None and choice.best is not None:
            text.append(f"tuned {options[choice.best]}")
    return "; ".join(text) or "-"


def _keys_text(options: Options) -> str:
    return ", ".join(f"{key}={format_value(value)}" for key, value in options.items())


def short_names(options: Options) -> dict[str, str]:
    """The last part of each key, unless two share it."""
    last = [key.rpartition(".")[2] for key in options]
    return {key: short if last.count(short) == 1 else key for key, short in zip(options, last, strict=True)}

"""A table of stored draws: a row a method, a column a setting, mean accuracy and its standard deviation over draws."""

from __future__ import annotations

import statistics

from stored_draws import DATA, Stored

from lorafair.registry import METHODS


def accuracy_by_setting(file: str, first: str = "method", title: dict[str, str] | None = None) -> str:
    """Markdown. `first` heads the first column; `title` has names of methods and settings that read better."""
    stored, named = Stored(DATA / file), title or {}
    settings = list(dict.fromkeys(setting for setting, _ in stored.lines))
    methods = list(dict.fromkeys(method for _, method in stored.lines))
    lines = ["| " + " | ".join([first, *(named.get(s, s.replace("_", " ")) for s in settings)]) + " |"]
    lines.append("|---" * (1 + len(settings)) + "|")
    for method in methods:
        cells = [named.get(method, METHODS.title(method))]
        for setting in settings:
            values = list(stored.values(setting, method).values()) if (setting, method) in stored.lines else []
            cells.append(_cell(values))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{draws_text(stored, settings, methods)}\n"


def draws_text(stored: Stored, settings: list[str], methods: list[str]) -> str:
    """How many draws there are, in a sentence."""
    counts = {len(stored.lines[s, m]) for s in settings for m in methods if (s, m) in stored.lines}
    fewest, most = min(counts), max(counts)
    number = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"Top-1 accuracy in %, mean ± standard deviation; {number} paired {'draw' if most == 1 else 'draws'}."


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"

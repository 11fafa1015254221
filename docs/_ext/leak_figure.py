"""The figure and the table of concepts/leaks.md, from numbers that benchmarks/leak.py has measured (docs/data)."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ROOT / "docs" / "data" / "leak.csv"


def read() -> list[dict[str, str]]:
    """One line a setting and rate of false positives."""
    with NUMBERS.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def draw() -> Figure:
    """As the benchmark draws it."""
    sys.path.append(str(ROOT))
    from benchmarks import leak

    return leak.draw(read())


def table() -> str:
    """A line a setting, in Markdown."""
    text = ["| client | σ | area | false positives | true positives | allowed by ε |", "|---|" + "---:|" * 5]
    for setting in dict.fromkeys(line["setting"] for line in read()):
        own = [line for line in read() if line["setting"] == setting]
        at = min(own, key=lambda line: abs(float(line["false_positives"]) - 0.01))
        sigma = "–" if at["noise_multiplier"] == "nan" else f"{float(at['noise_multiplier']):.2f}"
        rates = [f"{100 * float(at[name]):.1f} %" for name in ("false_positives", "true_positives", "allowed")]
        text.append(f"| {setting} | {sigma} | {float(at['area']):.2f} | {' | '.join(rates)} |")
    return "\n".join(text)

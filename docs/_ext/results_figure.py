"""The README's figure of results, from numbers kept in docs/data: python docs/_ext/results_figure.py writes it anew."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorafair.comparison.canvas import paper_settings
from lorafair.comparison.contrasts import differences_figure
from lorafair.comparison.outcomes import Difference
from lorafair.registry import METHODS
from lorafair.reporting.palette import styles

DOCS = Path(__file__).resolve().parents[1]
DIFFERENCES, MEANS = (DOCS / "data" / f"earlier_{kind}.csv" for kind in ("differences", "means"))
PICTURE, SETTING = DOCS / "_static" / "results.svg", "feature_skew_long"
SHOWN = {  # label in the numbers -> what it is called
    "lora_fair": "LoRA-FAIR",
    "lora_fair_both": "two-sided LoRA-FAIR",
    "flex_lora": "FlexLoRA",
    "fedex_lora": "FedEx-LoRA",
}


def read() -> dict[str, dict[str, Any]]:
    """label -> its differences to FedIT by seed, and the aggregation bias that it leaves."""
    means = {row["method"]: float(row["bias_left"]) for row in _rows(MEANS)}
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(DIFFERENCES):
        method = found.setdefault(row["method"], {"by_seed": {}, "bias": means[row["method"]]})
        method["by_seed"][int(row["draw"])] = float(row["points_above_fedit"])
    return found


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return [row for row in csv.DictReader(lines) if row["setting"] == SETTING]


def digest() -> str:
    """Of the numbers, kept in the picture: a test sees whether it is the one of these numbers."""
    return hashlib.sha256(repr(read()).encode()).hexdigest()


def draw() -> None:
    """Write the picture."""
    import matplotlib

    numbers = read()
    titles = {label: f"{title} ({numbers[label]['bias']:.2f})" for label, title in SHOWN.items()}
    pairs = {label: {("", seed): value for seed, value in numbers[label]["by_seed"].items()} for label in SHOWN}
    outcomes: Any = SimpleNamespace(
        differences=lambda setting: {label: Difference(by_pair) for label, by_pair in pairs.items()},
        title=titles.__getitem__,
        styles=styles({label: label for label in SHOWN}),
        baseline_title=METHODS.title("fedit"),
        unit="seed",
        interval_name="95% interval",
    )
    with paper_settings():
        matplotlib.rcParams["svg.fonttype"] = "path"  # a browser may not have the font
        figure = differences_figure(outcomes, "", 4.6)
        assert figure is not None
        figure.savefig(
            PICTURE,
            metadata={
                "Title": "Points of mean accuracy above FedIT in one long round",
                "Date": None,
                "Description": f"numbers {digest()}",
            },
        )


if __name__ == "__main__":
    draw()

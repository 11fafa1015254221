"""The figure of the results, from docs/data: drawn when the site is built, and for the README by

python docs/_ext/results_figure.py
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from stored_draws import DATA, Setting, differences_of, pairs_of, parts_of, settings, title_of

PICTURE, FILE = DATA.parent / "_static" / "results.svg", "which_method.csv"


def digest() -> str:
    """Of the numbers in the README's picture, kept in it: a test sees whether it is the one of these numbers."""
    shown = {(at.setting, at.title, at.draws): differences_of(at.file) for at in settings(FILE)}
    return hashlib.sha256(repr(shown).encode()).hexdigest()


def draw(shown: Sequence[Setting]) -> Any:
    """A panel a setting: mean and interval of each method, both heads of an aggregation in one line."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    from lorafair.comparison.canvas import paper_settings

    labels = (label for at in shown for label in at.stored.methods(at.setting))
    aggregations = list(pairs_of(labels))[::-1]
    with paper_settings():
        matplotlib.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "lorafair"}  # a browser may not have the font
        rows = math.ceil(len(shown) / 2)
        drawing = Drawing(figsize=(7.4, 2.7 * rows + 0.3), layout="constrained")
        panels = drawing.subplots(rows, min(2, len(shown)), sharey=True, squeeze=False).ravel()
        for panel, at in zip(panels, shown, strict=False):
            tested = differences_of(at.file).items()
            of_setting = [(*parts_of(label), d) for (name, label), (d, _) in tested if name == at.setting]
            for by_class, color, marker in ((False, "#3a8fd0", "o"), (True, "#e08a00", "D")):
                points = [(aggregations.index(a) + 0.14 - 0.28 * c, d) for a, c, d in of_setting if c == by_class]
                for y, difference in points:
                    if difference.interval is not None:
                        panel.plot(difference.interval, (y, y), color=color)
                panel.plot([d.mean for _, d in points], [y for y, _ in points], marker, color=color, markersize=4.5,
                           label=f"{'class-wise' if by_class else 'plain'} mean of the head")  # fmt: skip
            _bounded(panel, [difference.mean for _, _, difference in of_setting])
            panel.axvline(0, color="#4a525c", linewidth=0.8)
            panel.set(title=f"{at.title}\n({at.count_text()})", xlabel="points above FedIT with the plain head")
            panel.spines[["top", "right"]].set_visible(False)
        for panel in panels[len(shown) :]:
            panel.set_visible(False)
        panels[0].set_ylim(-0.5, len(aggregations) - 0.5)
        panels[0].set_yticks(range(len(aggregations)), map(title_of, aggregations))
        drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return drawing


def _bounded(panel: Any, means: Sequence[float]) -> None:
    """Intervals of two draws are many times as wide as all else: they end at the edge of the panel."""
    (low, high), room = panel.get_xlim(), max(2.0, 1.2 * max(map(abs, means)))
    panel.set_xlim(max(low, min(0.0, *means) - room), min(high, max(0.0, *means) + room))


def main() -> None:
    """Write the README's picture."""
    draw(settings(FILE)).savefig(
        PICTURE,
        metadata={"Title": "Points of mean accuracy above FedIT", "Date": None, "Description": f"numbers {digest()}"},
    )


if __name__ == "__main__":
    main()

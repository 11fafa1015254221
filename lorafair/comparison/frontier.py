"""The frontier: accuracy after the last round against the megabytes that it took, a point for each label."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafair.comparison.canvas import add_legend, new_figure, shown
from lorafair.comparison.outcomes import Outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOTAL = "comm/total_bytes"


@dataclass(frozen=True)
class Point:
    """The finished runs of a label."""

    label: str
    megabytes: float  # up and down, of all clients and rounds
    accuracy: float  # mean over domains and seeds, in %


def points_of(outcomes: Outcomes, setting: str) -> list[Point]:
    """The labels whose runs send something, fewest megabytes first."""
    found = []
    for label in outcomes.methods(setting):
        runs = outcomes.runs_of(setting, label)
        sent = [max(curve.values()) for run in runs if (curve := run.curves.get(_TOTAL))]
        if sent and max(sent) > 0:
            accuracy = statistics.fmean(run.accuracy for run in runs)
            found.append(Point(label, statistics.fmean(sent) / 1e6, accuracy))
    return sorted(found, key=lambda point: (point.megabytes, -point.accuracy))


def best_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats: each is more accurate than all that send less."""
    best: list[Point] = []
    for point in points:
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def frontier_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """Accuracy against megabytes, and the line of those that none beats in both."""
    from matplotlib.lines import Line2D

    points = points_of(outcomes, setting)
    if len({round(point.megabytes, 6) for point in points}) < 2:
        return None
    figure = new_figure(width, 0.75 * width if width < 5 else 0.55 * width)
    axes: Any = figure.add_subplot()
    handles = []
    for point in points:
        style = outcomes.styles[point.label]
        look: dict[str, Any] = {
            "linestyle": "none",
            "marker": style.marker,
            "color": style.colour,
            "markeredgewidth": 0,
        }
        axes.plot([point.megabytes], [point.accuracy], markersize=4, **look)
        handles.append(Line2D([], [], **look))
    best = best_of(points)
    axes.plot([p.megabytes for p in best], [p.accuracy for p in best], color="#7F7F7F", linewidth=0.8, zorder=0,
              drawstyle="steps-post")  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(shown("MB sent and received by all clients in all rounds", width - 0.8, 7.0))
    axes.set_ylabel("mean accuracy (%)")
    handles.append(Line2D([], [], color="#7F7F7F", linewidth=0.8))
    add_legend(figure, handles, [*(outcomes.title(point.label) for point in points), "beaten by none in both"])
    return figure

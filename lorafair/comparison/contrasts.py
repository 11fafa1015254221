"""Figures of differences to the baseline: with their intervals, and over settings by its aggregation bias."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafair.comparison.canvas import add_legend, new_figure, shown
from lorafair.comparison.outcomes import Outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW_INCH = 0.17  # of a method
_LABEL_INCH, _POINT_INCH = 0.11, 0.035  # between two names of settings, two methods of a setting


def differences_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """The differences to the baseline: of each seed, their mean and its interval (a forest plot)."""
    from matplotlib.lines import Line2D

    found = outcomes.differences(setting)
    if not found:
        return None
    names = [shown(outcomes.title(method), 0.3 * width) for method in found]
    heights = [_ROW_INCH * max(1.0, 0.62 * (1 + name.count("\n"))) for name in names]
    figure = new_figure(width, sum(heights) + 0.45)
    axes: Any = figure.add_subplot()
    places = [sum(heights[:row]) + height / 2 for row, height in enumerate(heights)]
    for place, (method, difference) in zip(places, found.items(), strict=True):
        style = outcomes.styles[method]
        if difference.interval is not None:
            axes.plot(difference.interval, [place, place], color=style.colour, linewidth=1.3, solid_capstyle="butt")
        axes.plot(list(difference.by_pair.values()), [place] * len(difference.by_pair), linestyle="none", marker="o",
                  markersize=3, markerfacecolor="none", markeredgecolor="#7F7F7F", markeredgewidth=0.6)  # fmt: skip
        axes.plot([difference.mean], [place], marker=style.marker, markersize=4.5, color=style.colour,
                  markeredgewidth=0)  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.7)
    axes.set_ylim(sum(heights), 0)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(places, [f"{d} ({d.interval_text})" for d in found.values()])
    numbers.tick_params(length=0, labelsize=5.5)
    numbers.spines["right"].set_visible(False)
    axes.set_xlabel(shown(f"points of mean accuracy above {outcomes.baseline_title}", width - 0.8, 7.0))
    handles = [Line2D([], [], linestyle="none", marker="o", markersize=3, markerfacecolor="none",
                      markeredgecolor="#7F7F7F", markeredgewidth=0.6)]  # fmt: skip
    labels = [f"one {outcomes.unit}"]
    if any(difference.interval is not None for difference in found.values()):
        handles.append(Line2D([], [], color="black", marker="D", markersize=3.5, linewidth=1.3))
        labels.append(f"mean and {outcomes.interval_name}")
    add_legend(figure, handles, labels)
    return figure


def map_figure(outcomes: Outcomes, width: float) -> Figure | None:
    """Differences to the baseline by its aggregation bias, a place for each setting; None for fewer than two."""
    from matplotlib.lines import Line2D

    others = [m for m in outcomes.others() if any(outcomes.difference(m, s) for s in outcomes.settings())]
    curves = {setting: outcomes.bias(setting) for setting in outcomes.settings()}
    bias = {setting: statistics.fmean(curve.values()) for setting, curve in curves.items() if curve}
    if len(bias) < 2 or not others:
        return None
    places, apart_by = _places(bias, len(others), width)
    figure = new_figure(width, 0.7 * width if width < 5 else 0.46 * width)
    axes: Any = figure.add_subplot()
    for number, method in enumerate(others):
        shift = (number - (len(others) - 1) / 2) * apart_by  # side by side, so that whiskers do not hide each other
        points = [(x + shift, d) for s, x in places.items() if (d := outcomes.difference(method, s)) is not None]
        style = outcomes.styles[method]
        axes.errorbar(
            [x for x, _ in points], [d.mean for _, d in points], yerr=[d.half_width or 0 for _, d in points],
            color=style.colour, marker=style.marker, markersize=3.5, linestyle="none", elinewidth=0.8, capsize=1.2,
            capthick=0.8, markeredgewidth=0,
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.7)
    axes.grid(visible=False, axis="x")
    baseline = outcomes.baseline_title
    text = f"aggregation bias of {baseline}, mean over rounds and seeds"
    if places == bias:
        _name_settings(axes, places, width)
    else:  # at equal distances, in the order of the bias
        text = f"setting and {text}"
        room = (width - 0.6) / len(places)
        names = [f"{shown(setting, room if room > 0.6 else 1.4)}\n{bias[setting]:.3f}" for setting in places]
        axes.set_xticks(list(places.values()), names, rotation=0 if room > 0.6 else 90)
    axes.set_xlabel(shown(text, width - 0.8, 7.0))
    axes.set_ylabel(shown(f"points above {baseline}", 1.6, 7.0))
    handles = [Line2D([], [], color=outcomes.styles[m].colour, marker=outcomes.styles[m].marker, linestyle="none",
                      markeredgewidth=0) for m in others]  # fmt: skip
    handles.append(Line2D([], [], color="black", marker="|", markersize=6, linestyle="none"))
    add_legend(
        figure,
        handles,
        [
            *map(outcomes.title, others),
            f"{outcomes.interval_name} over {outcomes.unit}s",
        ],
    )
    return figure


def _places(bias: Mapping[str, float], count: int, width: float) -> tuple[dict[str, float], float]:
    """Where each setting stands on the axis, and how far apart the methods of a setting are.

    At its bias, unless the methods of two settings would then be on top of each other: at equal distances.
    """
    ordered = sorted(bias, key=bias.__getitem__)
    span = bias[ordered[-1]] - bias[ordered[0]]
    apart_by = _POINT_INCH / (width - 0.7) * span
    nearest = min(bias[b] - bias[a] for a, b in itertools.pairwise(ordered))
    if nearest > count * apart_by:
        return {setting: bias[setting] for setting in ordered}, apart_by
    return {setting: float(number) for number, setting in enumerate(ordered)}, 0.7 / count


def _name_settings(axes: Any, places: Mapping[str, float], width: float) -> None:
    """The names of the settings above the axes, apart from each other, each with a line to its place."""
    low, high = axes.get_xlim()
    inches = width - 0.7  # about the width of the axes
    wanted = [(place - low) / (high - low) * inches for place in places.values()]
    across = axes.get_xaxis_transform()
    for (setting, place), moved in zip(places.items(), apart(wanted, _LABEL_INCH, inches), strict=True):
        axes.plot([place] * 2, [0, 1], transform=across, color="black", alpha=0.1, zorder=0)
        axes.annotate(
            shown(setting, 1.4), (place, 1.0), (low + (high - low) * moved / inches, 1.06), xycoords=across,
            textcoords=across, rotation=90, ha="center", va="bottom", fontsize=5.5,
            arrowprops={"arrowstyle": "-", "alpha": 0.4, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    axes.set_xlim(low, high)


def apart(wanted: Sequence[float], gap: float, length: float) -> list[float]:
    """Places in [0, length] near the wanted ones, which are in order, at least a gap apart where that is possible."""
    gap = min(gap, length / max(1, len(wanted) - 1))
    places = list(wanted)
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    limit = length
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places

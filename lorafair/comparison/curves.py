"""Figures over the rounds: accuracy, losses, the aggregation bias, the size of a correction, the bias of each layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafair.comparison.canvas import add_legend, new_figure, shown
from lorafair.comparison.outcomes import AFTER, BEFORE, Outcomes, RecordedRun, common_rounds
from lorafair.reporting.run_dir import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY = "eval/accuracy"
NORM_RATIO = "server/norm_ratio"
_MARKS = 8  # of a line
_STEPS = [1, 2, 5, 10]  # of ticks
_POWERS = 20.0  # largest to smallest value, from which a logarithmic axis is easier to read
_PANEL_ROWS = 30  # layers of a heat map that have a name; of more every second, third, ...


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a scalar by round, or by another scalar."""

    scalar: str
    label: str  # of the vertical axis
    title: str = ""
    factor: float = 1.0
    spreads: bool = False  # over powers of ten: the axis is logarithmic where the values are that far apart


ERROR_PANEL = Panel(AFTER, "‖ΔW − X‖/‖ΔW‖", "error of the update", spreads=True)
NORM_PANEL = Panel(NORM_RATIO, "‖B'‖/‖B̄‖", "norm of B", spreads=True)


@dataclass(frozen=True)
class Line:
    """The mean of a method's runs at the rounds that all of them have."""

    x: np.ndarray[Any, Any]
    mean: np.ndarray[Any, Any]
    std: np.ndarray[Any, Any] | None  # sample standard deviation; None for one run


def accuracy_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """Mean accuracy over domains, by round."""
    return by_round(outcomes, setting, width, [Panel(ACCURACY, "mean accuracy (%)", factor=100)])


def domains_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """Accuracy by round, a panel for each domain."""
    names = {
        name: None for _, runs in _recorded(outcomes, setting) for run in runs for name in run.curves
        if name.startswith(f"{ACCURACY}/")
    }  # fmt: skip
    panels = [Panel(name, "accuracy (%)", name.removeprefix(f"{ACCURACY}/"), 100) for name in names]
    return by_round(outcomes, setting, width, panels)


def loss_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """Training loss of the clients, and loss on the test images, by round."""
    panels = [Panel("train/loss", "loss", "training"), Panel("eval/loss", "loss", "test")]
    return by_round(outcomes, setting, width, panels)


def bias_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """The relative aggregation bias before the method's correction, and what is left after it, by round."""
    bias = "aggregation bias"
    return by_round(
        outcomes, setting, width, [Panel(BEFORE, bias, "plain average"), Panel(AFTER, bias, "update of the method")]
    )


def correction_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """How far the server's update is from the ideal one, and how much longer its B is than the mean B, by round."""
    return by_round(outcomes, setting, width, [ERROR_PANEL, NORM_PANEL])


def traffic_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """Mean accuracy by what all clients have sent and received so far."""
    panel = Panel(ACCURACY, "mean accuracy (%)", factor=100)

    def line(runs: Sequence[RecordedRun]) -> Line | None:
        accuracy, sent = line_of(runs, ACCURACY, 100), line_of(runs, "comm/total_bytes", 1e-6)
        if accuracy is None or sent is None:
            return None
        at = dict(zip(sent.x.tolist(), sent.mean.tolist(), strict=True))
        x = np.array([at.get(r, math.nan) for r in accuracy.x.tolist()])
        return Line(x, accuracy.mean, accuracy.std) if (x > 0).any() else None  # nothing travels where data are pooled

    return _panels(outcomes, setting, width, [panel], lambda runs, _: line(runs), "MB sent and received by all clients")


def time_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """Mean accuracy by virtual time, a panel for each profile."""
    methods = [method for method, _ in _recorded(outcomes, setting)]
    priced = {
        pricing.profile.name: {m: pricing.runs(outcomes, setting, m) for m in methods} for pricing in outcomes.pricings
    }
    priced = {name: found for name, found in priced.items() if any(found.values())}
    if not priced:
        return None
    from lorafair.comparison.pricing import unit_of_time

    units = {name: unit_of_time([run for runs in found.values() for run in runs]) for name, found in priced.items()}
    panels = {Panel(ACCURACY, "mean accuracy (%)", f"{name}, {units[name][1]}", 100): name for name in priced}

    def line(runs: Sequence[RecordedRun], panel: Panel) -> Line | None:
        accuracy, name = line_of(runs, ACCURACY, 100), panels[panel]
        mine = priced[name][runs[0].run.method]
        if accuracy is None or len(mine) < len(runs):  # a mean over other runs than the accuracy's would mislead
            return None
        spent, second = [run.spent for run in mine], units[name][0]
        x = [sum(each[r].seconds for each in spent) / len(spent) / second for r in accuracy.x.tolist()]
        return Line(np.array(x), accuracy.mean, accuracy.std)

    return _panels(outcomes, setting, width, list(panels), line, "virtual time")


def line_of(runs: Sequence[RecordedRun], scalar: str, factor: float = 1.0) -> Line | None:
    """The mean of a scalar over the runs that have it, and its standard deviation; None where none has it."""
    curves = [run.curves[scalar] for run in runs if run.curves.get(scalar)]
    rounds = common_rounds(curves)
    if not rounds:
        return None
    values = factor * np.array([[curve[r] for r in rounds] for curve in curves])
    return Line(np.array(rounds), values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else None)


def _recorded(outcomes: Outcomes, setting: str) -> list[tuple[str, list[RecordedRun]]]:
    """Methods with runs in the setting, in the order given."""
    return [(m, runs) for m in outcomes.comparison.methods if (runs := outcomes.recorded.get((setting, m), []))]


def by_round(outcomes: Outcomes, setting: str, width: float, panels: Sequence[Panel]) -> Figure | None:
    """Scalars by round, one in each panel, a line for each method; None where no run has recorded any of them."""

    def line(runs: Sequence[RecordedRun], panel: Panel) -> Line | None:
        return line_of(runs, panel.scalar, panel.factor)

    return _panels(outcomes, setting, width, panels, line, "round")


def _panels(
    outcomes: Outcomes,
    setting: str,
    width: float,
    panels: Sequence[Panel],
    line: Callable[[Sequence[RecordedRun], Panel], Line | None],
    x_label: str,
) -> Figure | None:
    """Lines of all methods in each panel, below them the legend; None where there is no line."""
    methods = _recorded(outcomes, setting)
    drawn = [(panel, {m: found for m, runs in methods if (found := line(runs, panel)) is not None}) for panel in panels]
    drawn = [(panel, lines) for panel, lines in drawn if lines]
    if not drawn:
        return None
    columns = min(len(drawn), 1 if len(drawn) == 1 else 2 if width < 5 else 3)
    rows = -(-len(drawn) // columns)
    each = width / columns
    height = rows * (0.62 * each if columns == 1 and width < 5 else 0.46 * each if columns == 1 else 0.9 * each)
    figure = new_figure(width, height)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharey=len({p.label for p in panels}) == 1 < len(drawn))
    for place, axes in enumerate(grid.flat):
        if place >= len(drawn):
            axes.remove()
            continue
        panel, lines = drawn[place]
        _draw_lines(axes, outcomes, lines)
        if panel.spreads:
            _spread(axes, np.concatenate([line.mean for line in lines.values()]))
        axes.set_title(shown(panel.title, each - 0.4, 7.0))
        if place % columns == 0 or panel.label != drawn[place - 1][0].label:
            axes.set_ylabel(panel.label)
        if place + columns >= len(drawn):
            axes.set_xlabel(x_label)
    _legend_of_lines(figure, outcomes, [lines for _, lines in drawn])
    return figure


def _spread(axes: Any, values: np.ndarray[Any, Any]) -> None:
    """A logarithmic vertical axis where the values are powers of ten apart; zero is at its lower end."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive) or positive.max() / positive.min() < _POWERS:
        return
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(positive.min() / 1.5, 1.5 * positive.max())
    axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own is a formula, and text is none here
    axes.yaxis.set_minor_formatter("")


def _draw_lines(axes: Any, outcomes: Outcomes, lines: Mapping[str, Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    shade = min(0.15, 0.6 / len(lines))  # many bands together would hide the lines
    for number, (method, line) in enumerate(lines.items()):
        style = outcomes.styles[method]
        step = max(1, len(line.x) // _MARKS)
        axes.plot(line.x, line.mean, color=style.colour, marker=style.marker, linestyle=style.linestyle,
                  markevery=(number % step, step), markeredgewidth=0)  # fmt: skip
        if line.std is not None:
            axes.fill_between(line.x, line.mean - line.std, line.mean + line.std, color=style.colour, alpha=shade,
                              linewidth=0)  # fmt: skip
    whole = all(float(x).is_integer() for line in lines.values() for x in line.x)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, steps=_STEPS, min_n_ticks=1))  # of one round 1, not 0.95
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))


def _legend_of_lines(figure: Figure, outcomes: Outcomes, lines: Sequence[Mapping[str, Line]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    labels = []
    for method in outcomes.comparison.methods:
        if any(method in found for found in lines):
            style = outcomes.styles[method]
            handles.append(Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.linestyle,
                                  markeredgewidth=0))  # fmt: skip
            labels.append(outcomes.title(method))
    if any(line.std is not None for found in lines for line in found.values()):
        handles.append(Patch(facecolor="#7F7F7F", alpha=0.3, linewidth=0))
        labels.append(f"± standard deviation over {outcomes.unit}s")
    add_legend(figure, handles, labels)


def layers_figure(outcomes: Outcomes, setting: str, width: float) -> Figure | None:
    """What a method leaves of the aggregation bias, by layer and round, a panel for each method."""
    maps = {m: found for m, runs in _recorded(outcomes, setting) if (found := _by_layer(runs)) is not None}
    if not maps:
        return None
    layers = list(dict.fromkeys(layer for curves in maps.values() for layer in curves))
    columns = min(len(maps), 2 if width < 5 else 4)
    rows = -(-len(maps) // columns)
    cell = 0.11 if len(layers) <= _PANEL_ROWS else 3.3 / len(layers)
    figure = new_figure(width, rows * (max(0.5, cell * len(layers)) + 0.42) + 0.15)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharey=True)
    highest = max(v for curves in maps.values() for curve in curves.values() for v in curve.values())
    names = list(maps)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.remove()
            continue
        picture = _draw_layers(axes, maps[names[place]], layers, highest)
        axes.set_title(shown(outcomes.title(names[place]), 0.75 * width / columns, 7.0))
        if place + columns >= len(names):
            axes.set_xlabel("round")
        if place % columns == 0:
            step = -(-len(layers) // _PANEL_ROWS)
            axes.set_yticks(range(0, len(layers), step), [shown(name, 1.3, 5.0) for name in layers[::step]], fontsize=5)
    bar = figure.colorbar(picture, ax=list(grid.flat)[: len(names)], aspect=25, pad=0.02)
    bar.set_label("aggregation bias")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _by_layer(runs: Sequence[RecordedRun]) -> dict[str, Curve] | None:
    """layer -> mean over runs; None where no run has it."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(f"{AFTER}/"))
    found = {name.removeprefix(f"{AFTER}/"): line for name in names if (line := line_of(runs, name)) is not None}
    return {name: dict(zip(line.x.tolist(), line.mean.tolist(), strict=True)) for name, line in found.items()} or None


def _draw_layers(axes: Any, curves: Mapping[str, Curve], layers: Sequence[str], highest: float) -> Any:
    """A heat map, of colours that are ordered for all readers and in grey, too (Nuñez et al., PLOS ONE 13, 2018)."""
    from matplotlib.ticker import MaxNLocator

    rounds = sorted({r for curve in curves.values() for r in curve})
    values = np.array([[curves.get(layer, {}).get(r, math.nan) for r in rounds] for layer in layers])
    edges = [rounds[0] - 0.5, *((a + b) / 2 for a, b in itertools.pairwise(rounds)), rounds[-1] + 0.5]
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS, min_n_ticks=1))
    picture = axes.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, values, cmap="cividis", vmin=0,
                              vmax=highest or 1.0, rasterized=True)  # fmt: skip
    axes.set_ylim(len(layers) - 0.5, -0.5)
    return picture

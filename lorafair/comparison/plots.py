"""The plots of a comparison: accuracy by round and by traffic, the aggregation bias, and gain by bias over settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorafair.comparison.findings import CONFIDENCE, Findings
from lorafair.files.writing import replacing
from lorafair.reporting.run_dir import Curve

# Eight colours that colour-blind readers tell apart (after Okabe and Ito), then again with other markers and lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H", "$+$")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)))


def _style(findings: Findings, method: str) -> dict[str, Any]:
    number = list(findings.comparison.methods).index(method)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def _shade(findings: Findings, setting: str) -> float:
    """Opacity of a band: many of them together would hide the lines."""
    return min(0.12, 0.6 / len(findings.methods(setting)))


def draw_plots(findings: Findings) -> dict[str, Path]:
    """Draw everything there is; returns title -> PNG."""
    plots: dict[str, Path] = {}
    for setting in findings.settings():
        for kind, title, draw in (
            ("accuracy", "accuracy by round", _accuracy_by_round),
            ("traffic", "accuracy by megabytes", _accuracy_by_traffic),
            ("bias", "aggregation bias by round", _bias_by_round),
        ):
            path = findings.comparison.folder / f"{setting}-{kind}.png"
            path.unlink(missing_ok=True)
            if _draw(path, f"{title}, setting {setting}", lambda axes, d=draw, s=setting: d(findings, s, axes)):  # type: ignore[misc]
                plots[f"{setting}: {title}"] = path
    path = findings.comparison.folder / "map.png"
    path.unlink(missing_ok=True)
    title = f"difference to {findings.comparison.baseline} by aggregation bias"
    if len(findings.settings()) > 1 and _draw(path, title, lambda axes: _map(findings, axes)):
        plots[title] = path
    return plots


def _draw(path: Path, title: str, draw: Callable[[Any], bool]) -> bool:
    """A picture with its legend outside; false, and no picture, where `draw` finds nothing to show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot would touch the user's display and state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if not draw(axes):
        return False
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_xlabel() == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=3.5)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return True


def _over_seeds(curves: Sequence[Curve]) -> tuple[Any, Any, Any]:
    """Rounds that all seeds have, mean and sample standard deviation (zero for one seed) there."""
    rounds = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = np.array([[curve[r] for r in rounds] for curve in curves]).reshape(len(curves), len(rounds))
    std = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(rounds))
    return np.array(rounds), values.mean(0) if len(curves) else np.zeros(0), std


def _accuracy_by_round(findings: Findings, setting: str, axes: Any) -> bool:
    for method in findings.methods(setting):
        style = _style(findings, method)
        shade = _shade(findings, setting)
        rounds, mean, std = _over_seeds([f.curves.get("eval/accuracy", {}) for f in findings.runs_of(setting, method)])
        axes.plot(rounds, 100 * mean, label=method, **style)
        axes.fill_between(
            rounds, 100 * (mean - std), 100 * (mean + std), color=style["color"], alpha=shade, linewidth=0
        )
    axes.set_xlabel("round")
    axes.set_ylabel("mean accuracy in % (band: ± std over seeds)")
    return True


def _accuracy_by_traffic(findings: Findings, setting: str, axes: Any) -> bool:
    drawn = False
    for method in findings.methods(setting):
        style, runs, shade = _style(findings, method), findings.runs_of(setting, method), _shade(findings, setting)
        rounds, mean, std = _over_seeds([f.curves.get("eval/accuracy", {}) for f in runs])
        sent_rounds, sent, _ = _over_seeds([f.curves.get("comm/total_bytes", {}) for f in runs])
        at = dict(zip(sent_rounds.tolist(), (sent / 1e6).tolist(), strict=True))
        x = [at.get(r, math.nan) for r in rounds.tolist()]
        if not any(value > 0 for value in x):  # nothing travels where data are pooled
            continue
        drawn = True
        axes.plot(x, 100 * mean, label=method, **style)
        axes.fill_between(x, 100 * (mean - std), 100 * (mean + std), color=style["color"], alpha=shade, linewidth=0)
    axes.set_xlabel("megabytes sent up and down by all clients so far")
    axes.set_ylabel("mean accuracy in % (band: ± std over seeds)")
    return drawn


def _bias_by_round(findings: Findings, setting: str, axes: Any) -> bool:
    drawn = False
    for method in findings.methods(setting):
        style, runs = _style(findings, method), findings.runs_of(setting, method)
        for name, line in (("server/error_before", "-"), ("server/error_after", (0, (4, 2)))):
            curves = [f.curves[name] for f in runs if name in f.curves]
            if not curves:
                continue
            rounds, mean, _ = _over_seeds(curves)
            label = method if name.endswith("before") else None
            axes.plot(rounds, mean, label=label, **{**style, "linestyle": line})
            drawn = True
    axes.set_xlabel("round")
    axes.set_ylabel("‖ΔW − X‖ / ‖ΔW‖ (solid: before, dashed: after)")
    return drawn


def _map(findings: Findings, axes: Any) -> bool:
    baseline = findings.comparison.baseline
    curves = {setting: findings.bias(setting) for setting in findings.settings()}
    places = [(sum(curve.values()) / len(curve), setting) for setting, curve in curves.items() if curve]
    if len(places) < 2:
        return False
    span = max(x for x, _ in places) - min(x for x, _ in places)
    others = [method for method in findings.comparison.methods if method != baseline]
    drawn = False
    for number, method in enumerate(others):
        shift = (number - (len(others) - 1) / 2) * 0.012 * span  # side by side, so that whiskers do not hide each other
        points = [(x + shift, d) for x, s in places if (d := findings.difference(method, s)) is not None]
        if points:
            style = _style(findings, method)
            axes.errorbar(
                [x for x, _ in points], [d.mean for _, d in points], yerr=[d.half_width or 0 for _, d in points],
                label=method, color=style["color"], marker=style["marker"], markersize=6, linestyle="none",
                capsize=2.5, elinewidth=1,
            )  # fmt: skip
            drawn = True
    axes.axhline(0, color="black", linewidth=0.8)
    for x, _ in places:
        axes.axvline(x, color="black", alpha=0.08, zorder=0)
    names = axes.secondary_xaxis("top")
    names.set_xticks([x for x, _ in places], [setting for _, setting in places], rotation=40, ha="left", fontsize=8)
    axes.set_xlabel(f"relative aggregation bias of {baseline} before the correction, mean over rounds and seeds")
    axes.set_ylabel(f"points above {baseline} ({CONFIDENCE:.0%} interval)")
    return drawn

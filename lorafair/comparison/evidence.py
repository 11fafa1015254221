"""Tables of what the differences rest on: tests, reversals, draws needed, and where the variance comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from lorafair.comparison.outcomes import Difference, Outcomes
from lorafair.comparison.statistics import Component, components, draws_needed, evidence, holm
from lorafair.comparison.tables import Cell, Table

POWER = 0.8
_FEW = 5  # draws that many studies have
_WORTH = 1.0  # a difference in points


def p_values(outcomes: Outcomes) -> dict[tuple[str, str], tuple[float, float]]:
    """(setting, method) -> the p-value of its difference, and the same corrected for the number of all of them."""
    found: dict[tuple[str, str], float] = {}
    for setting in outcomes.settings():
        for method, difference in outcomes.differences(setting).items():
            if (value := _p_value(difference)) is not None:
                found[setting, method] = value
    corrected = holm(list(found.values()))
    return {place: (value, c) for (place, value), c in zip(found.items(), corrected, strict=True)}


def _p_value(difference: Difference) -> float | None:
    if difference.level is None:
        return difference.estimate.p_value if difference.estimate else None
    if difference.values.size < 2 or difference.is_constant:
        return None
    return min(1.0, 1 / float(evidence(difference.values)[-1]))  # holds whenever the draws stop


def significance_table(outcomes: Outcomes, setting: str) -> Table:
    """Every other method against the baseline: is there one, does it last, and how many draws does it take."""
    what = f"{outcomes.unit}s"
    tested = p_values(outcomes)
    rows: list[list[Cell]] = []
    for method, difference in outcomes.differences(setting).items():
        known = difference.estimate
        if known is None or known.spread == 0:
            continue
        number = difference.values.size
        p, corrected = tested.get((setting, method), (None, None))
        needed = [draws_needed(points, known.spread, POWER) for points in (known.mean, _WORTH)]
        rows.append([
            outcomes.title(method), str(number), _probability(p), _probability(corrected),
            *(_probability(known.reversal(n)) for n in (_FEW, number)),
            f"{known.spread:.2f}", *("–" if n is None else f"{n:,}" for n in needed),
        ])  # fmt: skip
    header = ["method", what, "p", "p (Holm)", f"reversal at {_FEW}", "if repeated", "deviation", "needed",
              f"for {_WORTH:g} point"]  # fmt: skip
    caption = f"Tests of the differences to {outcomes.baseline_title}, chance that the sign reverses, {what} needed"
    return Table(caption, header, rows)


def components_table(outcomes: Outcomes, setting: str) -> Table:
    """Where the variance comes from: of a design, by partition and training; else by seed and method."""
    draws = outcomes.draws
    names: dict[str, str]
    found: dict[str, Sequence[Component]] = {}
    if draws is not None and draws.is_design:
        names = {"partition": "partition", "training": "training", "interaction": "interaction and residual"}
        if draws.layout == "nested":
            names = {"partition": "partition", "training": "training in a partition"}
        measured = {outcomes.title(m): _by_draw(outcomes, setting, m) for m in outcomes.methods(setting)}
        measured |= {
            f"{outcomes.title(m)} − {outcomes.baseline_title}": {d: v for (_, d), v in difference.by_pair.items()}
            for m, difference in outcomes.differences(setting).items()
        }
        for title, by_draw in measured.items():
            table = draws.table(by_draw)
            if min(table.shape) > 1:
                found[title] = components(table, draws.layout)
    else:
        what = outcomes.unit
        names = {"partition": f"{what}, for all methods alike", "interaction": f"{what} × method and residual"}
        methods = {m: _by_draw(outcomes, setting, m) for m in outcomes.methods(setting)}
        common = sorted(set.intersection(*map(set, methods.values()))) if methods else []
        if len(methods) > 1 and len(common) > 1:
            table = np.array([[by_draw[d] for by_draw in methods.values()] for d in common])
            parts = components(table, "crossed")
            found["accuracy"] = [part for part in parts if part.name in names]
    rows = [[title, *map(partial(_component, parts), parts)] for title, parts in found.items()]
    rows = [row for row in rows if len(row) == len(names) + 1]
    caption = "Components of variance, as standard deviations in points, with 95% intervals and shares of the variance"
    return Table(caption, ["of", *names.values()], rows)


def _by_draw(outcomes: Outcomes, setting: str, method: str) -> Mapping[int, float]:
    return {run.run.seed: run.accuracy for run in outcomes.runs_of(setting, method)}


def _component(parts: Sequence[Component], part: Component) -> str:
    deviation, low, high = (math.sqrt(value) for value in (part.variance, part.low, part.high))
    total = sum(other.variance for other in parts)
    share = f", {part.variance / total:.0%}" if total > 0 else ""
    return f"{deviation:.2f} ({low:.2f} to {high:.2f}){share}"


def _probability(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def reading_text(outcomes: Outcomes) -> str:
    """How the tables are to be read; empty where there are none."""
    if not any(significance_table(outcomes, setting).rows for setting in outcomes.settings()):
        return ""
    test = (
        "the t-test that the interval belongs to"
        if outcomes.decision_level is None
        else "anytime-valid evidence (an e-value), so stopping does not matter"
    )
    return (
        f"p: by {test}; Holm corrects it for the number of differences in this report. Reversal: the probability that "
        f"the mean of {_FEW} new {outcomes.unit}s, or of as many as here (if repeated), has the other sign, the "
        "uncertainty of this estimate included. Deviation: of a difference, in points. Needed: independent "
        f"{outcomes.unit}s with which a t-test at 0.05 finds a true difference of this size, or of {_WORTH:g} "
        f"point, with power {POWER:g}, if the deviation is as estimated here. Components of "
        "variance: by the method of moments; a component for all methods alike cancels in paired differences."
    )

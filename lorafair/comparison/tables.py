"""The tables of a report, as numbers: each way of writing them down rounds and escapes in its own way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafair.comparison.listing import options_text
from lorafair.comparison.outcomes import AFTER, BEFORE, Difference, Outcomes, RecordedRun, Summary
from lorafair.registry import METHODS

PER_CLIENT = ("accuracy_own_domain", "accuracy_other_domains")  # of methods whose clients keep a model each
Cell = str | Summary | Difference


@dataclass(frozen=True)
class Table:
    """A header and rows; empty where there is nothing to say."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the best value of a column

    @property
    def texts(self) -> list[list[str]]:
        """The rows as plain text."""
        return [[str(cell) for cell in row] for row in self.rows]


def seconds_of(result: Mapping[str, Any]) -> float:
    """Of all rounds, with the training that was taken over from another run, which took so long there."""
    totals = result.get("totals", {})
    return float(totals.get("seconds", 0)) + float(totals.get("shared_seconds", 0)) / int(result.get("processes", 1))


def accuracy_table(outcomes: Outcomes, setting: str) -> Table:
    """Rows are methods, columns domains, mean, seeds and cost."""
    tuned = ["tuned options"] if outcomes.comparison.tuning else []
    result = result_table(outcomes, setting)
    every = [run for method in outcomes.methods(setting) for run in outcomes.runs_of(setting, method)]
    private = ["ε"] if any("privacy" in run.result for run in every) else []
    rows: list[list[Cell]] = []
    for method, begin in zip(outcomes.methods(setting), result.rows, strict=True):
        runs = outcomes.runs_of(setting, method)
        totals = [f.result.get("totals", {}) for f in runs]
        megabytes = f"{statistics.fmean(t.get('bytes', 0) for t in totals) / 1e6:,.2f}"
        seconds = f"{statistics.fmean(seconds_of(f.result) for f in runs):,.1f}"
        middle = [options_text(runs[0].chosen)] if tuned else []
        middle += [_epsilon_text(runs)] if private else []
        rows.append([*begin, *middle, megabytes, seconds])
    header = [*result.header, *tuned, *private, "MB up + down", "seconds a run"]
    return Table(result.caption, header, rows, result.best)


def _epsilon_text(runs: Sequence[RecordedRun]) -> str:
    """The largest ε of a method's runs; infinite for those without privacy."""
    epsilon = max(float(run.result.get("privacy", {}).get("epsilon", math.inf)) for run in runs)
    return "∞" if math.isinf(epsilon) else f"{epsilon:.3g}"


def result_table(outcomes: Outcomes, setting: str) -> Table:
    """Rows are methods, columns domains, mean and number of seeds; the best of those that pool no data is marked."""
    domains, methods = outcomes.domains(setting), outcomes.methods(setting)
    rows: list[list[Cell]] = []
    for method in methods:
        runs = outcomes.runs_of(setting, method)
        of_domain = [[f.result["accuracy"].get(domain) for f in runs] for domain in domains]
        numbers = [Summary(tuple(100 * v for v in values if v is not None)) for values in of_domain]
        rows.append([outcomes.title(method), *numbers, Summary(tuple(f.accuracy for f in runs)), str(len(runs))])
    rivals = [row for row, method in enumerate(methods) if not _pools_data(outcomes, method)]
    columns = range(1, len(domains) + 2)
    caption = f"Top-1 accuracy in %, mean ± standard deviation over {outcomes.unit}s"
    if len(rivals) < len(methods):
        caption += "; methods that pool the data are not marked as the best"
    best = frozenset(place for column in columns for place in _best(rows, rivals, column))
    return Table(caption, ["method", *domains, "mean", f"{outcomes.unit}s"], rows, best)


def _pools_data(outcomes: Outcomes, method: str) -> bool:
    name = str(outcomes.comparison.methods[method]["method.name"])
    return name in METHODS.names and bool(METHODS[name].pools_data)


def _best(rows: Sequence[Sequence[Cell]], rivals: Sequence[int], column: int) -> list[tuple[int, int]]:
    """The places of the largest mean of a column as it is shown; none where there is one rival."""
    shown = {}
    for row in rivals:
        cell = rows[row][column]
        if isinstance(cell, Summary) and cell.values:
            shown[row] = round(cell.mean, 1)
    return [(row, column) for row, value in shown.items() if value == max(shown.values())] if len(shown) > 1 else []


def per_client_table(outcomes: Outcomes, setting: str) -> Table:
    """Methods whose clients keep a model each: on the client's own domain and on the others."""
    rows: list[list[Cell]] = []
    for method in outcomes.methods(setting):
        runs = [f for f in outcomes.runs_of(setting, method) if all(key in f.result for key in PER_CLIENT)]
        if runs:
            numbers = [Summary(tuple(100 * f.result[key] for f in runs)) for key in PER_CLIENT]
            rows.append([outcomes.title(method), *numbers])
    caption = "Methods whose clients keep a model each (above: the mean over all clients and domains)"
    return Table(caption, ["method", "own domain", "other domains"], rows)


def difference_table(outcomes: Outcomes, setting: str) -> Table:
    """Every other method against the baseline, seed by seed."""
    seeds = outcomes.comparison.seeds if outcomes.draws is None else ()  # hundreds of draws have no columns
    rows: list[list[Cell]] = []
    for method, difference in outcomes.differences(setting).items():
        pairs = difference.by_pair
        by_seed = [f"{pairs[setting, s]:+.2f}" if (setting, s) in pairs else "–" for s in seeds]
        rows.append([outcomes.title(method), *by_seed, difference, difference.interval_text])
    caption = f"Mean accuracy minus that of {outcomes.baseline_title}, in points"
    return Table(caption, ["method", *(f"seed {seed}" for seed in seeds), "mean", outcomes.interval_name], rows)


def bias_table(outcomes: Outcomes, setting: str) -> Table:
    """How far plain averaging would have been from the ideal update, and how far the method is."""
    rows: list[list[Cell]] = []
    for method in outcomes.methods(setting):
        before = outcomes.bias(setting, BEFORE, method)
        after = outcomes.bias(setting, AFTER, method)
        if before and after:
            values = [c[r] for c in (before, after) for r in (min(before), max(before))]
            values += [statistics.fmean(c.values()) for c in (before, after)]
            rows.append([outcomes.title(method), *(f"{value:.3f}" for value in values)])
    places = ("first", "last")
    header = [f"{when}, {place} round" for when in ("before", "after") for place in places]
    caption = "Relative aggregation bias ‖ΔW − X‖/‖ΔW‖ of X = B̄Ā (before) and of what the method leaves (after)"
    return Table(caption, ["method", *header, "before, mean", "after, mean"], rows)


def map_table(outcomes: Outcomes) -> Table:
    """Rows are settings in the order of the baseline's bias, columns the other methods' differences to it."""
    rows = []
    for setting in outcomes.settings():
        if curve := outcomes.bias(setting):
            found = [outcomes.difference(method, setting) for method in outcomes.others()]
            texts = ["–" if d is None else f"{d} ({d.interval_text})" for d in found]
            rows.append((statistics.fmean(curve.values()), setting, texts))
    rows.sort(key=lambda row: -row[0])
    baseline = outcomes.baseline_title
    header = ["setting", f"bias of {baseline}", *map(outcomes.title, outcomes.others())]
    caption = f"By setting, the mean over {outcomes.unit}s and its interval; settings by the mean bias of {baseline}"
    return Table(caption, header, [[s, f"{b:.3f}", *texts] for b, s, texts in rows])


def overall_table(outcomes: Outcomes) -> Table:
    """Every other method against the baseline over all settings and seeds."""
    rows: list[list[Cell]] = []
    for method in outcomes.others():
        difference = outcomes.difference(method, *outcomes.settings())
        if difference is not None:
            above = sum(value > 0 for value in difference.by_pair.values())
            pairs = f"{above} of {len(difference.by_pair)}"
            rows.append([outcomes.title(method), pairs, difference, difference.interval_text])
    caption = (
        f"Mean accuracy minus that of {outcomes.baseline_title}, in points, over all pairs of a setting and a seed "
        + (
            "(the interval takes them for independent; settings of one seed share their images)"
            if outcomes.draws is None
            else "(the interval is over draws, each with its mean over settings)"
        )
    )
    return Table(caption, ["method", "pairs above", "mean", outcomes.interval_name], rows)

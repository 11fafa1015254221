"""Tables beside top-1: balanced accuracy, who is left behind, the recall of classes, plain and class-wise heads."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lorafair.comparison.outcomes import Outcomes, RecordedRun, Summary, Value
from lorafair.comparison.tables import Cell, Table

_MOST_CLASSES = 12  # rows of the table of recall
_HEAD = "federation.head_weighting"


def balance_table(outcomes: Outcomes, setting: str) -> Table:
    """What top-1 accuracy alone hides: unbalanced classes, one answer for all, wrong confidence."""
    columns: dict[str, Value] = {
        "top-1": lambda result: result["mean_accuracy"],
        **{
            header: mean_of_domains(kind)
            for header, kind in (
                ("balanced", "balanced_accuracy"),
                ("macro F1", "macro_f1"),
                ("most frequent answer", "most_frequent_answer"),
                ("majority class", "majority_class"),
                ("calibration error", "calibration_error"),
            )
        },
    }
    caption = f"Beside top-1, in %, means of the domains, ± standard deviation over {outcomes.unit}s"
    return _table(outcomes, setting, caption, columns)


def spread_table(outcomes: Outcomes, setting: str) -> Table:
    """Who is left behind: the worst domain, and the accuracy over clients."""
    columns: dict[str, Value] = {
        "mean": lambda result: result["mean_accuracy"],
        "worst domain": lambda result: min(result["accuracy"].values()),
        "worst decile of clients": _of_clients("worst_decile"),
        "mean of clients": _of_clients("accuracy"),
        "best decile of clients": _of_clients("best_decile"),
        "deviation over clients": _of_clients("standard_deviation"),
    }
    caption = f"Who is left behind: accuracy in %, ± standard deviation over {outcomes.unit}s"
    return _table(outcomes, setting, caption, columns)


def _table(outcomes: Outcomes, setting: str, caption: str, columns: Mapping[str, Value]) -> Table:
    """A row for each method; no column that no run has recorded, and no rows where the first one would stand alone."""
    methods = outcomes.methods(setting)
    summaries = {
        header: [summary(outcomes.runs_of(setting, method), value) for method in methods]
        for header, value in columns.items()
    }
    shown = {header: cells for header, cells in summaries.items() if any(cell.values for cell in cells)}
    if len(shown) < 2 or not any(run.result.get("domains") for m in methods for run in outcomes.runs_of(setting, m)):
        return Table(caption, ["method", *shown], [])
    rows: list[list[Cell]] = [
        [outcomes.title(method), *(cells[row] for cells in shown.values())] for row, method in enumerate(methods)
    ]
    return Table(caption, ["method", *shown], rows)


def summary(runs: Sequence[RecordedRun], value: Value) -> Summary:
    """Of the runs that have recorded it, in %."""
    found = (value(run.result) for run in runs)
    return Summary(tuple(100 * number for number in found if number is not None))


def mean_of_domains(kind: str) -> Value:
    """The unweighted mean of what a result has of every domain; None where it does not have it of all."""

    def mean(result: Mapping[str, Any]) -> float | None:
        found = [values[kind] for values in result.get("domains", {}).values() if kind in values]
        return statistics.fmean(found) if found and len(found) == len(result["domains"]) else None

    return mean


def _of_clients(kind: str) -> Value:
    return lambda result: result.get("clients", {}).get(kind)


def recall_table(outcomes: Outcomes, setting: str) -> Table:
    """Rows are classes, columns methods: the recall, mean over domains and runs. Of many classes the hardest."""
    methods = outcomes.methods(setting)
    recalls = {method: _recalls(outcomes.runs_of(setting, method)) for method in methods}
    recalls = {method: found for method, found in recalls.items() if found}
    means = {c: statistics.fmean(found[c] for found in recalls.values() if c in found) for c in _classes(recalls)}
    hardest = sorted(means, key=lambda name: means[name])[:_MOST_CLASSES]
    rows: list[list[Cell]] = [
        [name, *(Summary((100 * found[name],) if name in found else ()) for found in recalls.values())]
        for name in hardest
    ]
    which = "" if len(hardest) == len(means) else f" of the {len(hardest)} of {len(means)} classes where it is lowest"
    caption = f"Recall in %{which}, mean over domains and {outcomes.unit}s"
    return Table(caption, ["class", *map(outcomes.title, recalls)], rows)


def _classes(recalls: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for found in recalls.values() for name in found))


def _recalls(runs: Sequence[RecordedRun]) -> dict[str, float]:
    """class -> its recall, mean over the runs and domains that have test images of it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for of_domain in run.result.get("recall", {}).values():
            for name, value in of_domain.items():
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def head_pairs(outcomes: Outcomes, setting: str) -> list[tuple[str, str]]:
    """Methods with the plain and with the class-wise mean of the head, that differ in nothing else."""
    kinds = {method: _head_of(outcomes.runs_of(setting, method)[0]) for method in outcomes.methods(setting)}
    rest = {m: {k: v for k, v in outcomes.comparison.methods[m].items() if k != _HEAD} for m in kinds}
    return [
        (plain, by_class)
        for plain, kind in kinds.items()
        for by_class, other in kinds.items()
        if (kind, other) == ("client", "class") and rest[plain] == rest[by_class]
    ]


def _head_of(run: RecordedRun) -> str:
    return str(run.result.get("config", {}).get("federation", {}).get("head_weighting", "client"))


def head_table(outcomes: Outcomes, setting: str) -> Table:
    """What the class-wise mean of the head does to each method, in top-1 and in balanced accuracy."""
    rows: list[list[Cell]] = []
    for plain, by_class in head_pairs(outcomes, setting):
        for what, kind in (("top-1", "accuracy"), ("balanced", "balanced_accuracy")):
            value = mean_of_domains(kind)
            both = [summary(outcomes.runs_of(setting, method), value) for method in (plain, by_class)]
            difference = outcomes.difference(by_class, setting, against=plain, value=value)
            if difference is not None:
                rows.append([outcomes.title(plain), what, *both, difference, difference.interval_text])
    caption = "The same method with the plain and with the class-wise mean of the head, in %; gains in points, paired"
    return Table(caption, ["method", "accuracy", "plain", "class-wise", "gain", outcomes.interval_name], rows)


def reading_text(outcomes: Outcomes) -> str:
    """What the tables show; empty where there are none."""
    if not any(spread_table(outcomes, setting).rows for setting in outcomes.settings()):
        return ""
    return (
        "Balanced: mean recall of the classes with test images. Most frequent answer: the largest fraction of all "
        "predictions that are one class; majority class: the accuracy of always predicting the largest class. A model "
        "whose most frequent answer is near 100% has the accuracy of one class. Clients: each one's accuracy on test "
        "images with its own mix of domains and classes; a decile is the mean of a tenth of the clients, rounded up. "
        "Calibration error: mean distance of confidence and accuracy in 15 bins."
    )

"""Priced runs as files: CSV tables, and curves over virtual time and traffic for TensorBoard."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from lorafair.comparison.figures import file_stem, make_folder
from lorafair.comparison.outcomes import Outcomes
from lorafair.comparison.pricing import PricedRun, Pricing
from lorafair.files.writing import replacing
from lorafair.reporting.event_file import EventFile

ROUNDS_FILE, TARGETS_FILE = "timeline.csv", "targets.csv"
BY_TIME, BY_TRAFFIC = "1 accuracy by virtual time/{}", "2 accuracy by traffic/{}"
BY_ROUND = "3 by round/{}"


def write_csv(outcomes: Outcomes, pricings: Sequence[Pricing], folder: Path) -> list[Path]:
    """Every round of every run, and what each run takes until each target; an empty cell where it never reaches it."""
    make_folder(folder)
    run = ["profile", "setting", "method", "seed"]
    spent = ["seconds", "megabytes", "joules", "client_joules", "cost"]
    _write(folder / ROUNDS_FILE, [*run, "round", "accuracy", *spent, "slowest_client"], _rounds(outcomes, pricings))
    _write(folder / TARGETS_FILE, [*run, "target", "round", *spent], _targets(outcomes, pricings))
    return [folder / ROUNDS_FILE, folder / TARGETS_FILE]


def _write(path: Path, header: Sequence[str], rows: Iterator[list[Any]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)


def _rounds(outcomes: Outcomes, pricings: Sequence[Pricing]) -> Iterator[list[Any]]:
    for pricing, setting, priced in priced_runs(outcomes, pricings):
        for cost in priced.timeline.rounds:
            accuracy = priced.accuracy.get(cost.round)
            shown = "" if accuracy is None else f"{accuracy:.4f}"
            yield [
                *_names(pricing, setting, priced),
                cost.round,
                shown,
                *_spent(pricing, priced, cost.round),
                cost.slowest,
            ]


def _targets(outcomes: Outcomes, pricings: Sequence[Pricing]) -> Iterator[list[Any]]:
    for pricing, setting, priced in priced_runs(outcomes, pricings):
        for target in pricing.targets_of(outcomes, setting):
            first = priced.first_round(target)
            spent = [""] * 6 if first is None else [first, *_spent(pricing, priced, first)]
            yield [*_names(pricing, setting, priced), f"{target:g}", *spent]


def priced_runs(outcomes: Outcomes, pricings: Sequence[Pricing]) -> Iterator[tuple[Pricing, str, PricedRun]]:
    """Every run with every profile, and its setting."""
    for pricing in pricings:
        for setting in outcomes.comparison.settings:
            for method in outcomes.comparison.methods:
                for priced in pricing.runs(outcomes, setting, method):
                    yield pricing, setting, priced


def _names(pricing: Pricing, setting: str, priced: PricedRun) -> list[Any]:
    return [pricing.profile.name, setting, priced.run.run.method, priced.run.run.seed]


def _spent(pricing: Pricing, priced: PricedRun, round: int) -> list[str]:
    spent = priced.spent[round]
    cost = spent.cost(pricing.profile.costs)
    return [
        f"{spent.seconds:.6g}",
        f"{spent.megabytes:.6f}",
        f"{spent.joules:.6g}",
        f"{spent.client_joules:.6g}",
        f"{cost:.6g}",
    ]


def write_events(outcomes: Outcomes, pricings: Sequence[Pricing], folder: Path) -> int:
    """An event file for each run and profile; returns how many.

    TensorBoard's axes are whole numbers (steps), so the virtual time is in seconds there, or in milliseconds where a
    whole run takes less than 1,000 seconds, and the traffic in kilobytes.
    """
    every = list(priced_runs(outcomes, pricings))
    short = min(priced.whole.seconds for _, _, priced in every) < 1000
    unit = (1000, "milliseconds") if short else (1, "seconds")
    began = time.time()
    for pricing, setting, priced in every:
        run = priced.run.run
        name = file_stem(setting.replace("/", "-"), f"{run.method.replace('/', '-')}-{run.seed}")
        target = folder / pricing.profile.name / name
        make_folder(target)
        _write_run(EventFile(target, 0), pricing, priced, unit, began)
    return len(every)


def _write_run(events: EventFile, pricing: Pricing, priced: PricedRun, unit: tuple[int, str], began: float) -> None:
    per_second, name = unit
    for round, spent in priced.spent.items():
        at = began + spent.seconds  # so that the axis Wall shows how long the rounds take
        if (accuracy := priced.accuracy.get(round)) is not None:
            by_time, by_traffic = BY_TIME.format(name), BY_TRAFFIC.format("kilobytes")
            events.write(_scalars({by_time: accuracy / 100}), int(per_second * spent.seconds), at)
            events.write(_scalars({by_traffic: accuracy / 100}), spent.bytes // 1000, at)
        values = {"hours": spent.hours, "MB": spent.megabytes, "kWh": spent.kwh}
        if any(pricing.profile.costs.values()):
            values[pricing.profile.currency] = spent.cost(pricing.profile.costs)
        events.write(_scalars({BY_ROUND.format(what): value for what, value in values.items()}), round, at)
    events.close()


def _scalars(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

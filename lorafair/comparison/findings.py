"""What the finished runs of a comparison say: tables, paired differences, and whether all began alike.

Everything is read from the folders of the runs, so it can be asked at any time, also of half the runs.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorafair.comparison.listing import options_text
from lorafair.comparison.plan import Comparison, Options, Run, failure_of
from lorafair.console import format_count
from lorafair.registry import METHODS
from lorafair.reporting.run_dir import Curve, read_metrics, read_result

CONFIDENCE = 0.95
PER_CLIENT = ("accuracy_own_domain", "accuracy_other_domains")  # of methods whose clients keep a model each
# What runs that are compared should have in common, and the options of an entry that explain a difference.
START = {
    "initial_adapter": ("the initial adapter and head", ("model", "data")),
    "images": ("images", ("data",)),
    "frozen_weights": ("frozen weights", ("model",)),
    "clients": ("clients", ("partition", "data")),
}


@dataclass(frozen=True)
class FinishedRun:
    """One final run that is done."""

    run: Run
    result: Mapping[str, Any]
    chosen: Options

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """The scalars of the run."""
        return read_metrics(self.run.folder)

    @property
    def accuracy(self) -> float:
        """Mean over domains, in %."""
        return 100 * float(self.result["mean_accuracy"])


@dataclass(frozen=True)
class Difference:
    """A method against the baseline, pair by pair of runs that differ in the method alone, in points of accuracy."""

    by_pair: Mapping[tuple[str, int], float]  # (setting, seed)

    @property
    def mean(self) -> float:
        """Mean over pairs."""
        return statistics.fmean(self.by_pair.values())

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean, by Student's t over pairs; None for one pair."""
        from scipy.stats import ttest_1samp  # scipy takes a second to import

        values = list(self.by_pair.values())
        if len(values) < 2:
            return None
        if len(set(values)) == 1:  # without spread there is no statistic, and the interval is a point
            return values[0], values[0]
        interval = ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
        return float(interval.low), float(interval.high)

    @property
    def half_width(self) -> float | None:
        """Half of the interval; None for one pair."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def interval_text(self) -> str:
        """The interval for a table."""
        return "–" if self.interval is None else f"{self.interval[0]:+.2f} to {self.interval[1]:+.2f}"


class Findings:
    """The finished runs of a comparison and what follows from them."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.finished: dict[tuple[str, str], list[FinishedRun]] = {}  # (setting, method) -> by seed
        self.missing: list[str] = []
        self.failed: list[str] = []
        self.choices = {(s, m): comparison.choice(s, m) for s in comparison.settings for m in comparison.methods}
        for run in comparison.final_runs:
            state, _ = comparison.state(run)
            choice = self.choices[run.setting, run.method]
            if state == "done" and choice is not None and choice.best is not None:
                done = FinishedRun(run, read_result(run.folder), comparison.candidates[choice.best])
                self.finished.setdefault((run.setting, run.method), []).append(done)
            elif state == "failed":
                reason = failure_of(run) or "; ".join(choice.failures if choice else ())
                self.failed.append(f"{run.name}: {reason}")
            else:
                self.missing.append(f"{run.name} ({state})")

    def runs_of(self, setting: str, method: str) -> list[FinishedRun]:
        """The finished runs of a method in a setting, in the order of seeds."""
        return self.finished.get((setting, method), [])

    def methods(self, setting: str) -> list[str]:
        """Methods with a finished run in the setting, in the order given."""
        return [method for method in self.comparison.methods if self.runs_of(setting, method)]

    def settings(self) -> list[str]:
        """Settings with a finished run."""
        return [setting for setting in self.comparison.settings if self.methods(setting)]

    def domains(self, setting: str) -> list[str]:
        """All domains of the setting's runs, in their order."""
        return list(
            dict.fromkeys(
                d for m in self.methods(setting) for f in self.runs_of(setting, m) for d in f.result["accuracy"]
            )
        )

    def difference(self, method: str, *settings: str) -> Difference | None:
        """The method against the baseline in these settings; None without a common seed."""
        common: dict[tuple[str, int], float] = {}
        for setting in settings:
            theirs = {f.run.seed: f.accuracy for f in self.runs_of(setting, self.comparison.baseline)}
            mine = {f.run.seed: f.accuracy for f in self.runs_of(setting, method)}
            seeds = [seed for seed in self.comparison.seeds if seed in mine and seed in theirs]
            common |= {(setting, seed): mine[seed] - theirs[seed] for seed in seeds}
        return Difference(common) if common else None

    # Tables: header and rows

    def accuracy_table(self, setting: str) -> tuple[list[str], list[list[str]]]:
        """Rows are methods, columns domains, mean, seeds and cost."""
        tuned = ["tuned options"] if self.comparison.tuning else []
        domains = self.domains(setting)
        header = ["method", *domains, "mean", "seeds", *tuned, "MB up + down", "seconds a run"]
        rows = []
        for method in self.methods(setting):
            runs = self.runs_of(setting, method)
            row = [method]
            for domain in domains:
                row.append(
                    _mean_std([100 * f.result["accuracy"][domain] for f in runs if domain in f.result["accuracy"]])
                )
            row += [_mean_std([f.accuracy for f in runs]), str(len(runs))]
            row += [options_text(runs[0].chosen)] if tuned else []
            totals = [f.result.get("totals", {}) for f in runs]
            row.append(f"{statistics.fmean(t.get('bytes', 0) for t in totals) / 1e6:,.2f}")
            row.append(f"{statistics.fmean(t.get('seconds', 0) for t in totals):,.1f}")
            rows.append(row)
        return header, rows

    def per_client_table(self, setting: str) -> tuple[list[str], list[list[str]]]:
        """Methods whose clients keep a model each: on the client's own domain and on the others."""
        rows = []
        for method in self.methods(setting):
            runs = [f for f in self.runs_of(setting, method) if all(key in f.result for key in PER_CLIENT)]
            if runs:
                rows.append([method, *(_mean_std([100 * f.result[key] for f in runs]) for key in PER_CLIENT)])
        return ["method", "own domain", "other domains"], rows

    def difference_table(self, setting: str) -> tuple[list[str], list[list[str]]]:
        """Every other method against the baseline, seed by seed."""
        seeds = self.comparison.seeds
        rows = []
        for method in self.methods(setting):
            difference = self.difference(method, setting) if method != self.comparison.baseline else None
            if difference is None:
                continue
            pairs = difference.by_pair
            by_seed = [f"{pairs[setting, s]:+.2f}" if (setting, s) in pairs else "–" for s in seeds]
            rows.append([method, *by_seed, f"{difference.mean:+.2f}", difference.interval_text])
        return ["method", *(f"seed {seed}" for seed in seeds), "mean", f"{CONFIDENCE:.0%} interval"], rows

    def bias(self, setting: str, name: str = "server/error_before", method: str | None = None) -> Curve:
        """The relative aggregation bias of a method (the baseline) by round, mean over seeds; empty if it has none."""
        runs = self.runs_of(setting, method or self.comparison.baseline)
        curves = [f.curves[name] for f in runs if name in f.curves]
        rounds = sorted(set.intersection(*map(set, curves))) if curves else []
        return {r: statistics.fmean(curve[r] for curve in curves) for r in rounds}

    def bias_table(self, setting: str) -> tuple[list[str], list[list[str]]]:
        """How far plain averaging would have been from the ideal update, and how far the method is."""
        rows = []
        for method in self.methods(setting):
            before = self.bias(setting, "server/error_before", method)
            after = self.bias(setting, "server/error_after", method)
            if before and after:
                values = [c[r] for c in (before, after) for r in (min(before), max(before))]
                values += [statistics.fmean(c.values()) for c in (before, after)]
                rows.append([method, *(f"{value:.3f}" for value in values)])
        places = ("first", "last")
        header = [f"{when}, {place} round" for when in ("before", "after") for place in places]
        return ["method", *header, "before, mean", "after, mean"], rows

    def map_table(self) -> tuple[list[str], list[list[str]]]:
        """Rows are settings in the order of the baseline's bias, columns the other methods' differences to it."""
        others = [m for m in self.comparison.methods if m != self.comparison.baseline]
        rows = []
        for setting in self.settings():
            curve = self.bias(setting)
            if curve:
                found = [self.difference(method, setting) for method in others]
                texts = ["–" if d is None else f"{d.mean:+.2f} ({d.interval_text})" for d in found]
                rows.append((statistics.fmean(curve.values()), setting, texts))
        rows.sort(key=lambda row: -row[0])
        baseline = self.comparison.baseline
        return ["setting", f"bias of {baseline}", *others], [[s, f"{b:.3f}", *texts] for b, s, texts in rows]

    def overall_table(self) -> tuple[list[str], list[list[str]]]:
        """Every other method against the baseline over all settings and seeds."""
        rows = []
        for method in self.comparison.methods:
            difference = self.difference(method, *self.settings()) if method != self.comparison.baseline else None
            if difference is not None:
                above = sum(value > 0 for value in difference.by_pair.values())
                rows.append([method, f"{above} of {len(difference.by_pair)}", f"{difference.mean:+.2f}",
                             difference.interval_text])  # fmt: skip
        return ["method", "pairs above", "mean", f"{CONFIDENCE:.0%} interval"], rows

    # Sentences

    def interval_text(self) -> str:
        """What the intervals cover and how many there are."""
        count = sum(
            1
            for setting in self.settings()
            for method in self.methods(setting)
            if method != self.comparison.baseline and (d := self.difference(method, setting)) and len(d.by_pair) > 1
        )
        if not count:
            return "Differences are paired by seed. With one seed there is no interval, and a difference says little."
        return (
            "Differences are paired by seed. The interval is Student's t over seeds: it covers what a seed draws "
            "(which images are used and how they are dealt out to clients, initial factors, clients of a round, "
            "batches), not other data, models or settings. With few seeds it also rests on the differences being "
            "roughly normal. "
            f"There {'is 1 comparison' if count == 1 else f'are {count} comparisons'}, not corrected for their number: "
            f"if no method differed, about {count * (1 - CONFIDENCE):.1g} of the {count} intervals would leave out "
            "zero by chance."
        )

    def start_text(self) -> str:
        """Whether the methods of a seed and setting began alike, checked by the sums in result.json."""
        differing: list[str] = []
        exceptions: dict[str, None] = {}  # in the order found, each once
        pairs = list(self._pairs_of_equal_start())
        for (finished, reference), (part, (name, groups)) in itertools.product(pairs, START.items()):
            if finished.result["start"][part] == reference.result["start"][part]:
                continue
            method, other, run = finished.run.method, reference.run.method, finished.run
            reason = self._reason(finished, part, groups) or self._reason(reference, part, groups)
            if reason:
                exceptions[f"{method} ({reason})"] = None
            else:
                differing.append(f"{run.setting}, seed {run.seed}: {method} and {other} differ in {name}")
        if differing:
            return f"WARNING: the methods did not begin alike: {'; '.join(differing)}."
        if not pairs:
            return "Whether methods began alike cannot be checked yet: no two of them have finished with the same seed."
        but = f", except where it is part of what is compared: {', '.join(exceptions)}" if exceptions else ""
        return (
            "Same start: for every seed and setting all methods began from the same initial adapter and head, frozen "
            f"weights, images and clients (checked by their sha256 sums){but}."
        )

    def _pairs_of_equal_start(self) -> Iterator[tuple[FinishedRun, FinishedRun]]:
        """Each run with the one of the baseline, or else of the first method, that should have begun like it."""
        for setting, seed in itertools.product(self.settings(), self.comparison.seeds):
            runs = [f for m in self.methods(setting) for f in self.runs_of(setting, m) if f.run.seed == seed]
            if len(runs) > 1:
                reference = next((f for f in runs if f.run.method == self.comparison.baseline), runs[0])
                yield from ((finished, reference) for finished in runs)

    def _reason(self, finished: FinishedRun, part: str, groups: Sequence[str]) -> str:
        """Why this run may differ in a part of its start; empty if nothing explains it."""
        method = self.comparison.methods[finished.run.method]
        name = str(method["method.name"])
        if part == "clients" and METHODS[name].pools_data:
            return "one client has the images of all"
        given = [key for key in (*method, *finished.chosen) if key.partition(".")[0] in groups]
        return f"it sets {', '.join(given)}" if given else ""

    def warnings(self) -> list[str]:
        """Failed and missing runs, and tuned options at the edge of their grid."""
        lines = [f"WARNING: failed: {text}" for text in self.failed]
        if self.missing:
            lines.append(f"Not in this report: {len(self.missing)} of {len(self.comparison.final_runs)} runs: "
                         + ", ".join(self.missing))  # fmt: skip
        tuning = self.comparison.tuning
        at_edge: dict[str, list[str]] = {}
        for (setting, method), choice in self.choices.items():
            if tuning is None or choice is None or choice.best is None:
                continue
            for key, value in self.comparison.candidates[choice.best].items():
                values = tuning.options[key]
                numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
                if numbers and len(values) > 1 and value in (min(values), max(values)):
                    grid = ", ".join(f"{v:g}" for v in values)
                    at_edge.setdefault(f"{key}={value:g}, at the edge of its grid ({grid})", []).append(
                        f"{setting} / {method}"
                    )
        return lines + [
            f"WARNING: tuning chose {what}, for {', '.join(entries)}; a wider grid may change the comparison"
            for what, entries in at_edge.items()
        ]

    def tuning_text(self) -> str:
        """How the options were chosen; empty without tuning."""
        tuning = self.comparison.tuning
        if tuning is None:
            return ""
        rounds = format_count(tuning.rounds, "round") if tuning.rounds else "as many rounds"
        return (
            f"Tuned options: the best of {len(tuning.candidates)} for each method and setting alike, by mean accuracy "
            f"on {tuning.fraction:.0%} of the training images, held out, with seed {tuning.seed} and {rounds}; the "
            "final runs train on all training images."
        )


def _mean_std(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

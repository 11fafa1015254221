"""What runs have recorded, by setting, method and seed, and how methods differ, pair by pair of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from lorafair.comparison.draws import Draws, difference_of
from lorafair.comparison.plan import Options, Run, Tuning
from lorafair.registry import METHODS
from lorafair.reporting.palette import Style, styles
from lorafair.reporting.run_dir import Curve, read_metrics

if TYPE_CHECKING:
    from lorafair.comparison.pricing import Pricing
    from lorafair.comparison.statistics import Estimate, Values

CONFIDENCE = 0.95
Value = Callable[[Mapping[str, Any]], float | None]  # of the content of a result.json
BEFORE, AFTER = "server/error_before", "server/error_after"  # of the relative aggregation bias


class Design(Protocol):
    """What was compared: a `Comparison`, or what the folders of runs tell."""

    @property
    def methods(self) -> Mapping[str, Options]:
        """label -> options, method.name among them."""

    @property
    def settings(self) -> Mapping[str, Options]:
        """label -> options that all methods have there."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds, in their order."""

    @property
    def baseline(self) -> str:
        """The label of the method that the others are compared with."""

    @property
    def tuning(self) -> Tuning | None:
        """How options were chosen, where that is known."""

    @property
    def draws(self) -> Draws | None:
        """What the seeds number, where they are draws."""

    @property
    def decision_level(self) -> float | None:
        """Of one difference, where draws stop once all are decided."""


@dataclass(frozen=True)
class RecordedRun:
    """One final run, done or begun."""

    run: Run
    result: Mapping[str, Any]  # empty for one that is not done
    chosen: Options

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """The scalars of the run."""
        return read_metrics(self.run.folder, in_progress=not self.result)

    @property
    def accuracy(self) -> float:
        """Mean over domains, in %."""
        return 100 * float(self.result["mean_accuracy"])


@dataclass(frozen=True)
class Summary:
    """Numbers of several runs as one: their mean and sample standard deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if not self.values:
            return "–"
        return f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")


@dataclass(frozen=True)
class Difference:
    """A method against the baseline, pair by pair of runs that differ in the method alone, in points of accuracy."""

    by_pair: Mapping[tuple[str, int], float]  # (setting, seed)
    draws: Draws | None = None  # what the seeds number
    level: float | None = None  # of an interval that holds whenever the draws stop

    @property
    def mean(self) -> float:
        """Mean over pairs; of a design, over its whole partitions, where it has any."""
        return statistics.fmean(self.values.ravel().tolist() or self.by_pair.values())

    @cached_property
    def values(self) -> Values:
        """The differences in their order; of draws, one for each, the mean over settings."""
        import numpy as np

        if self.draws is None:
            return np.array(list(self.by_pair.values()))
        by_draw: dict[int, list[float]] = {}
        for (_, draw), value in self.by_pair.items():
            by_draw.setdefault(draw, []).append(value)
        settings = len({setting for setting, _ in self.by_pair})
        return self.draws.table({d: round(statistics.fmean(v), 9) for d, v in by_draw.items() if len(v) == settings})

    @cached_property
    def estimate(self) -> Estimate | None:
        """What is known about the mean; None for one pair."""
        from lorafair.comparison.statistics import estimate

        return estimate(self.values, self.draws.layout if self.draws else "independent")

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean, by Student's t over pairs; None for one pair, or without any spread.

        Of draws that stop once something is decided, by the confidence sequence; None while that is infinite.
        """
        from scipy.stats import ttest_1samp  # scipy takes a second to import

        if self.is_constant:
            return (0.0, 0.0) if self.mean == 0 else None
        if self.level is not None:
            from lorafair.comparison.statistics import confidence_sequence

            low, high = confidence_sequence(self.values, self.level)
            return (low, high) if math.isfinite(low) else None
        if self.draws is not None and self.draws.is_design:
            return None if self.estimate is None else self.estimate.interval(CONFIDENCE)
        values = self.values.tolist()
        if len(values) < 2:
            return None
        interval = ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
        return float(interval.low), float(interval.high)

    @property
    def is_constant(self) -> bool:
        """Whether it is the same on all of several seeds: it tells nothing, coarse accuracies may be so by chance."""
        from lorafair.comparison.statistics import is_constant

        return self.values.size > 1 and is_constant(self.values)

    @property
    def half_width(self) -> float | None:
        """Half of the interval; None for one pair."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def interval_text(self) -> str:
        """The interval for a table."""
        if self.interval is None:
            return "–" if self.level is None else "-inf to +inf"
        return f"{self.interval[0]:+.2f} to {self.interval[1]:+.2f}"

    def __str__(self) -> str:
        return f"{self.mean:+.2f}"


class Outcomes:
    """The runs of a comparison, or of any folders, and what follows from them."""

    def __init__(self, comparison: Design, recorded: Iterable[RecordedRun]) -> None:
        self.comparison = comparison
        self.recorded: dict[tuple[str, str], list[RecordedRun]] = {}  # (setting, method) -> by seed
        for run in recorded:
            self.recorded.setdefault((run.run.setting, run.run.method), []).append(run)
        self.finished = {
            place: done for place, runs in self.recorded.items() if (done := [run for run in runs if run.result])
        }

    def runs_of(self, setting: str, method: str) -> list[RecordedRun]:
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

    @cached_property
    def styles(self) -> dict[str, Style]:
        """The look of each method, the same in all figures."""
        return styles({label: str(options["method.name"]) for label, options in self.comparison.methods.items()})

    def title(self, method: str) -> str:
        """What a method is called in figures and tables: a user's own label stays."""
        options = self.comparison.methods[method]
        title = METHODS.title(method) if method == options["method.name"] else method
        return method if title in self.comparison.methods else title

    def titles(self, methods: Iterable[str]) -> str:
        """Several of them, for a sentence."""
        *first, last = [self.title(method) for method in methods]
        return f"{', '.join(first)} and {last}" if first else last

    @property
    def baseline_title(self) -> str:
        """What the baseline is called."""
        return self.title(self.comparison.baseline)

    def others(self) -> list[str]:
        """All methods but the baseline."""
        return [method for method in self.comparison.methods if method != self.comparison.baseline]

    def difference(
        self, method: str, *settings: str, against: str | None = None, value: Value | None = None
    ) -> Difference | None:
        """The method against the baseline, or `against` another, in these settings; None without a common seed.

        `value` is what is compared, from the content of a result: mean accuracy unless it is given.
        """
        common: dict[tuple[str, int], float] = {}
        for setting in settings:
            theirs = self._values(setting, against or self.comparison.baseline, value)
            mine = self._values(setting, method, value)
            seeds = [seed for seed in self.comparison.seeds if seed in mine and seed in theirs]
            common |= {(setting, seed): difference_of(mine[seed], theirs[seed]) for seed in seeds}
        return Difference(common, self.draws, self.decision_level) if common else None

    def _values(self, setting: str, method: str, value: Value | None) -> dict[int, float]:
        """In %, by seed, of the runs that have it."""
        runs = self.runs_of(setting, method)
        if value is None:
            return {run.run.seed: run.accuracy for run in runs}
        return {run.run.seed: 100 * v for run in runs if (v := value(run.result)) is not None}

    @property
    def draws(self) -> Draws | None:
        """What the seeds number, where they are draws."""
        return getattr(self.comparison, "draws", None)

    @property
    def decision_level(self) -> float | None:
        """Of one difference, where draws stop once all are decided."""
        return getattr(self.comparison, "decision_level", None)

    @cached_property
    def pricings(self) -> list[Pricing]:
        """The profiles with which runs are priced. Raises ConfigError for one that cannot be read."""
        profiles = getattr(self.comparison, "profiles", ())
        if not profiles:
            return []
        from lorafair.comparison.pricing import pricings_of

        return pricings_of(profiles, getattr(self.comparison, "targets", ()))

    @property
    def unit(self) -> str:
        """What runs of one method and setting differ in."""
        return "seed" if self.draws is None else "draw"

    @property
    def interval_name(self) -> str:
        """What the intervals of differences are called."""
        level = self.decision_level
        return f"{100 * (CONFIDENCE if level is None else 1 - level):.4g}% interval"

    def differences(self, setting: str) -> dict[str, Difference]:
        """Every other method against the baseline in a setting, where they have a common seed."""
        found = {method: self.difference(method, setting) for method in self.others()}
        return {method: difference for method, difference in found.items() if difference is not None}

    def bias(self, setting: str, name: str = BEFORE, method: str | None = None) -> Curve:
        """The relative aggregation bias of a method (the baseline) by round, mean over seeds; empty if it has none."""
        runs = self.runs_of(setting, method or self.comparison.baseline)
        return mean_curve([f.curves[name] for f in runs if name in f.curves])


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at the rounds that all have."""
    return {r: statistics.fmean(curve[r] for curve in curves) for r in common_rounds(curves)}


def common_rounds(curves: Sequence[Curve]) -> list[int]:
    """The rounds that all have."""
    return sorted(set.intersection(*map(set, curves))) if curves else []

"""Runs priced with a profile: what they take in virtual time, energy and traffic, and until they reach an accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafair.aggregation.registry import method_of
from lorafair.comparison.folders import options_of
from lorafair.comparison.outcomes import Outcomes, RecordedRun
from lorafair.comparison.tables import Cell, Table
from lorafair.config.loading import load_config_of_run
from lorafair.config.profiles import Profile, read_profile
from lorafair.console import format_count
from lorafair.errors import ConfigError
from lorafair.model.work import flop_per_image
from lorafair.reporting.run_dir import Curve
from lorafair.virtual_time.devices import Devices
from lorafair.virtual_time.record import has_work, read_work
from lorafair.virtual_time.timeline import Spent, Timeline, timeline

ACCURACY = "eval/accuracy"
_TIME = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_ENERGY = ((3.6e6, "kWh"), (3.6e3, "Wh"), (1.0, "J"))
_TRAFFIC = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class PricedRun:
    """One run in virtual time."""

    run: RecordedRun
    timeline: Timeline
    accuracy: Curve  # mean over domains in %, by round

    @property
    def spent(self) -> dict[int, Spent]:
        """By completed rounds."""
        return self.timeline.spent()

    @property
    def whole(self) -> Spent:
        """What all rounds have taken."""
        return list(self.spent.values())[-1]

    @property
    def best(self) -> float:
        """The highest accuracy in %."""
        return max(self.accuracy.values())

    def first_round(self, target: float) -> int | None:
        """The first round after which the accuracy is at least `target` %; None where it never is."""
        return next((r for r, value in sorted(self.accuracy.items()) if value >= target), None)


class Pricing:
    """The runs of some folders, or of a comparison, priced with one profile."""

    def __init__(self, profile: Profile, targets: Sequence[float] = ()) -> None:
        self.profile, self.targets = profile, tuple(targets)
        self._priced: dict[Path, PricedRun] = {}

    def runs(self, outcomes: Outcomes, setting: str, method: str) -> list[PricedRun]:
        """The runs that have recorded their work and an accuracy."""
        recorded = outcomes.recorded.get((setting, method), [])
        return [self.of(run) for run in recorded if has_work(run.run.folder) and run.curves.get(ACCURACY)]

    def of(self, run: RecordedRun) -> PricedRun:
        """One run. ConfigError where it has recorded no work."""
        folder = run.run.folder
        if folder not in self._priced:
            options, works = options_of(folder), read_work(folder)
            accuracy = {r: 100 * value for r, value in run.curves.get(ACCURACY, {}).items()}
            works = [work for work in works if work.round <= max(accuracy, default=0)]
            flop = _flop(folder, options, works[-1].classes) if self.profile.needs_flop and works else None
            own = options.get("federation.seed")
            devices = Devices(self.profile, int(options.get("seed", 0) if own is None else own))
            self._priced[folder] = PricedRun(run, timeline(works, devices, flop), accuracy)
        return self._priced[folder]

    def targets_of(self, outcomes: Outcomes, setting: str) -> tuple[float, ...]:
        """Accuracies in %: those given, else the highest that all runs of the setting reach, in steps of 0.1."""
        if self.targets:
            return self.targets
        best = [run.best for method in outcomes.comparison.methods for run in self.runs(outcomes, setting, method)]
        return (math.floor(10 * min(best)) / 10,) if best else ()


_flop_of_models: dict[str, int] = {}


def _flop(folder: Path, options: Mapping[str, Any], classes: int) -> int:
    """Operations for each image in the model of a run; counted once for all runs of a model."""
    of_model = {key: value for key, value in options.items() if key.partition(".")[0] in ("model", "method", "plugins")}
    key = repr((sorted(of_model.items()), classes))
    if key not in _flop_of_models:
        config = load_config_of_run(folder)
        _flop_of_models[key] = flop_per_image(config.model, classes, method_of(config).core)
    return _flop_of_models[key]


def pricings_of(profiles: Iterable[str], targets: Sequence[float] = ()) -> list[Pricing]:
    """One for each profile. Raises ConfigError for a profile that cannot be read."""
    return [Pricing(read_profile(profile), targets) for profile in profiles]


def chose_with_other_devices(outcomes: Outcomes, pricing: Pricing) -> list[str]:
    """The runs whose federation.profile gives the clients other devices than this profile."""
    found = []
    for runs in outcomes.recorded.values():
        for run in runs:
            theirs = options_of(run.run.folder).get("federation.profile")
            if theirs is not None and has_work(run.run.folder) and not _is_alike(str(theirs), pricing.profile):
                found.append(str(run.run.folder))
    return found


def _is_alike(theirs: str, profile: Profile) -> bool:
    """Whether a profile, which may be gone since, has the same devices."""
    try:
        return read_profile(theirs).fingerprint == profile.fingerprint
    except ConfigError:
        return False


def pricing_table(outcomes: Outcomes, setting: str, pricing: Pricing) -> Table:
    """What each method takes until it reaches each target, and for all of its rounds; means over seeds."""
    runs = {m: found for m in outcomes.comparison.methods if (found := pricing.runs(outcomes, setting, m))}
    if not runs:
        return Table("", ["method"], [])
    targets = pricing.targets_of(outcomes, setting)
    measures = _measures([run.whole for found in runs.values() for run in found], pricing.profile)
    header = ["method"]
    for target in targets:
        header += [f"reach {target:g} %", "rounds", *(measure.name for measure in measures)]
    header += [f"{measure.name} in all" for measure in measures]
    rows: list[list[Cell]] = []
    for method, found in runs.items():
        row: list[Cell] = [outcomes.title(method)]
        for target in targets:
            reached = [(run.spent[first], first) for run in found if (first := run.first_round(target)) is not None]
            row += [f"{len(reached)} of {len(found)}", _text([float(first) for _, first in reached])]
            row += [measure.text([spent for spent, _ in reached]) for measure in measures]
        rows.append([*row, *(measure.text([run.whole for run in found]) for measure in measures)])
    return Table(_caption(outcomes, setting, pricing), header, rows)


def _caption(outcomes: Outcomes, setting: str, pricing: Pricing) -> str:
    recorded = [run for m in outcomes.comparison.methods for run in outcomes.recorded.get((setting, m), [])]
    without = sum(not has_work(run.run.folder) for run in recorded)
    return (
        f"Profile {pricing.profile.name}: virtual time, traffic and energy to reach an accuracy, and of all rounds"
        + (f"; {format_count(without, 'run')} without recorded work left out" if without else "")
    )


@dataclass(frozen=True)
class _Measure:
    """A number of a table: its name with the unit, and how it follows from what a run has taken."""

    name: str
    value: Callable[[Spent], float]

    def text(self, spent: Sequence[Spent]) -> str:
        """Mean, and standard deviation of several."""
        return _text([self.value(each) for each in spent])


def _measures(spent: Sequence[Spent], profile: Profile) -> list[_Measure]:
    """Time, traffic, energy and, where the profile has prices, costs: in the units of the largest numbers."""
    second, time = _unit(_TIME, max(each.seconds for each in spent))
    byte, traffic = _unit(_TRAFFIC, max(each.bytes for each in spent))
    joule, energy = _unit(_ENERGY, max(each.joules for each in spent))
    measures = [
        _Measure(time, lambda each: each.seconds / second),
        _Measure(traffic, lambda each: each.bytes / byte),
        _Measure(energy, lambda each: each.joules / joule),
    ]
    if any(profile.costs.values()):
        measures.append(_Measure(profile.currency, lambda each: each.cost(profile.costs)))
    return measures


def _unit(units: Sequence[tuple[float, str]], largest: float) -> tuple[float, str]:
    """The largest unit of which there is at least one and a half."""
    return next(((size, name) for size, name in units if largest >= 1.5 * size), units[-1])


def _text(values: Sequence[float]) -> str:
    """Mean and standard deviation with three digits, of equal values the value; a dash for none."""
    if not values:
        return "–"
    mean = _digits(statistics.fmean(values))
    return mean if len(set(map(_digits, values))) == 1 else f"{mean} ± {_digits(statistics.stdev(values))}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def unit_of_time(runs: Iterable[PricedRun]) -> tuple[float, str]:
    """Seconds of the unit for a figure of these runs, and its name."""
    return _unit(_TIME, max(run.whole.seconds for run in runs))

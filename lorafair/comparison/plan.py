"""A comparison: its runs, which of them are done, and what tuning has chosen.

Nothing heavy is imported. Whether a run is done is read from its folder and nowhere else, so that any number of jobs
can work on a comparison.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorafair import __version__
from lorafair.comparison.draws import LEVEL, Draws, difference_of
from lorafair.config.identity import differences, run_identity
from lorafair.config.loading import load_config_of_run
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.reporting.run_dir import CONFIG_FILE, RESULT_FILE, read_result, version_of

State = Literal["done", "unfinished", "failed", "waiting for tuning", "not needed"]
Options = Mapping[str, Any]  # dotted key -> value

SECTION = "compare"
FAILED = "failed.txt"
REPORT = "report"  # the folder of the report's TensorBoard events


@dataclass(frozen=True)
class Tuning:
    """A grid that is tried alike for each method and setting, on held-out training images."""

    options: Mapping[str, tuple[Any, ...]]
    seed: int
    fraction: float
    rounds: int | None

    @property
    def candidates(self) -> tuple[dict[str, Any], ...]:
        """Every combination of the options' values, the last option changing fastest."""
        return tuple(
            dict(zip(self.options, values, strict=True)) for values in itertools.product(*self.options.values())
        )


@dataclass(frozen=True)
class Run:
    """One run of a comparison. Which options a final run has may depend on tuning: `Comparison.config`."""

    index: int
    setting: str
    method: str
    seed: int
    folder: Path
    candidate: int | None  # of a tuning run, the number of its combination of options; None: a final run

    @property
    def name(self) -> str:
        """For lines on the console."""
        kind = "" if self.candidate is None else " (tuning)"
        return f"{self.setting} / {self.folder.name}{kind}"


@dataclass(frozen=True)
class Choice:
    """What tuning says about one method in one setting, all runs of its grid being done or failed."""

    best: int | None  # the candidate; None: all failed
    accuracies: tuple[float | None, ...]  # mean accuracy of each candidate on the held-out images; None: failed
    failures: tuple[str, ...]  # one line for each failed candidate


@dataclass(frozen=True)
class Comparison:
    """The runs to compare."""

    folder: Path
    methods: Mapping[str, Options]
    settings: Mapping[str, Options]
    seeds: tuple[int, ...]
    baseline: str
    tuning: Tuning | None
    configs: Mapping[tuple[str, str, int], Config] = field(repr=False)  # (setting, method, candidate), first seed
    runs: tuple[Run, ...] = field(repr=False)  # tuning runs first
    arguments: tuple[str, ...] = ()  # the files and pairs that declare it
    draws: Draws | None = None  # what `seeds` number, where they are draws
    share_training: bool = True  # of runs of a draw that begin alike
    profiles: tuple[str, ...] = ()  # with which the report prices the runs
    targets: tuple[float, ...] = ()  # accuracies in %, for these prices
    _accuracies: dict[Path, float] = field(default_factory=dict, repr=False, compare=False)  # of done runs, as read
    _stops: dict[tuple[str, str], int] = field(default_factory=dict, repr=False, compare=False)  # decisions so far

    @property
    def candidates(self) -> tuple[dict[str, Any], ...]:
        """The combinations of tuned options; a single empty one without tuning."""
        return self.tuning.candidates if self.tuning else ({},)

    @property
    def final_runs(self) -> tuple[Run, ...]:
        """The runs that are reported."""
        return tuple(run for run in self.runs if run.candidate is None)

    @property
    def in_order(self) -> tuple[Run, ...]:
        """All runs as one process does them: tuning first, then draw by draw, so that what is done is paired."""
        place = {seed: number for number, seed in enumerate(self.seeds)}
        return tuple(sorted(self.runs, key=lambda run: (0, 0) if run.candidate is not None else (1, place[run.seed])))

    def tuning_runs(self, setting: str, method: str) -> tuple[Run, ...]:
        """The runs of a grid, in the order of `candidates`; none without tuning."""
        return tuple(r for r in self.runs if r.candidate is not None and (r.setting, r.method) == (setting, method))

    def config(self, run: Run, candidate: int | None = None) -> Config:
        """The run's configuration; of a final run, with the options of this candidate (the first)."""
        number = run.candidate if run.candidate is not None else candidate or 0
        config = self.configs[run.setting, run.method, number]
        config = dataclasses.replace(config, seed=run.seed, run_dir=run.folder)
        if self.draws is not None and run.candidate is None:
            config = self.draws.config(config, run.seed)
        if run.candidate is None or self.tuning is None:
            return config
        data = dataclasses.replace(config.data, validation_fraction=self.tuning.fraction)
        return dataclasses.replace(config, data=data, rounds=self.tuning.rounds or config.rounds)

    def choice(self, setting: str, method: str) -> Choice | None:
        """What tuning has chosen, ties going to the candidate that comes first; None while some of its runs are left.

        Raises ConfigError as `state_of` does.
        """
        if self.tuning is None:
            return Choice(best=0, accuracies=(None,), failures=())
        accuracies: list[float | None] = []
        failures = []
        for run in self.tuning_runs(setting, method):
            state = state_of(run, self.config(run))
            if state == "unfinished":
                return None
            if state == "failed":
                failures.append(f"{run.folder.name}: {failure_of(run)}")
            accuracies.append(None if state == "failed" else float(read_result(run.folder)["mean_accuracy"]))
        finished = [(-accuracy, number) for number, accuracy in enumerate(accuracies) if accuracy is not None]
        return Choice(min(finished)[1] if finished else None, tuple(accuracies), tuple(failures))

    def state(self, run: Run) -> tuple[State, Config | None]:
        """How far a run is, and its configuration where tuning does not stand in between. Raises as `state_of`."""
        if run.candidate is not None:
            return state_of(run, self.config(run)), self.config(run)
        choice = self.choice(run.setting, run.method)
        if choice is None:
            return "waiting for tuning", None
        if choice.best is None:
            return "failed", None
        config = self.config(run, choice.best)
        state = state_of(run, config)
        return ("not needed" if state == "unfinished" and self.stopped_before(run) else state), config

    @property
    def decision_level(self) -> float | None:
        """Of one difference, so that LEVEL is that of all (Bonferroni); None where draws do not stop."""
        if self.draws is None or not self.draws.until_decided:
            return None
        return LEVEL / max(1, (len(self.methods) - 1) * len(self.settings))

    def stopped_before(self, run: Run) -> int | None:
        """The number of draws with which all that this run is for was decided; None where it is needed."""
        if self.draws is None or self.decision_level is None or run.candidate is not None:
            return None
        others = [m for m in self.methods if m != self.baseline] if run.method == self.baseline else [run.method]
        stops = [self._decided_after(run.setting, method, run.seed) for method in others]
        return max((stop for stop in stops if stop), default=None) if all(stops) else None

    def _decided_after(self, setting: str, method: str, draw: int) -> int | None:
        """With how many draws, all of them before `draw`."""
        assert self.draws is not None
        assert self.decision_level is not None
        if (setting, method) in self._stops and self._stops[setting, method] <= draw:
            return self._stops[setting, method]
        begun = draw - draw % self.draws.batch  # a batch that has begun is completed
        theirs, mine = (self._known(setting, m, begun) for m in (self.baseline, method))
        common = {d: difference_of(mine[d], theirs[d]) for d in sorted(mine.keys() & theirs.keys())}
        stop = self.draws.decided_after(common, self.decision_level)
        if stop is None or stop > draw:
            return None
        return self._stops.setdefault((setting, method), stop)

    @cached_property
    def _final(self) -> dict[tuple[str, str], list[Run]]:
        final: dict[tuple[str, str], list[Run]] = {}
        for run in self.final_runs:
            final.setdefault((run.setting, run.method), []).append(run)
        return final

    def _known(self, setting: str, method: str, before: int) -> dict[int, float]:
        """draw -> accuracy in % of the runs that are done."""
        known = {}
        for run in self._final[setting, method]:
            if run.seed >= before:
                continue
            if run.folder not in self._accuracies and (run.folder / RESULT_FILE).exists():
                result = read_result(run.folder)
                if result["rounds"] == self.configs[setting, method, 0].rounds:
                    self._accuracies[run.folder] = 100 * float(result["mean_accuracy"])
            if run.folder in self._accuracies:
                known[run.seed] = self._accuracies[run.folder]
        return known

    def waits_for(self, run: Run) -> list[int]:
        """Indices of the tuning runs that are left to do before a final run."""
        if run.candidate is not None:
            return []
        grid = self.tuning_runs(run.setting, run.method)
        return [r.index for r in grid if state_of(r, self.config(r)) == "unfinished"]


def check_folders(comparison: Comparison) -> None:
    """Raise ConfigError if a folder holds a run that is not the one this comparison would put there."""
    for run in comparison.runs:
        comparison.state(run)


def state_of(run: Run, config: Config) -> State:
    """How far the run in this folder is.

    Raises ConfigError, which names the folder and the difference, if the folder holds a run with other settings, of
    another version of lorafair, or with more rounds.
    """
    folder = run.folder
    result = read_result(folder) if (folder / RESULT_FILE).exists() else None
    _check_version(folder, result)
    if result is not None:
        _check_settings(folder, result.get("config", {}), config)
        if result["rounds"] > config.rounds:
            raise ConfigError(
                f"{folder} holds a run of {result['rounds']} rounds, more than the {config.rounds} of this comparison; "
                "set more rounds, or another run_dir for the comparison"
            )
        if result["rounds"] == config.rounds:
            return "done"
    elif (folder / CONFIG_FILE).exists():
        try:
            begun = load_config_of_run(folder)
        except ConfigError as error:
            raise ConfigError(f"{folder} holds something else than a run of this comparison: {error}") from error
        _check_settings(folder, run_identity(begun), config)
    return "failed" if (folder / FAILED).exists() else "unfinished"


def failure_of(run: Run) -> str:
    """Why a run failed, as its folder says; empty if it does not."""
    file = run.folder / FAILED
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""


def _check_version(folder: Path, result: Mapping[str, Any] | None) -> None:
    versions = [version_of(folder)]
    if result is not None:
        versions.append(str(result["versions"].get("lorafair", "an unknown version")))
    for version in versions:
        if version not in (None, __version__):
            raise ConfigError(
                f"{folder} was made by lorafair {version}, this is {__version__}, and a comparison does not mix "
                "versions: choose another run_dir for the comparison, or remove that folder to repeat the run"
            )


def _check_settings(folder: Path, theirs: Mapping[str, Any], config: Config) -> None:
    differing = differences(theirs, run_identity(config))
    if differing:
        raise ConfigError(
            f"{folder} holds a run with other settings: {differing}. Choose another run_dir for the comparison, or "
            "remove that folder to repeat the run"
        )

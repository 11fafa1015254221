"""From folders to the runs in them: of comparisons, or any runs. Nothing heavy is imported."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorafair.comparison.draws import DESIGN_SEEDS
from lorafair.comparison.outcomes import Outcomes, RecordedRun
from lorafair.comparison.plan import Run, failure_of
from lorafair.comparison.record import Record, read_record
from lorafair.config.identity import flatten
from lorafair.config.options import all_options, option_of
from lorafair.config.schema import Config
from lorafair.console import format_count
from lorafair.errors import ConfigError, did_you_mean
from lorafair.registry import METHODS
from lorafair.reporting.run_dir import CONFIG_FILE, METRICS_FILE, RESULT_FILE, read_result

_DEPTH = 3  # folders below the given one in which runs are looked for
_TUNING = "tuning"  # the folder of a comparison's tuning runs, which no figure shows
_OF_SEED = re.compile(r"(?P<label>.+)-(?:seed\d+|draw(?P<draw>\d+))")


@dataclass(frozen=True)
class FoundRun:
    """A run in a folder."""

    folder: Path
    setting: str
    options: Mapping[str, Any]  # all of config.yaml, by dotted key

    @property
    def seed(self) -> int:
        """Its seed; of a design of draws, the number of the draw."""
        return int(self.options.get("seed", 0)) if self._draw is None else self._draw

    @property
    def _draw(self) -> int | None:
        match = _OF_SEED.fullmatch(self.folder.name)
        designed = (
            match is not None and match["draw"] and all(self.options.get(key) is not None for key in DESIGN_SEEDS)
        )
        return int(match["draw"]) if match is not None and designed else None

    @property
    def method(self) -> str:
        """The name of its method."""
        return str(self.options.get("method.name", "?"))

    @property
    def rounds(self) -> int:
        """How many it is to have."""
        return int(self.options.get("rounds", 0))

    def labels(self) -> Iterator[str]:
        """What it may be called, the shortest first."""
        match = _OF_SEED.fullmatch(self.folder.name)
        short = match["label"] if match else self.folder.name
        yield short
        yield f"{self.folder.parent.name}/{short}"
        yield f"{self.folder.parent.name}/{self.folder.name}"
        yield str(self.folder)

    def identity(self) -> str:
        """Equal for runs that differ in their seeds alone."""
        kept = {
            key: value for key, value in self.options.items() if key in _identity_keys() or key.startswith("method.")
        }
        if self._draw is not None:
            kept = {key: value for key, value in kept.items() if key not in DESIGN_SEEDS}
        return json.dumps(kept, sort_keys=True, default=str)


def read_folders(places: Sequence[Path], baseline: str | None = None) -> tuple[Outcomes, list[str]]:
    """The runs in these folders, and lines about those that are not finished.

    Raises ConfigError for a place without a run, and for a baseline that is none of the methods.
    """
    records = {place: read_record(place) for place in places}
    found: list[FoundRun] = []
    for place in places:
        inside = list(_found_in(place, several=len(places) > 1))
        if not inside:
            raise ConfigError(_no_run(place))
        known = {run.folder for run in found}
        found += [run for run in inside if run.folder not in known]
    labels = _labels(found)
    record = _record_of(found, labels, [r for r in records.values() if r is not None], baseline)
    recorded: list[RecordedRun] = []
    notes: dict[str, list[str]] = {}  # what is to be said -> of which folders
    for index, run in enumerate(sorted(found, key=lambda run: run.seed)):
        if not (run.folder / METRICS_FILE).is_file():
            notes.setdefault("has recorded no round yet", []).append(str(run.folder))
            continue
        done, note = _recorded(index, run, labels[run.folder])
        recorded.append(done)
        if note:
            notes.setdefault(note, []).append(str(run.folder))
    if not recorded:
        raise ConfigError(f"{next(iter(notes.values()))[0]} has recorded no round yet, so there is nothing to show")
    return Outcomes(record, recorded), [_line(what, folders) for what, folders in notes.items()]


def _line(what: str, folders: Sequence[str]) -> str:
    also = f" (and {format_count(len(folders) - 1, 'other run')})" if len(folders) > 1 else ""
    return f"{folders[0]}{also} {what}"


def _found_in(place: Path, *, several: bool) -> Iterator[FoundRun]:
    place = place.resolve()
    if _is_run(place):
        yield FoundRun(place, "", options_of(place))
        return
    runs = sorted(_runs_below(place, _DEPTH))
    for folder in runs:
        *between, _ = folder.relative_to(place).parts
        setting = "/".join([place.name, *between] if several else between)
        yield FoundRun(folder, setting, options_of(folder))


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    for below in folder.iterdir() if folder.is_dir() else ():
        if below.is_dir() and below.name != _TUNING and not below.name.startswith("."):
            if _is_run(below):
                yield below
            elif depth > 1:
                yield from _runs_below(below, depth - 1)


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _no_run(place: Path) -> str:
    ask = "give the directory of a run, a folder with runs, or that of a comparison"
    around = next((folder for folder in place.absolute().parents if _is_run(folder)), None)
    if around is not None and place.exists():
        return f"{place} is a part of the run {around}; give that directory"
    if place.suffix in (".yaml", ".yml"):
        return f"{place} is a configuration and no run; {ask}, for example runs/{place.stem}"
    if not place.exists():
        beside = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
        return f"there is no {place}; {did_you_mean(place.name, beside, f'{place.parent}/')}{ask}"
    return f"{place} is no run, and no run is below it: a run has a {CONFIG_FILE}; {ask}"


def options_of(folder: Path) -> dict[str, Any]:
    """config.yaml with dotted keys. It was written by lorafair, so it is read without checks, which take time."""
    file = folder / CONFIG_FILE
    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(loaded, dict):
            raise ValueError("it is not the configuration of a run")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())}); leave this run out") from error
    return flatten(loaded)


@functools.cache
def _identity_keys() -> set[str]:
    return {key for key, declared in all_options(Config) if option_of(declared).identity and key != "seed"}


def _labels(found: Sequence[FoundRun]) -> dict[Path, str]:
    """folder -> label: runs of one label and setting differ in their seeds alone, each of which is there once."""
    labels = {run.folder: next(run.labels()) for run in found}
    for level in range(1, len(list(found[0].labels()))):
        groups: dict[tuple[str, str], list[FoundRun]] = {}
        for run in found:
            groups.setdefault((run.setting, labels[run.folder]), []).append(run)
        for runs in groups.values():
            alike = len({run.identity() for run in runs}) == 1 and len({run.seed for run in runs}) == len(runs)
            if not alike:
                labels |= {run.folder: list(run.labels())[level] for run in runs}
    return labels


def _record_of(
    found: Sequence[FoundRun], labels: Mapping[Path, str], records: Sequence[Record], baseline: str | None
) -> Record:
    """What was compared: in the order of the comparisons' own records, else in that of the registry."""
    there = {labels[run.folder]: {"method.name": run.method} for run in found}
    recorded = [label for record in records for label in record.methods]
    known = {name: number for number, name in enumerate(METHODS.names)}
    others = [label for label in there if label not in recorded]
    others.sort(key=lambda label: (known.get(there[label]["method.name"], len(known)), label))
    methods = {label: there[label] for label in [*dict.fromkeys(recorded), *others] if label in there}
    settings = [s for record in records for s in record.settings]
    mine = {run.setting for run in found}
    settings = [s for s in dict.fromkeys([*settings, *(run.setting for run in found)]) if s in mine]
    if baseline is not None and baseline not in methods:
        named = {METHODS.title(label): label for label in methods}
        if baseline not in named:
            hint = did_you_mean(baseline, methods)
            raise ConfigError(f"baseline {baseline} is none of the methods; {hint}methods: {', '.join(methods)}")
        baseline = named[baseline]
    candidates = [*([baseline] if baseline else []), *(record.baseline for record in records), "fedit", *methods]
    chosen = next(label for label in candidates if label in methods)
    seeds = tuple(sorted({run.seed for run in found}))
    alone = records[0] if len(records) == 1 else None  # of several comparisons no one design holds for all
    draws, level = (alone.draws, alone.decision_level) if alone else (None, None)
    profiles, targets = (alone.profiles, alone.targets) if alone else ((), ())
    return Record(methods, {s: {} for s in settings}, seeds, chosen, None, draws, level, profiles, targets)


def _recorded(index: int, run: FoundRun, label: str) -> tuple[RecordedRun, str]:
    """The run, and a line about one that is not finished."""
    result = read_result(run.folder) if (run.folder / RESULT_FILE).is_file() else {}
    of_comparison = Run(index, run.setting, label, run.seed, run.folder, None)
    if result.get("rounds") == run.rounds:
        return RecordedRun(of_comparison, result, {}), ""
    unfinished = RecordedRun(of_comparison, {}, {})
    if failure := failure_of(of_comparison):
        return unfinished, f"has failed: {failure}"
    completed = max((r for curve in unfinished.curves.values() for r in curve), default=0)
    return unfinished, f"is not finished: {completed} of {run.rounds} rounds are shown"

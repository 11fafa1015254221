"""Any network priced without retraining: runs in the virtual time of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafair.config.profiles import check_target, read_profile, shipped_profiles
from lorafair.console import format_count, log, some, table
from lorafair.errors import ConfigError, LorafairError

if TYPE_CHECKING:
    from lorafair.comparison.outcomes import Outcomes
    from lorafair.comparison.pricing import Pricing

_FOLDER = "timeline"


@dataclass(frozen=True)
class Wanted:
    """What `lorafair timeline` is to price, and where its files go."""

    places: Sequence[Path]
    profiles: Sequence[str] = ()
    targets: Sequence[float] = ()
    formats: Sequence[str] = ("png",)
    out: Path | None = None
    only_list: bool = False


def timeline_command(wanted: Wanted) -> int:
    """Print a table for each profile, and write curves, CSV and a figure; returns the exit status."""
    if wanted.only_list:
        shipped = shipped_profiles()
        for name in shipped:
            log.info(f"{name:{max(map(len, shipped))}}  {read_profile(name).about}")
        return 0
    if not wanted.places:
        raise ConfigError(
            "lorafair timeline needs a RUN: a run directory, a folder with runs, or a comparison's folder"
        )
    if not wanted.profiles:
        raise ConfigError(
            f"lorafair timeline needs --profile: a YAML file or one of {', '.join(shipped_profiles())} (--list)"
        )
    targets = [check_target(target, "--target") for target in wanted.targets]
    for name in wanted.profiles:
        read_profile(name)

    from lorafair.comparison.figures import check_formats, draw_figures
    from lorafair.comparison.folders import read_folders
    from lorafair.comparison.pricing import pricings_of
    from lorafair.comparison.timeline_files import write_csv, write_events

    check_formats(wanted.formats)
    outcomes, notes = read_folders(wanted.places)
    for note in [*notes, *_without_work(outcomes)]:
        log.info(note)
    outcomes.pricings = pricings_of(dict.fromkeys(wanted.profiles), targets)
    for note in _chosen_elsewhere(outcomes):
        log.info(note)
    _check_reached(outcomes, outcomes.pricings, targets)
    for pricing in outcomes.pricings:
        _print(outcomes, pricing)
    out = wanted.out or (wanted.places[0] if len(wanted.places) == 1 else Path()) / _FOLDER
    tables = write_csv(outcomes, outcomes.pricings, out)
    count = write_events(outcomes, outcomes.pricings, out)
    figures = draw_figures(outcomes, ["time"], "page" if len(outcomes.pricings) > 1 else "column")
    paths = figures.save(out, wanted.formats)
    log.info(f"tables:   {', '.join(map(str, tables))}")
    log.info(f"figures:  {', '.join(map(str, paths))}")
    log.info(f"curves:   {format_count(count, 'run')}: tensorboard --logdir {out}")
    return 0


def _print(outcomes: Outcomes, pricing: Pricing) -> None:
    from lorafair.comparison.pricing import pricing_table

    for setting in outcomes.comparison.settings:
        found = pricing_table(outcomes, setting, pricing)
        if found.rows:
            where = f"Setting {setting}. " if len(outcomes.comparison.settings) > 1 else ""
            log.info(f"\n{where}{found.caption}\n{table(found.header, found.texts)}")
    log.info("")


def _without_work(outcomes: Outcomes) -> list[str]:
    """A line about runs that have not recorded their work. ConfigError with the reason where that is so of all."""
    from lorafair.virtual_time.record import has_work, read_work

    runs = [run for runs in outcomes.recorded.values() for run in runs]
    without = [str(run.run.folder) for run in runs if not has_work(run.run.folder)]
    if len(without) == len(runs):
        read_work(runs[0].run.folder)  # raises
    if not without:
        return []
    count = format_count(len(without), "run")
    return [f"{count} without recorded work, or not of all rounds, left out: {some(without)}"]


def _chosen_elsewhere(outcomes: Outcomes) -> list[str]:
    """A line for each profile with which other clients of some runs would have been late or away."""
    from lorafair.comparison.pricing import chose_with_other_devices

    notes = []
    for pricing in outcomes.pricings:
        others = chose_with_other_devices(outcomes, pricing)
        if others:
            notes.append(
                f"{format_count(len(others), 'run')} chose clients with another federation.profile than "
                f"{pricing.profile.name}; it prices the clients that were chosen then: {some(others)}"
            )
    return notes


def _check_reached(outcomes: Outcomes, pricings: Sequence[Pricing], targets: Sequence[float]) -> None:
    """Raise LorafairError for a target that no run reaches, and where nothing has been evaluated yet."""
    from lorafair.comparison.timeline_files import priced_runs

    runs = [priced for _, _, priced in priced_runs(outcomes, pricings[:1])]
    if not runs:
        raise LorafairError("no run has recorded its work and an accuracy yet, so there is nothing to price")
    best = max(runs, key=lambda run: run.best)
    for target in targets:
        if target > best.best:
            raise LorafairError(
                f"--target={target:g}: no run reaches {target:g} %; the highest accuracy is {best.best:.1f} % "
                f"({best.run.run.folder}); name a lower one, or leave it out for the highest that all runs reach"
            )

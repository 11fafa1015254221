"""Compare methods: all runs of a comparison, or a part of them, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorafair.cluster.saved import begin_start, continues, note_resume
from lorafair.cluster.signals import Interrupted, handle_only, handling_signals
from lorafair.commands.run import RunResult, check_called_once, check_child_can_know, limited_checks, show_child
from lorafair.comparison.plan import Comparison
from lorafair.comparison.section import load_comparison
from lorafair.config.layers import flat_arguments
from lorafair.console import format_count, log, printing
from lorafair.errors import ConfigError
from lorafair.launch import in_place, launch, let_idle_threads_sleep, resolve_placement, run_until_stopped


@dataclass(frozen=True)
class Part:
    """Which part of a comparison to do."""

    index: int | None = None  # only this run
    only_tuning: bool = False
    only_list: bool = False
    only_report: bool = False


@dataclass(frozen=True)
class ComparisonResult:
    """The results in a comparison's folder."""

    comparison: Comparison

    @property
    def folder(self) -> Path:
        """The folder with the runs, report.md, results.csv and the plots."""
        return self.comparison.folder

    @cached_property
    def runs(self) -> dict[tuple[str, str, int], RunResult]:
        """(setting, method, seed) -> the result of each final run that is done."""
        return {
            (run.setting, run.method, run.seed): RunResult(run.folder)
            for run in self.comparison.final_runs
            if self.comparison.state(run)[0] == "done"
        }

    @property
    def report(self) -> str:
        """The text of report.md: tables, paired differences with intervals, and how to read them."""
        return (self.folder / "report.md").read_text(encoding="utf-8")

    def __repr__(self) -> str:
        return f"ComparisonResult({len(self.runs)} of {len(self.comparison.final_runs)} runs, {self.folder})"


def compare(*arguments: str | Path | Sequence[str], **options: Any) -> ComparisonResult:
    """Do all runs of a comparison that are not done yet, write the report and return the results.

    One process runs in the calling process; several are started as a child process whose output is shown, as for
    `lorafair.run`.

    Args:
        arguments: YAML files, one of which has a `compare:` section, and `key=value` pairs.
        options: Further values for all runs, by key: `rounds=3`, `**{"client.batch_size": 8}`.

    Returns:
        The results of the final runs, and the report.

    Raises:
        ConfigError: One line that names the key, what was given and what is possible.
        LorafairError: A run has failed; the others were completed.
        KeyboardInterrupt: The comparison was interrupted; the same call continues it.

    Example:
        >>> result = lorafair.compare("conf/compare/methods.yaml", rounds=3)
        >>> result.runs["default", "fedit", 0].mean_accuracy
    """
    check_called_once("compare")
    let_idle_threads_sleep()
    given = [*flat_arguments(arguments), *(f"{key}={json.dumps(value, default=str)}" for key, value in options.items())]
    comparison = load_comparison(given)
    if comparison is None:
        raise ConfigError("none of the files has a compare: section; lorafair.run does a single run")
    config = next(iter(comparison.configs.values())).fabric
    with printing():
        if (config.devices or 1) * (config.num_nodes or 1) > 1:
            for of_run in comparison.configs.values():
                check_child_can_know(of_run)
            show_child(["compare", *given])
        else:
            _compare_in_place(comparison)
    return ComparisonResult(comparison)


def compare_command(comparison: Comparison, part: Part) -> int:
    """Do the part of a comparison that is asked for, or all of it; returns the exit status."""
    if part.index is not None and part.index >= len(comparison.runs):
        raise ConfigError(f"--index {part.index}: the runs are 0 to {len(comparison.runs) - 1}; --list shows them")
    if part.only_tuning and comparison.tuning is None:
        raise ConfigError("--tune: there is no compare.tune in the file, so there is nothing to tune")
    if part.only_list:
        from lorafair.comparison.listing import list_runs

        log.info(list_runs(comparison))
        return 0
    if part.only_report:
        from lorafair.comparison.report import write_report

        write_report(comparison)
        return 0
    config = next(iter(comparison.configs.values()))
    placement = resolve_placement(config.fabric)

    from lorafair.commands.checks import check_comparison, check_data, check_devices
    from lorafair.comparison.run import run_comparison

    with limited_checks(config):
        check_devices(config, placement)
        check_data(*comparison.configs.values())
        check_comparison(comparison)
    what = (
        format_count(len(comparison.runs), "run")
        if part.index is None
        else f"run {part.index} of {len(comparison.runs)}"
    )
    fabric = launch(config.fabric, placement, f"{what} in {comparison.folder}")
    return run_until_stopped(
        fabric,
        config.fabric,
        placement,
        lambda: run_comparison(fabric, comparison, index=part.index, only_tuning=part.only_tuning),
    )


def _compare_in_place(comparison: Comparison) -> None:
    from lorafair.commands.checks import check_comparison, check_data
    from lorafair.comparison.run import run_comparison

    check_data(*comparison.configs.values())
    check_comparison(comparison)
    config = next(iter(comparison.configs.values())).fabric
    note_resume("auto")  # a comparison always continues
    begin_start()
    with handling_signals(starting=True):
        handle_only(config.signals)
        try:
            with in_place(config) as fabric:
                run_comparison(fabric, comparison)
        except Interrupted as stop:
            raise KeyboardInterrupt(f"{stop}; {continues('call')}") from None

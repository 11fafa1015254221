"""Run what a comparison has left to do, one run after the other, on the processes of one launched Fabric."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorafair.checkpointing.checkpoint import make_run_dir
from lorafair.checkpointing.lock import RunDirInUse, RunLock, acquire, in_progress
from lorafair.checkpointing.shared_training import SharedTraining
from lorafair.cluster.saved import note_saved
from lorafair.cluster.signals import Interrupted
from lorafair.communication.agreement import abort_on_all_ranks, same_error_on_all_ranks
from lorafair.comparison.listing import options_text
from lorafair.comparison.plan import FAILED, Comparison, Run, check_folders, failure_of, state_of
from lorafair.comparison.report import write_report
from lorafair.comparison.sharing import WorkingOn, shared_training, tidy
from lorafair.config.schema import Config
from lorafair.console import format_count, log, some
from lorafair.errors import LorafairError, one_line
from lorafair.federation import limited, run_federation
from lorafair.files.writing import write_atomically
from lorafair.model.kept import keeping_backbone

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SECONDS_FOR_THE_REPORT = 300.0  # of another process that writes it, on a busy machine


@dataclass(frozen=True)
class Decision:
    """What rank 0 has decided about one run."""

    candidate: int | None = None  # which of the tuned options the run takes, where that is known
    skip: bool = False  # it is done
    elsewhere: str = ""  # another process does it, or what it waits for: which one
    failure: str = ""  # why it cannot be tried
    postponed: bool = False  # another process works on its draw, and others are left
    stopped: int | None = None  # it is not needed: the number of draws that have decided


def run_comparison(
    fabric: Fabric, comparison: Comparison, *, index: int | None = None, only_tuning: bool = False
) -> None:
    """Do the runs that are not done yet, and report unless a part was asked for. Call on every rank.

    A run that another process does at the moment is left to it; a process that does all runs reports those that are
    done. A run that fails is recorded in its folder, and the others go on. Raises LorafairError at the end if a final
    run failed, or the one run of `index`, or all tuning runs of a method with `only_tuning`; at once if a folder holds
    another run.
    """
    runs = [run for run in comparison.in_order if run.candidate is not None or not only_tuning]
    runs = [comparison.runs[index]] if index is not None else runs
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero and index is None:
            check_folders(comparison)
    with keeping_backbone():
        failures, elsewhere = execute_runs(fabric, comparison, runs, alone=index is not None)
    if index is None:
        first = next(iter(comparison.configs.values()))
        with same_error_on_all_ranks(fabric), limited(first, "the report of the comparison", of_start=True):
            if fabric.is_global_zero and only_tuning:
                report_tuning(comparison)
            elif fabric.is_global_zero:
                report_runs(comparison, elsewhere)
    if failures:
        abort_on_all_ranks(fabric, f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}")


@dataclass(frozen=True)
class Outcome:
    """What has become of one run, on every rank alike."""

    failure: str = ""  # why it failed
    elsewhere: str = ""  # which other process does it
    postponed: bool = False  # another process works on its draw


def execute_runs(
    fabric: Fabric, comparison: Comparison, runs: Sequence[Run], *, alone: bool
) -> tuple[list[str], list[Run]]:
    """The runs in order, those of draws that other processes work on last; why some failed, and which others do.

    The same on all ranks; of tuning runs only a failure of one that is `alone` counts.
    """
    failures: list[str] = []
    elsewhere: list[Run] = []
    left = [(run, f"[{number}/{len(runs)}]") for number, run in enumerate(runs, start=1)]
    working = None if alone else WorkingOn(comparison)
    try:
        while left:
            postponed = []
            for run, progress in left:
                outcome = execute_run(fabric, comparison, run, progress, working)
                if outcome.failure and (run.candidate is None or alone):
                    failures.append(f"{run.name}: {outcome.failure}")
                if outcome.elsewhere:
                    elsewhere.append(run)
                if outcome.postponed:
                    postponed.append((run, progress))
            left = postponed
            if working is not None:  # no draw is left that nobody works on
                working.release()
                working = WorkingOn(comparison, alone=False)
    finally:
        if fabric.is_global_zero:
            if working is not None:
                working.release()
            tidy(comparison)
    return failures, elsewhere


def execute_run(fabric: Fabric, comparison: Comparison, run: Run, progress: str, working: WorkingOn | None) -> Outcome:
    """One run, unless it is done or in progress elsewhere. Without `working` no other one was asked for.

    Raises Interrupted on every rank where the comparison is asked to stop.
    """
    with claimed(fabric, comparison, run, working) as (decision, lock):
        if decision.postponed:
            return Outcome(postponed=True)
        config = comparison.config(run, decision.candidate)
        chosen = None if decision.candidate is None else comparison.candidates[decision.candidate]
        options = f" with {options_text(chosen)}" if chosen else ""
        left = f": left to {decision.elsewhere}" if decision.elsewhere else ""
        left = f": not needed, decided with {decision.stopped} draws" if decision.stopped else left
        log.info(f"\n{progress} {run.name}{options}{': done before' if decision.skip else left}")
        if decision.stopped:
            return Outcome()
        if decision.skip:
            note_saved(before=True)
        if decision.skip or decision.elsewhere:
            return Outcome(elsewhere=decision.elsewhere)
        failure = decision.failure
        if not failure:
            with clearing_failure(fabric, run):
                shared = shared_training(comparison, run, decision.candidate or 0)
                failure = try_federation(fabric, config, lock, shared)
        if failure:
            with same_error_on_all_ranks(fabric):
                if fabric.is_global_zero:
                    record_failure(run, failure)
                    log.info(f"failed: {failure}")
        return Outcome(failure=str(fabric.broadcast(failure)))  # only rank 0 has the text


@contextmanager
def claimed(
    fabric: Fabric, comparison: Comparison, run: Run, working: WorkingOn | None
) -> Iterator[tuple[Decision, RunLock | None]]:
    """What rank 0 decides about a run; where it is to be done, rank 0 holds its folder for the block."""
    decision, lock = None, None
    with ExitStack() as stack:
        with same_error_on_all_ranks(fabric) as agreed:  # rank 0 reads what is done: file systems lag between nodes
            if fabric.is_global_zero:
                decision, lock = decide(comparison, run, working)
                if lock is not None:
                    stack.callback(lock.release)
        if agreed.stop:
            raise Interrupted(agreed.stop, f"before {run.name}")
        decision = fabric.broadcast(decision)
        assert decision is not None
        yield decision, lock


def decide(comparison: Comparison, run: Run, working: WorkingOn | None) -> tuple[Decision, RunLock | None]:
    """What to do about a run, as the folders are now, with the lock of one that is to be done.

    Raises LorafairError if its tuning is not complete, unless that is in progress elsewhere and other runs are left.
    """
    candidate = run.candidate
    if candidate is None:
        choice = comparison.choice(run.setting, run.method)
        if choice is None:
            waits_for = [comparison.runs[index] for index in comparison.waits_for(run)]
            holders = [holder for r in waits_for if (holder := in_progress(r.folder))]
            if holders and working is not None:
                return Decision(elsewhere=f"{holders[0]}, which is at its tuning"), None
            left = ", ".join(str(r.index) for r in waits_for)
            raise LorafairError(f"{run.name} waits for its tuning; run --index {left} first (or --tune)")
        if choice.best is None:
            return Decision(failure=f"all of its tuning runs failed: {'; '.join(choice.failures)}"), None
        candidate = choice.best
    config = comparison.config(run, candidate)
    if state_of(run, config) == "done":
        return Decision(candidate, skip=True), None
    if stopped := comparison.stopped_before(run):
        return Decision(candidate, stopped=stopped), None
    if working is not None and not working.try_draw(run):
        return Decision(postponed=True), None
    make_run_dir(run.folder)
    try:
        lock = acquire(run.folder)
    except RunDirInUse as error:
        return Decision(candidate, elsewhere=error.holder), None
    with ExitStack() as stack:
        stack.callback(lock.release)
        if state_of(run, config) == "done":  # another process has just done it
            return Decision(candidate, skip=True), None
        stack.pop_all()
    return Decision(candidate), lock


@contextmanager
def clearing_failure(fabric: Fabric, run: Run) -> Iterator[None]:
    """Remove the record of an earlier failure of a run that is tried again; free the run's memory afterwards."""
    if fabric.is_global_zero:
        (run.folder / FAILED).unlink(missing_ok=True)
    gc.freeze()  # what is there before the run stays: looking through it would take longer than a short round
    yield
    gc.collect()  # models and loaders have reference cycles
    gc.unfreeze()
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()


def try_federation(fabric: Fabric, config: Config, lock: RunLock | None, shared: SharedTraining | None) -> str:
    """Run a federation; returns why it failed, or an empty text.

    An error of a run is raised on all ranks (agreement.abort_on_all_ranks): rank 0 has the reason, the others exit.
    """
    try:
        run_federation(fabric, config, lock=lock, shared=shared)
    except LorafairError as error:
        return str(error)
    except SystemExit as leave:
        if fabric.is_global_zero or leave.code != 2:
            raise
        return "see rank 0"
    return ""


def record_failure(run: Run, failure: str) -> None:
    """Leave a failure in the run's folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / FAILED, f"{one_line(failure)}\n")


def report_runs(comparison: Comparison, elsewhere: Sequence[Run]) -> None:
    """Write the report, one process at a time. Raises LorafairError where no run is done, nor in progress elsewhere."""
    if elsewhere:
        count, names = format_count(len(elsewhere), "run"), some([run.name for run in elsewhere])
        are = "it is" if len(elsewhere) == 1 else "they are"
        log.info(f"\n{count} left to other processes: {names}; --report writes the report once {are} done")
        if not any(comparison.state(run)[0] == "done" for run in comparison.final_runs):
            return
    make_run_dir(comparison.folder)
    until = time.monotonic() + SECONDS_FOR_THE_REPORT
    while True:
        try:
            lock = acquire(comparison.folder)
            break
        except RunDirInUse:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
    try:
        write_report(comparison)
    finally:
        lock.release()


def report_tuning(comparison: Comparison) -> None:
    """Say what tuning has chosen. Raises LorafairError if all runs of a grid failed."""
    problems = []
    log.info("")
    for setting in comparison.settings:
        for method in comparison.methods:
            choice = comparison.choice(setting, method)
            if choice is None:
                log.info(f"{setting} / {method}: left to other processes")
                continue
            if choice.best is None:
                problems.append(
                    f"{setting} / {method}: all tuning runs failed: {failures_of(comparison, setting, method)}"
                )
                continue
            accuracy = 100 * (choice.accuracies[choice.best] or 0)
            chosen = options_text(comparison.candidates[choice.best])
            log.info(f"{setting} / {method}: {chosen} ({accuracy:.1f} % of the held-out images)")
    if problems:
        raise LorafairError("; ".join(problems))


def failures_of(comparison: Comparison, setting: str, method: str) -> str:
    """The failures of a grid in one line."""
    runs: Sequence[Run] = comparison.tuning_runs(setting, method)
    return "; ".join(f"{run.folder.name}: {failure_of(run)}" for run in runs)

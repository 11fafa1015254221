"""The federation: clients train, the server corrects, the next round starts. Start reading at `run_rounds`.

Letters: K clients of the round, n clients of this rank, p numbers trained, P packed length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial as partial_call
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from lorafair.checkpointing.checkpoint import Checkpoint, save_checkpoint
from lorafair.checkpointing.claim import holding
from lorafair.checkpointing.lock import RunLock
from lorafair.checkpointing.partial_round import Cohort, PartialRound, drop_unfinished, start_of_round
from lorafair.checkpointing.shared_training import SharedTraining
from lorafair.client.sharing import leave_to_others, take_over
from lorafair.client.training import train_clients
from lorafair.cluster.saved import note_saved
from lorafair.cluster.signals import Interrupted, finishing_clients
from lorafair.cluster.watchdog import deadline, saving
from lorafair.communication.agreement import StopRequest, abort_on_all_ranks, same_error_on_all_ranks
from lorafair.communication.collectives import ClientResults, drop_nonfinite, sum_over_ranks
from lorafair.communication.traffic import Traffic
from lorafair.config.schema import Config
from lorafair.console import format_count, log
from lorafair.evaluation import Evaluation
from lorafair.experiment import Experiment, build_experiment
from lorafair.reporting.callbacks import Callback
from lorafair.reporting.metrics import RoundSummary
from lorafair.reporting.report import Report, open_report, report_finished_before
from lorafair.reporting.results import is_finished
from lorafair.reporting.tracker import Clock
from lorafair.schedule import RoundPlan, update_client_seconds
from lorafair.server.choice import choose_clients
from lorafair.server.costs import add_to_totals, seconds_of, traffic_of, work_of
from lorafair.server.down import send_down
from lorafair.server.private_release import clients_of_round
from lorafair.server.recent import evaluated_adapter
from lorafair.server.state import (
    ServerState,
    check_fits,
    checkpoint_of,
    initial_adapters,
    start_or_resume,
)
from lorafair.server.step import (
    Server,
    ServerResult,
    apply_update,
    broadcast_lora_ranks,
    keep_residuals,
    make_server,
    update_controls,
)
from lorafair.server.weighting import weighted_by_losses

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SHORTEST_INTERVAL = 1.0  # seconds between checkpoints: one takes some milliseconds, as does a round of a tiny model


def run_federation(
    fabric: Fabric,
    config: Config,
    callbacks: Sequence[Callback] = (),
    lock: RunLock | None = None,
    shared: SharedTraining | None = None,
) -> None:
    """Run the rounds that are not done yet and leave the results in config.run_dir. Call on every rank.

    The run directory is held for the time of the run, unless the caller holds it by `lock`. What other runs have
    trained is taken from `shared`. Raises Interrupted on every rank, after all that is done is saved, where a signal or
    the job's time limit asks to stop.
    """
    with holding(fabric, config.folder, lock) as held:
        with limited(config, "the loading of images, model and checkpoint", of_start=True):
            experiment, checkpoint = build_experiment(fabric, config, held)
            experiment.shared = shared
        if checkpoint is not None:
            note_saved(before=True)
        if not finished_before(experiment, checkpoint is not None and checkpoint.completed_rounds == config.rounds):
            run_rounds(experiment, checkpoint, callbacks)


def run_rounds(experiment: Experiment, checkpoint: Checkpoint | None, callbacks: Sequence[Callback]) -> None:
    """The rounds after a checkpoint, or all of them, and the result."""
    fabric, config = experiment.fabric, experiment.config
    if checkpoint is not None:
        check_fits(experiment, checkpoint)
    with limited(config, "the decoding of images or computing of tokens", of_start=True):
        experiment.open_inputs()
    state, server, stop = start_or_resume(experiment, checkpoint), make_server(experiment), StopRequest(fabric)
    with (
        finishing_clients(),
        limited(config, "the opening or closing of the report"),
        open_report(experiment, state.completed_rounds, callbacks) as report,
    ):
        evaluation = None
        while state.completed_rounds < config.rounds:
            with round_in_progress(experiment, state, stop, report) as this:
                trained = train(experiment, state, this)
                clients = gather(experiment, state, this, server, trained)
                del trained  # as large as what was gathered
                update = aggregate(state, this, server, clients)
                broadcast_and_apply(experiment, state, this, clients, update)
                evaluation = evaluate(experiment, state, this)
                log_and_save(experiment, state, this, clients, update, evaluation)
        finish(experiment, state, report, evaluation)


def limited(config: Config, what: str, *, of_start: bool = False) -> AbstractContextManager[None]:
    """A deadline for one part of the run on this process; none where that of clients is switched off.

    `of_start`: the part may take minutes without a sign of progress.
    """
    of_clients, of_collectives = config.client.timeout_minutes, config.fabric.timeout_minutes
    if of_clients is None:
        return deadline(what, None)
    if of_start or of_collectives < of_clients:
        return deadline(what, of_collectives, "fabric.timeout_minutes")
    return deadline(what, of_clients, "client.timeout_minutes")


@dataclass
class Round:
    """The round in progress, on one rank."""

    plan: RoundPlan
    partial: PartialRound  # its clients that are done
    stop: StopRequest
    report: Report | None  # on rank 0
    clock: Clock
    taken: Sequence[Cohort] = ()  # that other runs have trained
    trained_at: float = 0.0  # when this rank's clients were done, on the monotonic clock


@contextmanager
def round_in_progress(
    experiment: Experiment, state: ServerState, stop: StopRequest, report: Report | None
) -> Iterator[Round]:
    """One round. Finished clients are saved if the round fails. The plan is the same on every rank."""
    with limited(experiment.config, f"round {state.completed_rounds + 1}"):
        clock = Clock(experiment.fabric.device)
        partial, plan, taken = begin_round(experiment, state, clock)
        this = Round(plan, partial, stop, report, clock, taken)
        with partial.kept_on_failure(), saving(partial.write):
            yield this
    stop.record_duration("rest of the round", time.monotonic() - this.trained_at)


def begin_round(
    experiment: Experiment, state: ServerState, clock: Clock
) -> tuple[PartialRound, RoundPlan, list[Cohort]]:
    """Rank 0 reads the clients that an interrupted run, or another one, has finished; every rank plans the rest."""
    config, round_index, adapter = experiment.config, state.completed_rounds, state.adapter
    partial = PartialRound(
        config.folder,
        round_index,
        # the adapter at the start of the round
        start=lambda: start_of_round(experiment.identity, round_index, adapter),
        seconds=config.checkpoint.seconds,
    )
    choice = choose_clients(experiment, state, partial_call(traffic_of, experiment, state))
    finished = found_unfinished(experiment, partial) if round_index in state.unfinished_rounds else []
    clients = clients_of_round(experiment)
    plan = experiment.scheduler.plan(round_index, state.client_seconds, finished, choice, clients)
    if finished:
        done = sum(len(cohort) for cohort in plan.cohorts_of_rank[0] if cohort in finished)
        log.info(f"round {round_index + 1}: {format_count(done, 'client')} done before the interruption")
    with clock("train"):
        taken = take_over(experiment, state, plan, partial)
    if taken:
        plan = experiment.scheduler.plan(round_index, state.client_seconds, [*finished, *taken], choice, clients)
    return partial, plan, taken


def found_unfinished(experiment: Experiment, partial: PartialRound) -> list[Cohort]:
    """The cohorts that an interrupted run has left, read by rank 0. Call on every rank."""
    with same_error_on_all_ranks(experiment.fabric):
        if experiment.fabric.is_global_zero:
            partial.read()
    finished: list[Cohort] = experiment.fabric.broadcast(list(partial.found))
    if finished:
        note_saved(before=True)
    return finished


def train(experiment: Experiment, state: ServerState, this: Round) -> Tensor:
    """Train this rank's clients: (n, p + 2), what was trained, losses and seconds. Raises Interrupted on all ranks."""
    with this.clock("train"), same_error_on_all_ranks(experiment.fabric) as agreed:
        if this.report is not None:
            this.report.round_started(state.completed_rounds + 1, is_whole=not this.partial.found)
        trained = train_clients(experiment, state, this.plan, this.partial, this.stop)
    this.trained_at = time.monotonic()
    if agreed.stop:
        interrupt(experiment, state, this, len(trained), agreed.stop)
    if experiment.shared is not None:
        with this.clock("train"), same_error_on_all_ranks(experiment.fabric):
            mine = this.plan.cohorts_of_rank[experiment.fabric.global_rank]
            leave_to_others(experiment, state, mine, trained, this.taken)
    return trained


def gather(experiment: Experiment, state: ServerState, this: Round, server: Server, trained: Tensor) -> ClientResults:
    """The results of all clients where they are aggregated, without those that are not finite."""
    with this.clock("gather"):
        measured, measures = experiment.measured, experiment.measures
        results = drop_nonfinite(experiment.fabric, trained, this.plan, measured, measures)
        if not results.clients and experiment.config.privacy.unit != "client":  # noise alone is a release, too
            abort_all_diverged(experiment, state)
        update_client_seconds(state.client_seconds, this.plan.clients, results.seconds)
        results = keep_residuals(experiment, state, this.plan, results)
        return server.gather(state, this.plan, weighted_by_losses(experiment, state, this.plan, results))


def aggregate(state: ServerState, this: Round, server: Server, clients: ClientResults) -> ServerResult | None:
    """The server step; its result is on rank 0."""
    what = f"the server step of round {state.completed_rounds + 1}"
    with this.clock("server"), limited(server.experiment.config, what):
        return server.step(state, clients)


def broadcast_and_apply(
    experiment: Experiment, state: ServerState, this: Round, clients: ClientResults, result: ServerResult | None
) -> None:
    """Send the update of rank 0 to every rank, and move the state to the next round."""
    with this.clock("broadcast"):
        received, folded = send_down(experiment, state, None if result is None else result.update)
        broadcast_lora_ranks(experiment, state, clients, result)
    update_controls(experiment, state, clients)
    apply_update(experiment, state, clients, received, folded)


def evaluate(experiment: Experiment, state: ServerState, this: Round) -> Evaluation | None:
    """Accuracy of the model after this round; None between the rounds that evaluate."""
    config = experiment.config
    due = state.completed_rounds % config.evaluation.every == 0 or state.completed_rounds == config.rounds
    with this.clock("evaluate"):
        return evaluate_adapters(experiment, state) if due else None


def evaluate_adapters(experiment: Experiment, state: ServerState) -> Evaluation:
    """Accuracy of the global adapter, or of every client's own one."""
    everyone = tuple(range(len(experiment.clients)))
    experiment.model.adapters.resize(1)
    if experiment.aggregator.personal_parts:
        adapters = initial_adapters(experiment, state, everyone)
    else:
        evaluation, layout = experiment.config.evaluation, experiment.layout
        row = evaluated_adapter(evaluation, layout, state.adapter, state.recent, state.completed_rounds)
        adapters = row.unsqueeze(0)
    with limited(experiment.config, f"the evaluation after round {state.completed_rounds}"):
        what = f"round {state.completed_rounds}/{experiment.config.rounds} evaluation"
        return experiment.evaluate(adapters, what)


def log_and_save(
    experiment: Experiment,
    state: ServerState,
    this: Round,
    clients: ClientResults,
    result: ServerResult | None,
    evaluation: Evaluation | None,
) -> None:
    """Count what the round has cost, report it, and write a checkpoint where one is due; on rank 0."""
    what = f"the report and checkpoint of round {state.completed_rounds}"
    with same_error_on_all_ranks(experiment.fabric), limited(experiment.config, what):
        if experiment.lock is not None:
            experiment.lock.confirm()
        if this.report is not None and result is not None:
            server_seconds = this.clock.seconds.get("server", 0.0)
            work = work_of(experiment, state, this.plan, result.update, server_seconds)
            traffic = Traffic(sum(work.up), sum(work.down) + sum(work.late_down))
            shared = seconds_of(this.taken, this.plan, clients)
            add_to_totals(state, sum(this.clock.seconds.values()), traffic, clients, shared)
            summary = RoundSummary(
                round=state.completed_rounds,
                plan=this.plan,
                results=clients,
                bias=result.bias,
                evaluation=evaluation,
                seconds=this.clock.seconds,
                traffic=traffic,
                work=work,
                total_bytes=state.totals["bytes"],
                total_seconds=state.totals["seconds"],
                adapter=state.adapter,
                shared_seconds=shared,
            )
            this.report.round_ended(summary, state.totals)
        save(experiment, state)


def save(experiment: Experiment, state: ServerState, *, always: bool = False) -> None:
    """Write a checkpoint on rank 0, where it is due and not there yet. The state notes it on every rank."""
    config, every = experiment.config, experiment.config.checkpoint.every
    if every == "auto":
        due = time.monotonic() - state.saved_at >= SHORTEST_INTERVAL
    else:
        due = state.completed_rounds % every == 0
    due |= state.completed_rounds == config.rounds
    if not (due or always) or state.completed_rounds == state.saved_rounds:
        return
    if experiment.fabric.is_global_zero:
        save_checkpoint(config.folder, checkpoint_of(experiment, state), config.checkpoint.keep)
        drop_unfinished(config.folder, state.completed_rounds)
    state.saved_rounds, state.saved_at = state.completed_rounds, time.monotonic()
    note_saved()


def finish(experiment: Experiment, state: ServerState, report: Report | None, evaluation: Evaluation | None) -> None:
    """Leave the result of the last evaluation; evaluate first where a run ended between the two."""
    if evaluation is None:
        evaluation = evaluate_adapters(experiment, state)
    with same_error_on_all_ranks(experiment.fabric), limited(experiment.config, "the final report"):
        if report is not None:
            report.finished(evaluation, state.totals)


def finished_before(experiment: Experiment, all_rounds_done: bool) -> bool:
    """Whether nothing is left to do; if so, prints it. The same on every rank."""
    finished = False
    with same_error_on_all_ranks(experiment.fabric):
        if experiment.fabric.is_global_zero and all_rounds_done and is_finished(experiment.config):
            finished = True
            report_finished_before(experiment.config)
    return experiment.fabric.broadcast(finished)


def interrupt(experiment: Experiment, state: ServerState, this: Round, done: int, reason: int) -> NoReturn:
    """End the run where it can go on, with `done` clients of this rank's saved. Call on every rank."""
    fabric, config = experiment.fabric, experiment.config
    what = "the saving of what is done"
    with same_error_on_all_ranks(fabric), limited(config, what):
        this.partial.write()
        save(experiment, state, always=True)
    total = int(sum_over_ranks(fabric, torch.tensor(done, device=fabric.device)))
    raise Interrupted(
        reason,
        f"in round {state.completed_rounds + 1} of {config.rounds}, with {total} of its {len(this.plan.clients)} "
        f"clients done; all of it is kept in {config.folder}",
    )


def abort_all_diverged(experiment: Experiment, state: ServerState) -> NoReturn:
    """End the run, with the last good state saved, when no client returned finite numbers. Call on every rank."""
    save(experiment, state, always=True)
    local, completed = experiment.config.client, state.completed_rounds
    abort_on_all_ranks(
        experiment.fabric,
        f"round {completed + 1}: every client returned NaN or infinite adapters; lower "
        f"client.learning_rate ({local.learning_rate:g}) or set client.clip_norm ({local.clip_norm})"
        + (f". The state after round {completed} is kept" if completed else ""),
    )

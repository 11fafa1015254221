"""Clients of a round that other runs have trained: taken over before the training, and left to others after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from lorafair.checkpointing.partial_round import Cohort, PartialRound
from lorafair.checkpointing.shared_training import SharedTraining
from lorafair.client.digest import digests_of
from lorafair.client.training import Trainer
from lorafair.cluster.saved import note_saved
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.console import format_count, log
from lorafair.experiment import Experiment
from lorafair.schedule import RoundPlan
from lorafair.server.state import ServerState


def take_over(experiment: Experiment, state: ServerState, plan: RoundPlan, partial: PartialRound) -> list[Cohort]:
    """The cohorts of a round that are found, put into `partial` on rank 0. Call on every rank."""
    shared, taken = shared_of(experiment, state), list[Cohort]()
    if shared is None:
        return taken
    with same_error_on_all_ranks(experiment.fabric):
        if experiment.fabric.is_global_zero:
            cohorts = [c for of_rank in plan.cohorts_of_rank for c in of_rank if c not in partial.found]
            found = shared.find(state.completed_rounds, digests_of(Trainer.of_round(experiment, state), cohorts))
            partial.found |= {cohort: of_cohort.rows for cohort, of_cohort in found.items()}
            taken = list(found)
            clients = Counter[str]()
            for cohort, of_cohort in found.items():
                clients[of_cohort.trained_by] += len(cohort)
            for run, count in clients.items():
                log.info(f"round {state.completed_rounds + 1}: {format_count(count, 'client')} trained by {run}")
    taken = experiment.fabric.broadcast(taken)
    if taken:
        note_saved(before=True)
    return taken


def leave_to_others(
    experiment: Experiment, state: ServerState, mine: Sequence[Cohort], trained: Tensor, taken: Sequence[Cohort]
) -> None:
    """Share the rows (n, p) of the cohorts of this rank, but for those that were taken over."""
    shared = shared_of(experiment, state)
    if shared is None:
        return
    rows: Mapping[Cohort, Tensor] = dict(zip(mine, trained.split([len(cohort) for cohort in mine]), strict=True))
    digests = digests_of(Trainer.of_round(experiment, state), [cohort for cohort in mine if cohort not in taken])
    shared.add(state.completed_rounds, {digest: rows[cohort] for cohort, digest in digests.items()})


def shared_of(experiment: Experiment, state: ServerState) -> SharedTraining | None:
    """Where the next round is shared; None where it is not."""
    shared = experiment.shared
    return shared if shared is not None and shared.covers(state.completed_rounds) else None

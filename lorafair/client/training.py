"""The training phase of a round on one rank: its cohorts of clients, one after the other.

Letters: C clients of a cohort, n clients of this rank, p numbers trained, P packed length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lorafair.checkpointing.partial_round import PartialRound
from lorafair.client.cohort import Cohort, LocalTraining
from lorafair.cluster.watchdog import deadline, heartbeat
from lorafair.communication.agreement import StopRequest
from lorafair.communication.progress import TrainingProgress
from lorafair.data.augmentation import augmented
from lorafair.data.loading import CohortStep, cohort_steps, local_batches
from lorafair.experiment import Experiment
from lorafair.schedule import RoundPlan, with_scheduled_learning_rate
from lorafair.seeding import seeded
from lorafair.server.state import ServerState, initial_adapters

HALF_PRECISION_SCALE = 4096.0  # lifts gradients over half precision's smallest number, 6e-8


def train_clients(
    experiment: Experiment, state: ServerState, plan: RoundPlan, partial: PartialRound, stop: StopRequest
) -> Tensor:
    """Train this rank's clients; returns (n, p + 2): the numbers trained, mean loss and seconds of each.

    Those that are done already are taken from `partial`, and what is trained is added to it. Fewer are returned if a
    stop is requested.
    """
    fabric, rounds = experiment.fabric, experiment.config.rounds
    trainer = _Trainer.of_round(experiment, state)
    mine = plan.cohorts_of_rank[fabric.global_rank]
    rows = [partial.found[cohort].to(fabric.device) for cohort in mine if cohort in partial.found]
    work = [(cohort, trainer.steps_of(cohort)) for cohort in mine if cohort not in partial.found]
    stream = experiment.inputs.train.batches([step.indices.reshape(-1) for _, steps in work for step in steps])
    name = f"round {state.completed_rounds + 1}"
    with TrainingProgress(fabric, f"{name}/{rounds}", plan, partial.found, experiment.costs) as progress:
        for cohort, steps in work:
            if stop.is_set("cohort"):
                break
            clients = " or ".join(experiment.clients[client].name for client in cohort)
            with (
                stop.timed("cohort"),
                deadline(f"{name}: client {clients}", trainer.training.config.timeout_minutes),
            ):
                rows.append(trainer.train(cohort, steps, _counted(stream, steps, progress)))
            partial.add(cohort, rows[-1])
            progress.clients_done(len(cohort))
    stop.is_set("rest of the round")
    width = experiment.layout.length_of(trainer.training.parts) + 2
    return torch.cat(rows) if rows else torch.empty(0, width, device=fabric.device)


@dataclass(frozen=True)
class _Trainer:
    """Trains cohorts of one round."""

    experiment: Experiment
    state: ServerState
    training: LocalTraining

    @staticmethod
    def of_round(experiment: Experiment, state: ServerState) -> _Trainer:
        """For the round that comes next."""
        training = LocalTraining(
            model=experiment.model,
            labels=experiment.labels,
            config=with_scheduled_learning_rate(experiment.local, state.completed_rounds),
            parts=experiment.aggregator.trains(state.completed_rounds),
            autocast=experiment.fabric.autocast,
            loss_scale=HALF_PRECISION_SCALE if experiment.config.fabric.precision == "16-mixed" else 1.0,
        )
        return _Trainer(experiment, state, training)

    def steps_of(self, cohort: Sequence[int]) -> list[CohortStep]:
        """The steps of these clients, each with its own batches."""
        seed, round_index = self.experiment.config.seed, self.state.completed_rounds
        return cohort_steps(
            [
                local_batches(self.experiment.clients[c].indices, self.training.config, seeded(seed, round_index, c))
                for c in cohort
            ]
        )

    def train(self, cohort: tuple[int, ...], steps: Sequence[CohortStep], batches: Iterator[Tensor]) -> Tensor:
        """Train C clients; returns (C, p + 2): the numbers trained, mean loss and seconds of each."""
        began = time.perf_counter()
        device, state = self.experiment.fabric.device, self.state
        seed, round_index = self.experiment.config.seed, state.completed_rounds
        inputs: Iterator[Tensor] = (batch.to(device, non_blocking=True) for batch in batches)
        augmentation = self.experiment.config.data.augmentation
        if augmentation != "none":
            crop = augmentation == "crop_flip"
            inputs = augmented(inputs, steps, cohort, seed=seed, round_index=round_index, crop=crop)
        result = self.training.train(
            Cohort(
                start=initial_adapters(self.experiment, state, cohort),
                steps=steps,
                generators=[seeded(seed, round_index, c, "dropout", device=device) for c in cohort],
                corrections=None if state.controls is None else state.controls.corrections(cohort),
            ),
            inputs,
        )
        losses = result.losses.cpu()  # waits for the device, so that the seconds are the cohort's
        seconds = torch.full_like(losses, (time.perf_counter() - began) / len(cohort))
        measured = torch.stack([losses, seconds], dim=1).to(result.rows)
        return torch.cat([self.experiment.layout.select(result.rows, self.training.parts), measured], dim=1)


def _counted(stream: Iterator[Tensor], steps: Sequence[CohortStep], progress: TrainingProgress) -> Iterator[Tensor]:
    """The next batches of the stream, one a step; each one is a heartbeat."""
    for step, batch in zip(steps, islice(stream, len(steps)), strict=True):
        heartbeat()
        yield batch
        progress.images_done(sum(step.counts))

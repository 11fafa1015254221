"""The training phase of a round on one rank: its cohorts of clients, one after the other.

Letters: C clients of a cohort, n clients of this rank, p numbers trained, P packed length, M measures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial as partial_call
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from lorafair.aggregation.base import alternates
from lorafair.aggregation.rank_pruning import add_penalty
from lorafair.checkpointing.partial_round import PartialRound
from lorafair.client.cohort import Cohort, LocalTraining
from lorafair.client.directions import directions_of
from lorafair.client.private_step import ExamplePrivacy
from lorafair.client.updates import UpdateRule, kept_by_clients, rules_of
from lorafair.cluster.watchdog import heartbeat, within
from lorafair.communication.agreement import StopRequest
from lorafair.communication.progress import TrainingProgress
from lorafair.data.augmentation import augmented
from lorafair.data.loading import (
    CohortStep,
    cohort_steps,
    local_batches,
    on_device,
    poisson_batches,
    sampling_probability,
)
from lorafair.errors import ConfigError, first_line
from lorafair.experiment import Experiment
from lorafair.schedule import RoundPlan, with_scheduled_learning_rate
from lorafair.seeding import seeded
from lorafair.server.state import ServerState, initial_adapters, lora_ranks_of

T = TypeVar("T")


def train_clients(
    experiment: Experiment, state: ServerState, plan: RoundPlan, partial: PartialRound, stop: StopRequest
) -> Tensor:
    """Train this rank's clients; returns (n, p + M + 2): the numbers trained, M measures, mean loss, seconds of each.

    Where weights follow from losses, the loss of the first batch stands before the mean one. There are measures with
    example-level privacy alone. With error feedback at the clients, p counts what each of them keeps, too.

    Those that are done already are taken from `partial`, and what is trained is added to it. Fewer are returned if a
    stop is requested.
    """
    fabric, rounds = experiment.fabric, experiment.config.rounds
    trainer = Trainer.of_round(experiment, state)
    mine = plan.cohorts_of_rank[fabric.global_rank]
    rows = [partial.found[cohort].to(fabric.device) for cohort in mine if cohort in partial.found]
    work = [(cohort, trainer.steps_of(cohort)) for cohort in mine if cohort not in partial.found]
    indices = [step.indices.reshape(-1) for _, steps in work for step in steps]
    stream = on_device(experiment.inputs.train.batches(indices), fabric.device)
    name, minutes = f"round {state.completed_rounds + 1}", trainer.training.config.timeout_minutes
    in_training, ahead = deque[_CohortInTraining](), _cohorts_ahead(fabric.device)

    def limited(cohort: Sequence[int], work: Callable[[], T]) -> T:
        what = f"{name}: client {' or '.join(experiment.clients[c].name for c in cohort)}"
        try:
            return within(what, minutes, "client.timeout_minutes", work)
        except torch.OutOfMemoryError as error:
            raise ConfigError(_no_room(experiment, what, error)) from error

    with TrainingProgress(fabric, f"{name}/{rounds}", plan, partial.found, experiment.costs) as progress:

        def complete(most: int) -> None:
            while len(in_training) > most:
                oldest = in_training.popleft()
                rows.append(limited(oldest.cohort, oldest.rows))
                trained_at = time.perf_counter()
                partial.add(oldest.cohort, rows[-1])
                progress.clients_done(len(oldest.cohort))
                stop.record_duration("cohort", oldest.stopwatch.seconds() + time.perf_counter() - trained_at)

        for cohort, steps in work:
            if stop.is_set("cohort", pending=len(in_training)):
                break
            batches = _counted(stream, steps, progress)
            in_training.append(limited(cohort, partial_call(trainer.train, cohort, steps, batches)))
            complete(ahead if stop.knows("cohort") else 0)  # the first of all tells how long one takes
        complete(0)
    stop.is_set("rest of the round")
    kept = 0 if state.client_residuals is None else state.client_residuals.shape[1]
    beside = kept + experiment.measures + experiment.measured
    width = experiment.layout.length_of(trainer.training.parts) + beside
    return torch.cat(rows) if rows else torch.empty(0, width, device=fabric.device)


def _no_room(experiment: Experiment, what: str, error: torch.OutOfMemoryError) -> str:
    """What to change, cheapest first. The cohort leaves the results as they are, but for rounding."""
    config, cohort = experiment.config, experiment.cohort
    remedies = [f"client.cohort={cohort // 2} (it is {cohort})"] if cohort > 1 else []
    if not config.model.gradient_checkpointing:
        remedies.append("model.gradient_checkpointing=true")
    if config.fabric.precision in ("32-true", "bf16-mixed"):
        remedies.append("fabric.precision=bf16-true")
    if config.data.resident:
        remedies.append("data.resident=false")
    remedies.append(f"a smaller client.batch_size (it is {config.client.batch_size})")
    return f"{what} does not fit into the memory of the device ({first_line(error)}); set {', or '.join(remedies)}"


def _cohorts_ahead(device: torch.device) -> int:
    """A GPU has the work of the next cohort before it is done with one, so that it never waits for this process."""
    return int(device.type == "cuda")


class _Stopwatch:
    """Seconds from its making to `stop`; on a GPU by events, since the work is done later than it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._began, self._seconds = time.perf_counter(), 0.0
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Waits until the work is done."""
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


@dataclass(frozen=True)
class _CohortInTraining:
    """C clients whose work the device has been given."""

    cohort: tuple[int, ...]
    numbers: Tensor  # (C, p)
    losses: tuple[Tensor, ...]  # each (C,): of the first batch where it is asked for, and the mean
    measures: Tensor | None  # (C, M)
    stopwatch: _Stopwatch

    def rows(self) -> Tensor:
        """(C, p + M + 2 or 3): the numbers trained, measures, losses and seconds of each. Waits for the device."""
        seconds = torch.full_like(self.losses[0], self.stopwatch.seconds() / len(self.cohort))
        last = torch.stack([*self.losses, seconds], dim=1).to(self.numbers)
        return torch.cat([self.numbers, *([] if self.measures is None else [self.measures]), last], dim=1)


@dataclass(frozen=True)
class Trainer:
    """Trains cohorts of one round. What one comes to depends on these fields and on `cohort_of` alone."""

    experiment: Experiment
    state: ServerState
    training: LocalTraining
    rules: tuple[UpdateRule, ...] = ()

    @staticmethod
    def of_round(experiment: Experiment, state: ServerState) -> Trainer:
        """For the round that comes next."""
        round_index, aggregator = state.completed_rounds, experiment.aggregator
        training = LocalTraining(
            model=experiment.model,
            labels=experiment.labels,
            config=with_scheduled_learning_rate(experiment.local, round_index),
            parts=aggregator.trains(round_index),
            autocast=experiment.fabric.autocast,
            loss_scale=experiment.loss_scale,
            parts_of_step=partial_call(aggregator.trains_in_step, round_index) if alternates(aggregator) else None,
            smoothing=aggregator.smoothing,
        )
        return Trainer(experiment, state, training, rules_of(experiment, state))

    def steps_of(self, cohort: Sequence[int]) -> list[CohortStep]:
        """The steps of these clients, each with its own batches."""
        seed, round_index = self.experiment.config.seed_of("client"), self.state.completed_rounds
        local, privacy = self.training.config, self.experiment.config.privacy
        images = {c: self.experiment.clients[c].indices for c in cohort}
        if privacy.unit == "example":
            of_system = privacy.noise_source == "system"
            generators = {c: None if of_system else seeded(seed, round_index, c, "sample") for c in cohort}
            return cohort_steps([poisson_batches(images[c], local, generators[c]) for c in cohort])
        return cohort_steps([local_batches(images[c], local, seeded(seed, round_index, c)) for c in cohort])

    def privacy_of(self, cohort: Sequence[int]) -> ExamplePrivacy | None:
        """The mechanism of these clients, with example-level privacy."""
        privacy, round_index = self.experiment.config.privacy, self.state.completed_rounds
        if privacy.unit != "example":
            return None
        assert privacy.clip_norm is not None
        assert self.experiment.noise_multiplier is not None
        seed, device = self.experiment.config.seed_of("client"), self.experiment.fabric.device
        of_system, local = privacy.noise_source == "system", self.training.config
        sizes = [len(self.experiment.clients[c].indices) for c in cohort]
        return ExamplePrivacy(
            clip_norm=privacy.clip_norm,
            noise_multiplier=self.experiment.noise_multiplier,
            expected=[size * sampling_probability(size, local) for size in sizes],
            generators=[None if of_system else seeded(seed, round_index, c, "noise", device=device) for c in cohort],
        )

    def lora_ranks_of(self, cohort: Sequence[int]) -> list[int]:
        """Of these clients, in this round."""
        return lora_ranks_of(self.experiment, self.state, cohort)

    def penalty_of(self, cohort: Sequence[int]) -> Callable[[Tensor, Tensor], None] | None:
        """What these clients add to the gradient (c, P) of their loss, in place, at their parameters (c, P)."""
        layout, pruning = self.experiment.layout, self.experiment.aggregator.rank_pruning
        if pruning is None or not pruning.penalty:
            return None
        last = pruning.last_directions(self.lora_ranks_of(cohort), self.experiment.config.model.lora.rank)
        last, weight = last.to(self.experiment.fabric.device, non_blocking=True), pruning.penalty

        def add(gradient: Tensor, values: Tensor) -> None:
            gradients, at = layout.unpack(gradient).factors, layout.unpack(values).factors
            add_penalty(gradients, at, last[: len(values)], weight)

        return add

    def fixed_of(self, cohort: Sequence[int]) -> Tensor | None:
        """What these clients do not train (C, P), of a method that deals out directions; None where they train all.

        Directions beyond a client's LoRA rank have no gradient, but noise would move them.
        """
        rank, lora_ranks = self.experiment.config.model.lora.rank, self.lora_ranks_of(cohort)
        if all(lora_rank == rank for lora_rank in lora_ranks):
            return None
        if not self.experiment.aggregator.selects_directions:
            if self.experiment.config.privacy.unit != "example":
                return None
            owned = torch.arange(rank) < torch.tensor(lora_ranks).unsqueeze(1)
            return self.experiment.layout.outside(owned.to(self.experiment.fabric.device, non_blocking=True))
        chosen = torch.zeros(len(cohort), rank, dtype=torch.bool)
        for row, client in zip(chosen, cohort, strict=True):
            row[directions_of(self.experiment, self.state, client)] = True
        return self.experiment.layout.outside(chosen.to(self.experiment.fabric.device, non_blocking=True))

    def scales_of(self, cohort: Sequence[int]) -> Tensor | None:
        """s_k / s = R / r_k of these clients (C,), where model.lora.client_scaling=own."""
        lora, device = self.experiment.config.model.lora, self.experiment.fabric.device
        if lora.client_scaling != "own":
            return None
        scales = torch.tensor([lora.rank / lora_rank for lora_rank in self.lora_ranks_of(cohort)])
        return scales.to(device, non_blocking=True)

    def cohort_of(self, cohort: tuple[int, ...], steps: Sequence[CohortStep]) -> Cohort:
        """These clients as they start."""
        seed, state = self.experiment.config.seed_of("client"), self.state
        device, round_index = self.experiment.fabric.device, state.completed_rounds
        return Cohort(
            start=initial_adapters(self.experiment, state, cohort),
            steps=steps,
            generators=[seeded(seed, round_index, c, "dropout", device=device) for c in cohort],
            corrections=None if state.controls is None else state.controls.corrections(cohort),
            fixed=self.fixed_of(cohort),
            penalty=self.penalty_of(cohort),
            scales=self.scales_of(cohort),
            privacy=self.privacy_of(cohort),
        )

    def train(
        self, cohort: tuple[int, ...], steps: Sequence[CohortStep], inputs: Iterator[Tensor]
    ) -> _CohortInTraining:
        """Train C clients. On a GPU the work may not be done yet."""
        device, state = self.experiment.fabric.device, self.state
        stopwatch = _Stopwatch(device)
        seed, round_index = self.experiment.config.seed_of("client"), state.completed_rounds
        augmentation = self.experiment.config.data.augmentation
        if augmentation != "none":
            crop = augmentation == "crop_flip"
            inputs = augmented(inputs, steps, cohort, seed=seed, round_index=round_index, crop=crop)
        if self.experiment.attack is not None and self.experiment.attack.on_images:
            inputs = self.experiment.attack.stamped(inputs, steps)
        of_clients = self.cohort_of(cohort, steps)
        result = self.training.train(of_clients, inputs)
        rows = result.rows
        for rule in self.rules:
            rows = rule(round_index, cohort, of_clients.start, rows)
        numbers = [self.experiment.layout.select(rows, self.training.parts), *kept_by_clients(self.rules, cohort)]
        stopwatch.stop()
        losses = (result.first_losses, result.losses)[-(self.experiment.measured - 1) :]
        return _CohortInTraining(cohort, torch.cat(numbers, dim=1), losses, result.measures, stopwatch)


def _counted(stream: Iterator[Tensor], steps: Sequence[CohortStep], progress: TrainingProgress) -> Iterator[Tensor]:
    """The next batches of the stream, one a step; each one is a heartbeat."""
    for step, batch in zip(steps, islice(stream, len(steps)), strict=True):
        heartbeat()
        yield batch
        progress.images_done(sum(step.counts))

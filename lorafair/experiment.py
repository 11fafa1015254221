"""From a configuration to everything a run needs: images, clients, model, evaluation, the checkpoint to continue from.

Letters: C clients side by side, N clients of the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, try_out
from lorafair.aggregation.defences.base import make_defence
from lorafair.aggregation.privacy_budget import budget_shares
from lorafair.aggregation.registry import method_of
from lorafair.aggregation.turns import check_turns
from lorafair.caching.inputs import Inputs, open_inputs
from lorafair.checkpointing.checkpoint import Checkpoint
from lorafair.checkpointing.continuing import checkpoint_to_continue_from, checkpoints_before
from lorafair.checkpointing.folder import FOLDER as CHECKPOINTS
from lorafair.checkpointing.lock import RunLock
from lorafair.checkpointing.shared_training import SharedTraining
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.catch_up import CatchUp, has_to_catch_up
from lorafair.communication.collectives import smallest_over_ranks
from lorafair.communication.compression.codings import Codings, codings_of
from lorafair.config.identity import NOISE, run_identity
from lorafair.config.profiles import read_profile
from lorafair.config.schema import ClientConfig, Config
from lorafair.console import format_count, log
from lorafair.data.attacks import Attack, StampedSource, backdoor_success, make_attack
from lorafair.data.begun import images_begun_with, noting_damage, record_images
from lorafair.data.images import ImageData
from lorafair.data.partition import Client, class_counts, partition, pooled
from lorafair.data.sources import load_images
from lorafair.errors import ConfigError
from lorafair.evaluation import Evaluation, Evaluator
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import AdapterLayout, Part
from lorafair.model.backbone import build_model, weights_text
from lorafair.model.client_ranks import lora_ranks_of_clients
from lorafair.model.proof import prove_apart
from lorafair.model.side_by_side import clients_with_room, cohort_size, largest_batch
from lorafair.model.work import flop_per_image
from lorafair.privacy.checks import check_privacy
from lorafair.privacy.client_level import client_epsilon, client_lines, client_warnings
from lorafair.privacy.examples import ExampleBudget, budget_of_examples
from lorafair.privacy.measures import MEASURES
from lorafair.privacy.noise_multiplier import noise_multiplier_of
from lorafair.privacy.summary import Mechanism
from lorafair.registry import METHODS
from lorafair.schedule import Scheduler, rounds_of_clients
from lorafair.virtual_time.choice import Rule
from lorafair.virtual_time.devices import Devices

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_HALF_PRECISION_SCALE = 4096.0  # lifts gradients over half precision's smallest number, 6e-8


@dataclass
class Experiment:
    """What stays the same over the rounds, on one rank. `open_inputs` completes it."""

    fabric: Fabric
    config: Config
    aggregator: Aggregator
    data: ImageData
    clients: tuple[Client, ...]  # (N,)
    lora_ranks: tuple[int, ...]  # (N,) of the clients' factors
    local: ClientConfig  # config.client, with the work of all clients in the one of the centralised reference
    cohort: int  # C, clients trained side by side
    model: AdaptedModel
    identity: dict[str, Any]  # what a checkpoint must agree with
    labels: Tensor  # of all training images as clients see them, on the device
    owners: tuple[Client, ...]  # who has the images: `clients`, also where these are pooled into one
    noise_multiplier: float | None = None  # with privacy: as given, or as privacy.epsilon needs
    attack: Attack | None = None  # what some clients do
    lock: RunLock | None = None  # of the run directory, on rank 0
    shared: SharedTraining | None = None  # what other runs have trained, and what they may take from this one
    _inputs: Inputs | None = field(default=None, repr=False)
    _evaluator: Evaluator | None = field(default=None, repr=False)
    _stamped: Evaluator | None = field(default=None, repr=False)

    @property
    def inputs(self) -> Inputs:
        """Where the batches for training and evaluation come from."""
        assert self._inputs is not None, "open_inputs() comes first"
        return self._inputs

    @property
    def evaluator(self) -> Evaluator:
        """Of the test images."""
        assert self._evaluator is not None, "open_inputs() comes first"
        return self._evaluator

    def open_inputs(self) -> None:
        """Find, or decode and compute, what the model is fed with. May take minutes. Call on every rank."""
        self._inputs = open_inputs(self.fabric, self.config, self.model, self.data)
        evaluation = self.config.evaluation
        with same_error_on_all_ranks(self.fabric):
            self._evaluator = Evaluator(
                self.fabric,
                self._inputs.test,
                self.data,
                batch_size=evaluation.batch_size,
                metrics=evaluation.metrics,
            )
            if self.attack is not None and self.attack.on_images:
                stamped = StampedSource(self._inputs.test)
                self._stamped = Evaluator(self.fabric, stamped, self.data, batch_size=evaluation.batch_size)

    def evaluate(self, adapters: Tensor, what: str) -> Evaluation:
        """Evaluate packed adapters (M, P); with a backdoor also on images with the square. Call on every rank."""
        found = self.evaluator(self.model, adapters, what)
        if self.attack is None or self._stamped is None:
            return found
        stamped = self._stamped(self.model, adapters, f"{what} of the backdoor")
        success = {"backdoor_success": backdoor_success(stamped.confusion, self.attack.target)}
        return dataclasses.replace(found, metrics=found.metrics | success)

    @property
    def layout(self) -> AdapterLayout:
        """Of a packed adapter."""
        return self.model.adapters.layout

    @cached_property
    def scheduler(self) -> Scheduler:
        """Plans the rounds."""
        pooled_data, federation = self.aggregator.pools_data, self.config.federation
        return Scheduler(
            seed=self.config.seed_of("federation"),
            sizes=self.sizes,
            costs=self.costs,
            clients_per_round=None if pooled_data else federation.clients_per_round,
            weighting=federation.weighting,
            cohort=self.cohort,
            world_size=self.fabric.world_size,
            poisson=self.config.privacy.unit == "client",
        )

    @cached_property
    def choice_rule(self) -> Rule | None:
        """How federation.profile chooses the clients; None without it, and where all data is in one place."""
        federation = self.config.federation
        if federation.profile is None or self.aggregator.pools_data:
            return None
        profile, flop = read_profile(federation.profile), None
        if profile.needs_flop:
            flop = flop_per_image(self.config.model, len(self.data.classes), self.aggregator.core)
        devices = Devices(profile, self.config.seed_of("federation"))
        return Rule(devices, federation.over_selection, federation.deadline_seconds, flop)

    @cached_property
    def codings(self) -> Codings:
        """Of what travels."""
        return codings_of(self.config, self.aggregator, self.layout)

    @cached_property
    def catch_up(self) -> CatchUp | None:
        """What clients that miss rounds need later; None where none does, or they need nothing."""
        wanted, merges = self.config.federation.clients_per_round, self.aggregator.resets
        merges |= self.config.federation.initialization == "fresh"
        coded = self.codings.down is not None
        if wanted is None or wanted >= len(self.clients) or self.aggregator.pools_data:
            return None
        if not has_to_catch_up(self.aggregator, merges=merges, coded=coded):
            return None
        return CatchUp(self.layout, self.aggregator, self.codings, merges)

    @cached_property
    def sizes(self) -> list[int]:
        """Training images of each client (N,)."""
        return [len(client.indices) for client in self.clients]

    @property
    def measured(self) -> int:
        """Numbers that a client returns beside those it trained: mean loss and seconds, before them its first loss."""
        return 3 if self.config.federation.weighting in ("q", "afl") else 2

    @cached_property
    def head_class_counts(self) -> Tensor | None:
        """Training images of each class at each client (N, Q), where they are the weights of the head's rows."""
        if self.config.federation.head_weighting == "client":
            return None
        return torch.from_numpy(class_counts(self.clients, self.data.train.labels, len(self.data.classes)))

    @cached_property
    def costs(self) -> list[int]:
        """Images that each client visits in a round (N,)."""
        local = self.local
        if local.steps is not None:
            return [local.steps * min(local.batch_size, size) for size in self.sizes]
        return [(local.epochs or 1) * size for size in self.sizes]

    @cached_property
    def examples(self) -> ExampleBudget | None:
        """What clients release of their images, with example-level privacy."""
        return budget_of_examples(self.config, self.local, self.sizes)

    @property
    def measures(self) -> int:
        """How many numbers each client measures of its mechanism."""
        return 0 if self.examples is None else len(MEASURES)

    def largest_epsilon(self, rounds: int) -> float | None:
        """Of what is released in so many rounds, of all units; None without privacy."""
        if self.noise_multiplier is None:
            return None
        if self.examples is None:
            return client_epsilon(self.config, len(self.clients), self.noise_multiplier, rounds)
        return self.examples.largest_epsilon(self.noise_multiplier, self.rounds_of_clients(rounds))

    def rounds_of_clients(self, rounds: int) -> list[int]:
        """In how many of the first `rounds` each client takes part (N,)."""
        scheduler = self.scheduler
        return rounds_of_clients(scheduler.seed, rounds, len(scheduler.sizes), scheduler.clients_per_round)

    @property
    def loss_scale(self) -> float:
        """By which the loss is multiplied, so that gradients are within the range of half precision."""
        return _HALF_PRECISION_SCALE if self.config.fabric.precision == "16-mixed" else 1.0

    @property
    def personal_parts(self) -> tuple[Part, ...]:
        """What of its own row each client starts from; the rest comes from the server."""
        local: tuple[Part, ...] = ("A", "B")
        return local if self.config.federation.initialization == "local" else self.aggregator.personal_parts


@dataclass(frozen=True)
class _Loaded:
    """What the first rank of a node builds, and the others then find in the cache."""

    data: ImageData
    images: str  # the fingerprint of those that the run began with
    clients: tuple[Client, ...]
    owners: tuple[Client, ...]
    lora_ranks: tuple[int, ...]
    local: ClientConfig
    model: AdaptedModel

    @property
    def sizes(self) -> list[int]:
        """Training images of each client (N,)."""
        return [len(client.indices) for client in self.clients]


def build_experiment(
    fabric: Fabric, config: Config, lock: RunLock | None = None
) -> tuple[Experiment, Checkpoint | None]:
    """Build everything but the inputs, and find the checkpoint to continue from. Call on every rank.

    What has to be fetched is fetched once a node. On rank 0 the run directory is held by `lock`.

    Raises LorafairError on all ranks if one of them finds the data, weights or settings unusable.
    """
    aggregator = method_of(config)
    check_privacy(config, aggregator)
    origin = checkpoints_before(fabric, config)
    loaded = _load_in_turns(fabric, config, aggregator, origin)
    model = loaded.model
    cohort = cohort_size(config, loaded.sizes, model, fabric.device)
    with same_error_on_all_ranks(fabric):
        if config.privacy.unit == "example":
            prove_apart(model, 2, "with privacy.unit=example")
        model.attach(fabric.device, cohort)
    identity = _identity(config, loaded, model)  # of the weights as they were loaded
    with same_error_on_all_ranks(fabric):
        model.set_precision(str(fabric.strategy.precision.precision))
    cohort = _cohort_with_room(fabric, config, loaded, cohort)
    if METHODS.is_from_plugin(str(config.method["name"])):
        with same_error_on_all_ranks(fabric):
            try_out(aggregator, model.adapters.layout)
    if config.model.compile is not None:
        mode = config.model.compile_mode
        model.compile(backend=config.model.compile, **({} if mode is None else {"mode": mode}))
    noise_multiplier = None
    with same_error_on_all_ranks(fabric):
        noise_multiplier = noise_multiplier_of(config, aggregator, loaded.local, loaded.sizes)
    if config.privacy.epsilon is not None:
        identity[NOISE] = noise_multiplier
    _introduce(config, loaded, cohort, fabric.world_size)
    if len(set(loaded.lora_ranks)) > 1 and aggregator.note_on_mixed_lora_ranks:
        log.info(f"method: {aggregator.note_on_mixed_lora_ranks}")
    count, classes = len(loaded.data.train), len(loaded.data.classes)
    attack = make_attack(config.attack, loaded.clients, count, classes, config.seed_of("federation"))
    labels = torch.from_numpy(loaded.data.train.labels).to(fabric.device)
    experiment = Experiment(
        fabric=fabric,
        config=config,
        aggregator=aggregator,
        data=loaded.data,
        clients=loaded.clients,
        lora_ranks=loaded.lora_ranks,
        local=loaded.local,
        cohort=cohort,
        model=model,
        identity=identity,
        labels=labels if attack is None else attack.labels(labels, classes),
        noise_multiplier=noise_multiplier,
        attack=attack,
        owners=loaded.owners,
        lock=lock,
    )
    _introduce_privacy(experiment)
    checkpoint = checkpoint_to_continue_from(fabric, config, identity)
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero:
            folder = config.folder / CHECKPOINTS
            record_images(folder, loaded.data, loaded.images, config.data, config.seed, origin=origin)
    return experiment, checkpoint


def _load_in_turns(fabric: Fabric, config: Config, aggregator: Aggregator, origin: Path | None) -> _Loaded:
    """The first rank of each node, then the others."""
    loaded: _Loaded | None = None
    for first in (True, False):
        with same_error_on_all_ranks(fabric):
            if first == (fabric.local_rank == 0):
                loaded = _load(config, aggregator, origin)
    assert loaded is not None
    return loaded


def clients_of(config: Config, data: ImageData) -> tuple[Client, ...]:
    """The clients of a run on these images (N,). Raises PartitionError."""
    train, seed = data.train, config.seed_of("partition")
    return partition(config.partition, train.labels, train.domains, data.domains, seed)


def _load(config: Config, aggregator: Aggregator, origin: Path | None) -> _Loaded:
    local = config.client
    begun = None if origin is None else images_begun_with(origin, config.data, config.seed)
    data = load_images(config.data, config.seed) if begun is None else begun.data
    images = data.fingerprint
    clients = clients_of(config, data)
    if begun is not None:
        data, clients = begun.without_gone(clients)
    data = noting_damage(data, config.folder / CHECKPOINTS)
    wanted = config.federation.clients_per_round
    if wanted is not None and wanted > len(clients):
        raise ConfigError(f"federation.clients_per_round={wanted}: there are {len(clients)} clients")
    if config.federation.over_selection is not None and wanted == len(clients):
        raise ConfigError(
            f"federation.over_selection={config.federation.over_selection:g} has no effect: "
            f"federation.clients_per_round={wanted} is all clients; set fewer"
        )
    if config.defence.name is not None:
        make_defence(config.defence).check(wanted or len(clients))
    owners = clients
    if aggregator.pools_data:
        if local.steps is not None:  # as many images a round as the clients of a federated round see together
            local = dataclasses.replace(local, steps=local.steps * (wanted or len(clients)))
        clients = pooled(data.train.labels)
    check_turns(aggregator, [len(client.indices) for client in clients], local)
    model = build_model(config.model, len(data.classes), config.seed, aggregator.core)
    return _Loaded(data, images, clients, owners, lora_ranks_of_clients(config, len(clients)), local, model)


def _identity(config: Config, loaded: _Loaded, model: AdaptedModel) -> dict[str, Any]:
    """Settings that change numbers, what plug-ins have defined, images and frozen weights before any folding."""
    images = {"images": loaded.images, "classes": loaded.data.classes}
    weights = {"frozen_weights": model.fingerprint()}
    return run_identity(config) | images | weights


def _cohort_with_room(fabric: Fabric, config: Config, loaded: _Loaded, cohort: int) -> int:
    """At most `cohort` clients: as many as the memory of every rank's GPU has room for, where that is for us to say."""
    if fabric.device.type != "cuda" or cohort == 1 or config.client.cohort != "auto":
        return cohort
    batch = largest_batch(config, loaded.sizes)
    room = max(1, smallest_over_ranks(fabric, clients_with_room(loaded.model, fabric.autocast, batch, fabric.device)))
    if room < cohort:
        log.info(f"clients: {room} side by side instead of {cohort}, because the GPU has no memory for more")
    return min(cohort, room)


def _introduce_privacy(experiment: Experiment) -> None:
    config, budget, noise_multiplier = experiment.config, experiment.examples, experiment.noise_multiplier
    if noise_multiplier is None or not experiment.fabric.is_global_zero:
        return
    if budget is None:
        clients, shares = len(experiment.clients), budget_shares(config.privacy, experiment.aggregator)
        for line in client_lines(config, clients, noise_multiplier, shares.products):
            log.info(line)
        for line in client_warnings(config, clients):
            log.warning(line)
        return
    trained = experiment.layout.length_of(experiment.aggregator.trains(0))
    mechanism = Mechanism(config, budget, noise_multiplier, trained)
    for line in mechanism.lines(experiment.rounds_of_clients(config.rounds)):
        log.info(line)
    for line in mechanism.warnings():
        log.warning(line)


def _introduce(config: Config, loaded: _Loaded, cohort: int, world_size: int) -> None:
    """Print the data, the clients and the model."""
    data, clients, layout = loaded.data, loaded.clients, loaded.model.adapters.layout
    images = np.array([len(client.indices) for client in clients])
    log.info(f"images: {data.description}")
    log.info(
        f"        {format_count(len(data.domains), 'domain')}, {format_count(len(data.classes), 'class', 'classes')}, "
        f"{len(data.train.labels):,} for training, {len(data.test.labels):,} for the test"
    )
    beside = f", {cohort} side by side" if cohort > 1 else ""
    log.info(f"clients: {len(clients)} with {images.min():,} to {images.max():,} images each{beside}")
    log.info(
        f"model: {config.model.name} ({weights_text(config.model)}), LoRA rank {config.model.lora.rank} on "
        f"{len(layout.factors)} layers: {layout.adapter_length:,} adapter and "
        f"{layout.length - layout.adapter_length:,} head parameters a client"
    )
    busy = min(config.federation.clients_per_round or len(clients), len(clients))
    busy = -(-busy // cohort)
    if world_size > busy:
        log.warning(
            f"{world_size - busy} of {world_size} processes have no client to train; "
            f"fabric.devices x fabric.num_nodes = {busy} would be enough (evaluation uses all)"
        )

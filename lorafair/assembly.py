"""From a configuration to everything a run needs: images, clients, model, evaluation, the identity of the run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lorafair.adapter import Part
from lorafair.aggregation import Aggregator, method_of
from lorafair.checkpoint import Checkpoint, find_checkpoint, mark_begun, resume_of_restarted
from lorafair.cluster import slurm_job
from lorafair.config import ClientConfig, Config, ConfigError, numeric_settings
from lorafair.data.images import ImageData, Split
from lorafair.data.loading import BatchSource, ImageSource, ResidentSource
from lorafair.data.partition import Client, partition, pooled
from lorafair.data.sources import load_images
from lorafair.evaluation import Evaluator
from lorafair.exchange import same_error_on_all_ranks
from lorafair.image_cache import packed
from lorafair.models import AdaptedModel, build_model, image_size_of
from lorafair.prefix_cache import cached_tokens, reason_against_cache, tokens_of
from lorafair.schedule import RoundPlan, plan_round
from lorafair.seeding import seeded
from lorafair.shared_array import on_all_ranks
from lorafair.staging import staging_folder
from lorafair.tracking import make_run_dir, say

# client.cohort=auto: enough cohorts for many ranks, and steps whose activations fit into a core's cache, or fill a GPU.
COHORTS_OF_ROUND = 16
NUMBERS_OF_STEP = {"cpu": 2**19, "gpu": 2**25}  # that enter an adapted layer


@dataclass(frozen=True)
class Federation:
    """What stays the same over the rounds, on one rank."""

    fabric: Fabric
    config: Config
    aggregator: Aggregator
    data: ImageData
    clients: tuple[Client, ...]  # (N,)
    ranks: tuple[int, ...]  # (N,) of the clients' factors
    local: ClientConfig  # config.client, with the work of all clients in the one of the centralised reference
    cohort: int  # C, clients trained side by side
    model: AdaptedModel
    train_source: BatchSource
    labels: Tensor  # of all training images, on the device
    evaluator: Evaluator
    identity: dict[str, Any]  # what a checkpoint must agree with

    def plan(
        self, round_index: int, measured: Mapping[int, float] | None = None, finished: Collection[tuple[int, ...]] = ()
    ) -> RoundPlan:
        """The plan of a round, some cohorts of which may be `finished`; the same on every rank.

        `measured` are the seconds that clients took in the rounds before.
        """
        return plan_round(
            round_index,
            seed=self.config.seed,
            sizes=self.sizes,
            costs=self.costs,
            measured=measured or {},
            clients_per_round=None if self.aggregator.pools_data else self.config.federation.clients_per_round,
            weighting=self.config.federation.weighting,
            cohort=self.cohort,
            world_size=self.fabric.world_size,
            finished=finished,
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Training images of each client (N,)."""
        return [len(client.indices) for client in self.clients]

    @cached_property
    def costs(self) -> list[int]:
        """Images that each client visits in a round (N,)."""
        local = self.local
        if local.steps is not None:
            return [local.steps * min(local.batch_size, size) for size in self.sizes]
        return [(local.epochs or 1) * size for size in self.sizes]

    @property
    def kept_parts(self) -> tuple[Part, ...]:
        """What of its own row each client starts from; the rest comes from the server."""
        local: tuple[Part, ...] = ("A", "B")
        return local if self.config.federation.initialization == "local" else self.aggregator.keeps


def assemble(fabric: Fabric, config: Config) -> tuple[Federation, Checkpoint | None]:
    """Build everything, on every rank of a launched Fabric, and find the checkpoint to continue from.

    What has to be fetched is fetched once a node.

    Raises LorafairError on all ranks if one of them finds the data, weights or settings unusable.
    """
    aggregator = method_of(config)
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero:
            make_run_dir(config.folder)
    size = image_size_of(config.model)
    for turn in (True, False):  # the first rank of a node builds what the others then find in the cache
        with same_error_on_all_ranks(fabric):
            if turn == (fabric.local_rank == 0):
                data, clients, local, model = _load(config, aggregator)
                ranks = ranks_of_clients(config, len(clients))
    cohort = cohort_size(config, clients, model, size, fabric.device)
    model.attach(fabric.device, cohort)
    if config.model.compile is not None:
        model.compile(backend=config.model.compile)
    if fabric.is_global_zero:
        _introduce(config, data, clients, model, cohort, fabric.world_size)
    identity = _identity(config, data, model)
    found = None
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero:  # before minutes are spent on tokens
            job = slurm_job(os.environ)
            found = find_checkpoint(config.folder, resume_of_restarted(config.folder, config.resume, job), identity)
            mark_begun(config.folder, job)
            if found is not None and found.completed_rounds > config.rounds:
                raise ConfigError(
                    f"rounds={config.rounds}: {config.folder} has {found.completed_rounds} rounds already; set more "
                    "rounds, or choose another run_dir"
                )
    found = fabric.broadcast(found)
    train_source, test_source = _sources(fabric, config, model, data, size)
    if config.data.resident:
        with same_error_on_all_ranks(fabric):
            train_source = ResidentSource(train_source, len(data.train), fabric.device)
    federation = Federation(
        fabric=fabric,
        config=config,
        aggregator=aggregator,
        data=data,
        clients=clients,
        ranks=ranks,
        local=local,
        cohort=cohort,
        model=model,
        train_source=train_source,
        labels=torch.from_numpy(data.train.labels).to(fabric.device),
        evaluator=Evaluator(
            fabric,
            test_source,
            data.test.labels,
            data.test.domains,
            classes=len(data.classes),
            batch_size=config.evaluation.batch_size,
        ),
        identity=identity,
    )
    return federation, found


def _identity(config: Config, data: ImageData, model: AdaptedModel) -> dict[str, Any]:
    """The settings that change numbers, the images and the frozen weights as they are before any folding."""
    images = {"images": data.fingerprint, "classes": data.classes}
    return numeric_settings(config) | images | {"frozen_weights": model.fingerprint()}


def _load(config: Config, aggregator: Aggregator) -> tuple[ImageData, tuple[Client, ...], ClientConfig, AdaptedModel]:
    data, local = load_images(config.data, config.seed), config.client
    clients = partition(config.partition, data.train.labels, data.train.domains, data.domains, config.seed)
    wanted = config.federation.clients_per_round
    if wanted is not None and wanted > len(clients):
        raise ConfigError(f"federation.clients_per_round={wanted}: there are {len(clients)} clients")
    if aggregator.pools_data:
        if local.steps is not None:  # as many images a round as the clients of a federated round see together
            local = dataclasses.replace(local, steps=local.steps * (wanted or len(clients)))
        clients = pooled(data.train.labels)
    return data, clients, local, build_model(config.model, len(data.classes), config.seed)


def ranks_of_clients(config: Config, clients: int) -> tuple[int, ...]:
    """The LoRA rank of each client: given one by one, or drawn from levels with the seed.

    Raises ConfigError if they do not fit the number of clients.
    """
    lora = config.model.lora
    if lora.client_ranks is None:
        return (lora.rank,) * clients
    if lora.client_rank_shares is None:
        if len(lora.client_ranks) != clients:
            raise ConfigError(
                f"model.lora.client_ranks has {len(lora.client_ranks)} ranks for {clients} clients; give one a client, "
                "or levels with their model.lora.client_rank_shares"
            )
        return lora.client_ranks
    shares = torch.tensor(lora.client_rank_shares, dtype=torch.float64)
    drawn = torch.multinomial(shares, clients, replacement=True, generator=seeded(config.seed, "ranks"))
    return tuple(lora.client_ranks[level] for level in drawn.tolist())


def cohort_size(
    config: Config, clients: tuple[Client, ...], model: AdaptedModel, image_size: int, device: torch.device
) -> int:
    """C, the clients trained side by side: client.cohort, or for auto what follows from model, batch and clients.

    It depends on no measurement and not on the number of ranks, because the last bits of a client's numbers can depend
    on who trains beside it.
    """
    if config.client.cohort != "auto":
        return config.client.cohort
    selected = min(config.federation.clients_per_round or len(clients), len(clients))
    most = selected // COHORTS_OF_ROUND
    if most <= 1:
        return 1
    batch = min(config.client.batch_size, max(len(client.indices) for client in clients))
    numbers = batch * model.numbers_per_image(image_size)
    return max(1, min(most, int(NUMBERS_OF_STEP["cpu" if device.type == "cpu" else "gpu"] / numbers)))


def _sources(
    fabric: Fabric, config: Config, model: AdaptedModel, data: ImageData, size: int
) -> tuple[BatchSource, BatchSource]:
    def images(split: Split) -> ImageSource:
        return ImageSource(split.images, size, config.data.workers, pin_memory=fabric.device.type == "cuda")

    with same_error_on_all_ranks(fabric):
        count = len(data.train.labels) + len(data.test.labels)
        reason = reason_against_cache(config.model, model, count, size, config.data.augmentation)
    reason = fabric.broadcast(reason)
    stage = config.data.stage
    if fabric.is_global_zero and stage is not None and staging_folder(stage, os.environ) is None:
        say("nothing is staged: data.stage=auto, and neither SLURM_TMPDIR nor TMPDIR is set")
    if reason:
        if fabric.is_global_zero and config.model.prefix_cache != "never":
            say(f"tokens of the frozen blocks are not cached: {reason}")
        kept = packed(fabric, config.data, data, size, read_once=False)
        if fabric.is_global_zero and stage is not None and kept is data:
            say("nothing is staged: neither decoded images nor tokens are kept in a file; see data.cache")
        return images(kept.train), images(kept.test)
    tokens = [
        tokens_of(fabric, model, len(split), f"{data.fingerprint} {name}", size, config.model.prefix_cache_dtype)
        for name, split in (("train", data.train), ("test", data.test))
    ]
    there = on_all_ranks(fabric, all(split.file.exists() for split in tokens))
    if fabric.is_global_zero:
        done = "kept from an earlier run" if there else f"computed once for {count:,} images"
        say(f"tokens of the {model.prefix_blocks} frozen blocks below the adapters: {done}")
    if not there:
        data = packed(fabric, config.data, data, size, read_once=True)
    train, test = (
        cached_tokens(fabric, model, images(split), file, stage)
        for split, file in zip((data.train, data.test), tokens, strict=True)
    )
    return train, test


def _introduce(
    config: Config, data: ImageData, clients: tuple[Client, ...], model: AdaptedModel, cohort: int, world_size: int
) -> None:
    layout, images = model.adapters.layout, np.array([len(client.indices) for client in clients])
    say(f"images: {data.description}")
    say(
        f"        {len(data.domains)} domains, {len(data.classes)} classes, "
        f"{len(data.train.labels):,} for training, {len(data.test.labels):,} for the test"
    )
    beside = f", {cohort} side by side" if cohort > 1 else ""
    say(f"clients: {len(clients)} with {images.min():,} to {images.max():,} images{beside}")
    say(
        f"model: {config.model.name} ({config.model.weights}), LoRA rank {config.model.lora.rank} on "
        f"{len(layout.factors)} layers: {layout.adapter_length:,} adapter and "
        f"{layout.length - layout.adapter_length:,} head parameters a client"
    )
    busy = min(config.federation.clients_per_round or len(clients), len(clients))
    busy = -(-busy // cohort)
    if world_size > busy:
        say(
            f"warning: {world_size - busy} of {world_size} processes have no client to train; "
            f"fabric.devices x fabric.num_nodes = {busy} would be enough (evaluation uses all)"
        )

"""The server step: on rank 0 for all layers, or on every rank for some of them.

The results do not depend on where it runs.

Letters: K clients of the round, L adapted layers, n clients of this rank, p numbers trained, P packed length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafair.aggregation.base import ServerUpdate, aggregate, check_finite
from lorafair.aggregation.bias import bias_metrics
from lorafair.aggregation.factor_algebra import add
from lorafair.aggregation.rank_pruning import tail_products
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.collectives import (
    ClientResults,
    exchange_columns,
    gather_clients,
    gather_objects,
)
from lorafair.data.loading import number_of_batches
from lorafair.experiment import Experiment
from lorafair.model.adapter import PARTS, AdapterLayout, LoRAFactors, put_columns, take_columns
from lorafair.model.parameters import AdapterParameters
from lorafair.schedule import RoundPlan, effective_step_size, with_scheduled_learning_rate
from lorafair.server.gathered import rules_of
from lorafair.server.optimizer import Moments, server_step
from lorafair.server.private_release import make_release
from lorafair.server.recent import averaged_parts
from lorafair.server.state import ServerState, initial_adapters, lora_ranks_of
from lorafair.server.weighting import stepped


@dataclass(frozen=True)
class ServerResult:
    """What the server makes of some layers, or of all."""

    update: ServerUpdate
    bias: dict[str, Tensor]  # metrics of what is left in every layer (L,), where adapters are averaged
    moments: Moments | None  # of the server optimiser, moved on
    lora_ranks: list[int] | None = None  # (K,) of the clients of the round, where they change them

    def to(self, device: torch.device | str) -> ServerResult:
        """The same on another device."""
        moments = self.moments
        return ServerResult(
            update=self.update.to(device),
            bias={name: values.to(device) for name, values in self.bias.items()},
            moments=None if moments is None else Moments(moments.first.to(device), moments.second.to(device)),
            lora_ranks=self.lora_ranks,
        )


class Server(ABC):
    """Where the server step runs: which layers each rank aggregates, and how the results come together on rank 0."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.shards = self.assign_layers(experiment.layout, experiment.fabric.world_size)
        self.rules = rules_of(experiment)
        self.release = make_release(experiment)

    @abstractmethod
    def assign_layers(self, layout: AdapterLayout, ranks: int) -> list[AdapterLayout]:
        """The layers that each rank aggregates."""

    @abstractmethod
    def merge_shards(self, state: ServerState, mine: ServerResult) -> ServerResult | None:
        """What all ranks have made of their layers, on rank 0. Call on every rank."""

    @property
    def shard(self) -> AdapterLayout:
        """The layers of this rank."""
        return self.shards[self.experiment.fabric.global_rank]

    def gather(self, state: ServerState, plan: RoundPlan, results: ClientResults) -> ClientResults:
        """The results with packed adapters (K, P) after training, from each rank's rows of numbers trained (n, p).

        Of the layers that this rank aggregates; of all where each rank goes on with what clients keep or their control
        variates. What was not trained is as the clients started. Call on every rank.
        """
        fabric, layout = self.experiment.fabric, self.experiment.layout
        parts, kept = self.experiment.aggregator.trains(state.completed_rounds), set(results.clients)
        clients_of_rank = [[client for client in clients if client in kept] for clients in plan.clients_of_rank]
        if state.personal_adapters is not None or state.controls is not None:
            shard = layout
            rows = gather_clients(fabric, results.rows, clients_of_rank)
        else:
            shard = self.shard
            columns = [layout.columns_of(other, parts) for other in self.shards]
            rows = exchange_columns(fabric, results.rows, clients_of_rank, columns)
        if rows.shape[1] != shard.length:  # not all of it was trained
            rows = shard.replaced(initial_adapters(self.experiment, state, results.clients, shard), parts, rows)
        results = replace(results, rows=rows)
        start = take_columns(state.adapter, layout.columns_of(shard, PARTS))
        for rule in self.rules:
            results = rule(state.completed_rounds, shard, start, results)
        return results if self.release is None else self.release(state, shard, start, results)

    def step(self, state: ServerState, results: ClientResults) -> ServerResult | None:
        """The next adapter, from the gathered results; all of it on rank 0, None elsewhere. Call on every rank."""
        with same_error_on_all_ranks(self.experiment.fabric):
            mine = self.aggregate_shard(state, results)
        return self.merge_shards(state, mine)

    def aggregate_shard(self, state: ServerState, results: ClientResults) -> ServerResult:
        """The server step on the layers of this rank."""
        shard, aggregator = self.shard, self.experiment.aggregator
        if not shard.length:
            return ServerResult(ServerUpdate(factors={}, folded={}, head={}, sent_lora_rank={}), bias={}, moments=None)
        row_weights = results.weights if results.row_weights is None else results.row_weights
        weights = torch.tensor(row_weights, dtype=torch.float64, device=results.rows.device)
        columns = self.experiment.layout.columns_of(shard, PARTS)
        start = take_columns(state.adapter, columns)
        rows, lora_ranks = pruned_rows(self.experiment, state, shard, results, start)
        clients = shard.unpack(rows)
        received = aggregator.receives(state.completed_rounds)
        of_round = aggregator.in_round(state.completed_rounds)
        counts = self.experiment.head_class_counts
        if counts is not None:
            counts = counts[list(results.clients)]
        update, moments = aggregate(of_round, clients, weights, shard.unpack(start), received, counts), None
        check_finite(aggregator, update)
        if results.step != 1:
            update = stepped(shard, update, start, results.step, received)
        if state.moments is not None:
            moments = Moments(*(take_columns(moment, columns).clone() for moment in state.moments.tensors))
            proposed = shard.pack(update.adapter)
            spans = shard.spans(received)
            moved = shard.unpack(server_step(self.experiment.config.server, moments, start, proposed, spans))
            update = replace(update, factors=moved.factors, head=moved.head, cores=moved.cores)
            self.store_moments(state, shard, moments)
        averaged = not (aggregator.personal_parts or aggregator.pools_data or results.row_weights is not None)
        return ServerResult(update, bias_metrics(clients, weights, update) if averaged else {}, moments, lora_ranks)

    def store_moments(self, state: ServerState, shard: AdapterLayout, moments: Moments | None) -> None:
        """Keep the moments of some layers: rank 0 those of all, other ranks at least their own."""
        if state.moments is not None and moments is not None:
            columns = self.experiment.layout.columns_of(shard, PARTS)
            for whole, some in zip(state.moments.tensors, moments.tensors, strict=True):
                put_columns(whole, columns, some)


class Rank0Server(Server):
    """fabric.server=rank0: rank 0 holds all clients' adapters and aggregates all layers."""

    def assign_layers(self, layout: AdapterLayout, ranks: int) -> list[AdapterLayout]:
        """All layers to rank 0."""
        return [layout, *[AdapterLayout(factors={}, head={})] * (ranks - 1)]

    def merge_shards(self, state: ServerState, mine: ServerResult) -> ServerResult | None:
        """Rank 0 has made all of it."""
        return mine if self.experiment.fabric.is_global_zero else None


class ShardedServer(Server):
    """fabric.server=sharded: every rank holds and aggregates some of the layers."""

    def assign_layers(self, layout: AdapterLayout, ranks: int) -> list[AdapterLayout]:
        """About equal numbers of parameters to every rank."""
        return layout.split(ranks)

    def merge_shards(self, state: ServerState, mine: ServerResult) -> ServerResult | None:
        """Rank 0 gets the layers of all, in the order of the model."""
        gathered = gather_objects(self.experiment.fabric, mine.to("cpu"))
        if gathered is None:
            return None
        results = [result.to(self.experiment.fabric.device) for result in gathered]
        for shard, other in zip(self.shards, results, strict=True):
            self.store_moments(state, shard, other.moments)
        paths = [path for result in results for path in result.update.factors]
        order = [paths.index(path) for path in self.experiment.layout.factors]
        return ServerResult(
            update=ServerUpdate.joined([result.update for result in results], list(self.experiment.layout.factors)),
            bias={
                name: torch.cat([result.bias[name] for result in results if result.bias])[order]
                for name in dict.fromkeys(name for result in results for name in result.bias)
            },
            moments=state.moments,
        )


def make_server(experiment: Experiment) -> Server:
    """The server that fabric.server names."""
    servers = {"rank0": Rank0Server, "sharded": ShardedServer}
    return servers[experiment.config.fabric.server](experiment)


def pruned_rows(
    experiment: Experiment, state: ServerState, layout: AdapterLayout, results: ClientResults, start: Tensor
) -> tuple[Tensor, list[int] | None]:
    """Packed adapters (K, P) without the directions that clients have given up, and their LoRA ranks after that."""
    pruning = experiment.aggregator.rank_pruning
    if pruning is None:
        return results.rows, None
    ranks = lora_ranks_of(experiment, state, results.clients)
    last = pruning.last_directions(ranks, experiment.config.model.lora.rank)
    before, after = (tail_products(layout.unpack(t).factors.values(), last) for t in (start, results.rows))
    kept = pruning.pruned(before, after, ranks)
    return layout.truncated(results.rows, torch.tensor(kept, device=results.rows.device)), kept


def keep_residuals(
    experiment: Experiment, state: ServerState, plan: RoundPlan, results: ClientResults
) -> ClientResults:
    """The results without what clients keep, (n, p): every rank gets that of all, for any of them may train one next.

    Call on every rank.
    """
    if state.client_residuals is None:
        return results
    lost, kept = state.client_residuals.shape[1], set(results.clients)
    clients_of_rank = [[client for client in clients if client in kept] for clients in plan.clients_of_rank]
    rows, mine = results.rows.split([results.rows.shape[1] - lost, lost], dim=1)
    state.client_residuals[list(results.clients)] = gather_clients(
        experiment.fabric, mine.contiguous(), clients_of_rank
    )
    return replace(results, rows=rows.contiguous())


def broadcast_lora_ranks(
    experiment: Experiment, state: ServerState, results: ClientResults, result: ServerResult | None
) -> None:
    """Let every rank know the LoRA ranks that clients have after the round, where they change. Call on every rank."""
    if state.lora_ranks is not None:
        ranks = experiment.fabric.broadcast(None if result is None else result.lora_ranks)
        state.lora_ranks[list(results.clients)] = torch.tensor(ranks)


def update_controls(experiment: Experiment, state: ServerState, results: ClientResults) -> None:
    """Move SCAFFOLD's control variates on, from where the clients started and ended; before the state moves on."""
    if state.controls is None:
        return
    local = with_scheduled_learning_rate(experiment.local, state.completed_rounds)
    parts, sizes = experiment.aggregator.trains(state.completed_rounds), experiment.sizes
    amounts = sizes if experiment.config.federation.weighting == "size" else [1] * len(sizes)
    total = sum(amounts)
    steps = [number_of_batches(sizes[client], local) for client in results.clients]
    state.controls.update(
        results.clients,
        [amounts[client] / total for client in results.clients],
        initial_adapters(experiment, state, results.clients) - results.rows,
        {part: experiment.layout.slices[part] for part in parts},
        {part: [effective_step_size(local, part, count) for count in steps] for part in parts},
    )


def apply_update(
    experiment: Experiment,
    state: ServerState,
    results: ClientResults,
    received: Tensor,
    folded: Mapping[str, LoRAFactors],
) -> None:
    """Move the state to the next round: fold into the frozen weights first, then set where clients start.

    `received` are the numbers that the server sends down, in the order of a packed row.
    """
    adapters, config, aggregator = experiment.model.adapters, experiment.config, experiment.aggregator
    layout = adapters.layout
    state.adapter = layout.replaced(state.adapter, aggregator.receives(state.completed_rounds), received)
    state.completed_rounds += 1
    if state.recent is not None:
        state.recent.add(layout.select(state.adapter, averaged_parts(config.evaluation)), state.completed_rounds)
    adapters.fold_into_base(folded)
    state.folded |= bool(folded)
    if config.federation.initialization == "fresh":
        adapters.fold_into_base(layout.unpack(state.adapter).factors)
        state.folded = True
    if state.initial_factors is not None:
        _fold_and_reset(adapters, state)
    if config.federation.initialization == "fresh" or aggregator.restarts:
        fresh = adapters.draw(config.seed_of("model"), state.completed_rounds).to(received.device)
        state.adapter = layout.replaced(state.adapter, ("A", "B"), layout.select(fresh, ("A", "B")))
    if state.personal_adapters is not None:
        state.personal_adapters[list(results.clients)] = results.rows


def _fold_and_reset(adapters: AdapterParameters, state: ServerState) -> None:
    """Merge how far the factors are from those of the first round, W0 += s·(B·A − B0·A0), and go back to these."""
    assert state.initial_factors is not None
    layout = adapters.layout
    received = layout.unpack(state.adapter).factors
    state.adapter = layout.replaced(state.adapter, ("A", "B"), state.initial_factors)
    initial = layout.unpack(state.adapter).factors
    adapters.fold_into_base(
        {path: add(received[path], LoRAFactors(A=old.A, B=-old.B)) for path, old in initial.items()}
    )
    state.folded = True

"""What one round hands to the next, and where clients start from it.

Letters: C clients of a cohort, N clients of the run, P packed length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorafair.checkpointing.checkpoint import BASE, MISSED, Checkpoint, check_tensors
from lorafair.checkpointing.partial_round import list_unfinished
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.compression.codings import corrected_parts
from lorafair.experiment import Experiment
from lorafair.model.adapter import PARTS, AdapterLayout, Part, take_columns
from lorafair.privacy.clipped_updates import bounds_at_start
from lorafair.server.optimizer import Moments
from lorafair.server.recent import RECENT, RecentAdapters
from lorafair.server.scaffold import ControlVariates
from lorafair.server.start import initial_adapter


@dataclass
class ServerState:
    """The state between two rounds; the same on every rank but for `moments`, `residual`, `missed` and `totals`."""

    completed_rounds: int
    adapter: Tensor  # (P,) where clients start
    personal_adapters: Tensor | None = None  # (N, P) what each client keeps: `personal_parts` of its row
    moments: Moments | None = (
        None  # of the server optimiser; of use for the layers a rank aggregates, on rank 0 for all
    )
    controls: ControlVariates | None = None  # of SCAFFOLD
    mixture: Tensor | None = None  # (N,) float64, sum 1: λ of federation.weighting=afl
    lora_ranks: Tensor | None = None  # (N,) int64 of the clients, for a method that changes them
    residual: Tensor | None = None  # (P,) what compression.down has lost so far; of use on rank 0
    client_residuals: Tensor | None = None  # (N, q) what compression.up has lost of each client's last update
    missed: Tensor | None = None  # (N, ...) bytes that clients have to catch up on; of use on rank 0
    initial_factors: Tensor | None = None  # A and B of the first round, packed, for a method that resets to them
    recent: RecentAdapters | None = None  # of the last rounds, where their mean is evaluated
    clip_bounds: Tensor | None = None  # (G,) of clients' updates, where privacy.clip_quantile moves them
    folded: bool = False  # the frozen weights have changed
    unfinished_rounds: frozenset[int] = frozenset()  # rounds, from 0, of which some clients' results are on disk
    totals: dict[str, float] = field(default_factory=dict)  # counted since round 1
    client_seconds: dict[int, float] = field(default_factory=dict)  # taken lately; decides the assignment to ranks
    saved_rounds: int = 0  # completed rounds of the last checkpoint
    saved_at: float = field(default_factory=time.monotonic)

    def tensors(self) -> dict[str, Tensor]:
        """The state's own tensors by the names they have in a checkpoint."""
        tensors = {"adapter": self.adapter}
        if self.personal_adapters is not None:
            tensors["personal_adapters"] = self.personal_adapters
        if self.moments is not None:
            tensors |= {"moments.first": self.moments.first, "moments.second": self.moments.second}
        if self.controls is not None:
            tensors |= {"controls.server": self.controls.server, "controls.clients": self.controls.clients}
        if self.mixture is not None:
            tensors["mixture"] = self.mixture
        if self.lora_ranks is not None:
            tensors["lora_ranks"] = self.lora_ranks
        if self.residual is not None:
            tensors["residual"] = self.residual
        if self.client_residuals is not None:
            tensors["client_residuals"] = self.client_residuals
        if self.missed is not None:
            tensors[MISSED] = self.missed
        if self.initial_factors is not None:
            tensors["initial_factors"] = self.initial_factors
        if self.clip_bounds is not None:
            tensors["clip_bounds"] = self.clip_bounds
        if self.recent is not None:
            tensors[RECENT] = self.recent.rows
        return tensors


def start_or_resume(experiment: Experiment, checkpoint: Checkpoint | None) -> ServerState:
    """The state after a checkpoint, or that before the first round. Call on every rank."""
    fabric, config, adapters = experiment.fabric, experiment.config, experiment.model.adapters
    drawn = adapters.draw(config.seed_of("model"), 0).to(fabric.device)
    adapter, folded = initial_adapter(experiment, drawn) if checkpoint is None else (drawn, {})
    state = _at_start(experiment, adapter)
    adapters.fold_into_base(folded)
    state.folded = bool(folded)
    if checkpoint is not None:
        base = base_weights_in(checkpoint)
        adapters.load_base_weights(base)
        for name, tensor in state.tensors().items():
            if name in checkpoint.tensors:  # an older version has not counted what clients miss
                tensor.copy_(checkpoint.tensors[name])
        state.completed_rounds, state.totals = checkpoint.completed_rounds, dict(checkpoint.totals)
        state.client_seconds, state.saved_rounds = dict(checkpoint.client_seconds), checkpoint.completed_rounds
        state.folded = bool(base)
    unfinished: dict[int, Path] = {}
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero:  # it alone reads: file systems lag between nodes
            unfinished = list_unfinished(config.folder)
    state.unfinished_rounds = fabric.broadcast(frozenset(unfinished))
    return state


def _at_start(experiment: Experiment, adapter: Tensor) -> ServerState:
    """Before the first round, from the initial adapter (P,)."""
    config, clients, layout = experiment.config, len(experiment.clients), experiment.layout
    return ServerState(
        completed_rounds=0,
        adapter=adapter,
        personal_adapters=adapter.repeat(clients, 1) if experiment.personal_parts else None,
        moments=Moments.at_start(config.server, adapter) if config.server.optimizer != "none" else None,
        controls=ControlVariates.at_start(clients, adapter) if config.client.scaffold else None,
        mixture=mixture_at_start(experiment.sizes) if config.federation.weighting == "afl" else None,
        lora_ranks=torch.tensor(experiment.lora_ranks) if experiment.aggregator.rank_pruning is not None else None,
        residual=torch.zeros_like(adapter) if config.compression.down is not None else None,
        client_residuals=_client_residuals(experiment, adapter),
        missed=experiment.catch_up.at_start(clients) if experiment.catch_up is not None else None,
        initial_factors=layout.select(adapter, ("A", "B")).clone() if experiment.aggregator.resets else None,
        clip_bounds=bounds_at_start(config.privacy),
        recent=RecentAdapters.at_start(config.evaluation, experiment.layout, adapter.device),
    )


def mixture_at_start(sizes: Sequence[int]) -> Tensor:
    """AFL's λ (N,) before the first round: the clients' shares of the images, as federation.weighting=size has it."""
    return torch.tensor(sizes, dtype=torch.float64) / sum(sizes)


def client_residual_parts(experiment: Experiment) -> tuple[Part, ...]:
    """The parts of which clients keep what compression.up loses."""
    sent = {part for round_index in range(4) for part in experiment.aggregator.sends(round_index)}  # some take turns
    corrected = corrected_parts(experiment.config, experiment.aggregator, "up")
    return tuple(part for part in corrected if part in sent)


def _client_residuals(experiment: Experiment, like: Tensor) -> Tensor | None:
    if not experiment.config.compression.client_error_feedback:
        return None
    length = experiment.layout.length_of(client_residual_parts(experiment))
    return torch.zeros(len(experiment.clients), length, dtype=like.dtype, device=like.device)


def check_fits(experiment: Experiment, checkpoint: Checkpoint) -> None:
    """Raise LorafairError on all ranks where a checkpoint's tensors are not those of this run's state."""
    needed = _at_start(experiment, torch.empty(experiment.layout.length, device="meta")).tensors()
    needed |= {f"{BASE}{path}": weight for path, weight in experiment.model.adapters.base_weights().items()}
    with same_error_on_all_ranks(experiment.fabric):
        origin = f"the checkpoint after round {checkpoint.completed_rounds} that this run continues from"
        check_tensors(checkpoint.tensors, needed, origin, experiment.config.accept)


def base_weights_in(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The frozen weights (O, I) by path that the federation has changed, in a checkpoint."""
    return {name.removeprefix(BASE): t for name, t in checkpoint.tensors.items() if name.startswith(BASE)}


def checkpoint_of(experiment: Experiment, state: ServerState) -> Checkpoint:
    """What `start_or_resume` needs to make this state again."""
    tensors = state.tensors()
    if state.folded:
        tensors |= {f"{BASE}{path}": weight for path, weight in experiment.model.adapters.base_weights().items()}
    return Checkpoint(
        completed_rounds=state.completed_rounds,
        tensors={name: tensor.cpu() for name, tensor in tensors.items()},
        identity=experiment.identity,
        totals=state.totals,
        client_seconds=state.client_seconds,
    )


def lora_ranks_of(experiment: Experiment, state: ServerState, clients: Sequence[int]) -> list[int]:
    """The LoRA ranks that these clients have now."""
    ranks = experiment.lora_ranks if state.lora_ranks is None else state.lora_ranks.tolist()
    return [ranks[client] for client in clients]


def initial_adapters(
    experiment: Experiment, state: ServerState, clients: tuple[int, ...], shard: AdapterLayout | None = None
) -> Tensor:
    """Packed adapters (C, P) these clients start the round from, or the layers of a shard of them."""
    layout, personal = experiment.layout, experiment.personal_parts
    if state.personal_adapters is not None:
        chosen = torch.tensor(clients).to(state.adapter.device, non_blocking=True)  # waits for nothing on a GPU
        rows = layout.replaced(state.adapter, personal, layout.select(state.personal_adapters[chosen], personal))
    elif shard is None:
        rows = state.adapter.expand(len(clients), -1)
    else:
        rows = take_columns(state.adapter, layout.columns_of(shard, PARTS)).expand(len(clients), -1)
    lora_ranks = lora_ranks_of(experiment, state, clients)
    whole = all(lora_rank == experiment.config.model.lora.rank for lora_rank in lora_ranks)
    if whole or experiment.aggregator.selects_directions:
        return rows
    return (shard or layout).truncated(rows, torch.tensor(lora_ranks).to(rows.device, non_blocking=True))

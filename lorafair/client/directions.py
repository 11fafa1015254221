"""Which of the R directions of every layer a client trains and sends: the first ones, or some drawn for the round."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafair.experiment import Experiment
from lorafair.seeding import seeded
from lorafair.server.state import ServerState, lora_ranks_of


def directions_of(experiment: Experiment, state: ServerState, client: int) -> Tensor:
    """Of this client in the round that comes next, (r,) rising; on the CPU."""
    [lora_rank] = lora_ranks_of(experiment, state, [client])
    rank, round_index = experiment.config.model.lora.rank, state.completed_rounds
    if not experiment.aggregator.selects_directions or lora_rank == rank:
        return torch.arange(lora_rank)
    generator = seeded(experiment.config.seed_of("client"), round_index, client, "directions")
    return torch.randperm(rank, generator=generator)[:lora_rank].sort().values

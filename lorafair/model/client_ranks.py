"""The LoRA rank of each client: one for all, given client by client, or drawn from levels."""

from __future__ import annotations

import torch

from lorafair.config.schema import Config
from lorafair.console import format_count
from lorafair.errors import ConfigError
from lorafair.seeding import seeded


def lora_ranks_of_clients(config: Config, clients: int) -> tuple[int, ...]:
    """The LoRA rank of each client: given one by one, or drawn from levels with the seed.

    Raises ConfigError if they do not fit the number of clients.
    """
    lora = config.model.lora
    if lora.client_ranks is None:
        return (lora.rank,) * clients
    if lora.client_rank_probabilities is None:
        check_client_ranks(config, clients)
        return lora.client_ranks
    probabilities = torch.tensor(lora.client_rank_probabilities, dtype=torch.float64)
    drawn = torch.multinomial(
        probabilities, clients, replacement=True, generator=seeded(config.seed_of("federation"), "ranks")
    )
    return tuple(lora.client_ranks[level] for level in drawn.tolist())


def check_client_ranks(config: Config, clients: int) -> None:
    """Raise ConfigError where the LoRA ranks are given client by client, and not for as many as there are."""
    lora = config.model.lora
    one_by_one = lora.client_ranks is not None and lora.client_rank_probabilities is None
    ranks = list(lora.client_ranks or ())
    if one_by_one and len(ranks) != clients:
        raise ConfigError(
            f"model.lora.rank={ranks} lists {format_count(len(ranks), 'rank')} for {format_count(clients, 'client')}; "
            "list one a client, give levels with their probabilities ({4: 0.5, 16: 0.5}), or one number for all"
        )

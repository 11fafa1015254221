"""σ of a run, whichever unit is protected: as it is given, or as the target ε needs it."""

from __future__ import annotations

from collections.abc import Sequence

from lorafair.aggregation.base import Aggregator
from lorafair.config.schema import ClientConfig, Config
from lorafair.privacy.client_level import client_noise_multiplier
from lorafair.privacy.examples import budget_of_examples
from lorafair.schedule import rounds_of_clients


def noise_multiplier_of(
    config: Config, aggregator: Aggregator, local: ClientConfig, sizes: Sequence[int]
) -> float | None:
    """σ for clients with so many images (N,) and all rounds; None without privacy. Raises ConfigError."""
    privacy, examples = config.privacy, budget_of_examples(config, local, sizes)
    if privacy.unit == "client":
        return client_noise_multiplier(config, len(sizes))
    if privacy.epsilon is None or examples is None:
        return privacy.noise_multiplier
    wanted = None if aggregator.pools_data else config.federation.clients_per_round
    taken = rounds_of_clients(config.seed_of("federation"), config.rounds, len(sizes), wanted)
    return examples.noise_multiplier(privacy.epsilon, taken)

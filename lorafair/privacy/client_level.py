"""Client-level privacy as the accountant sees it: one sampled Gaussian a round, whatever the round releases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lorafair.config.schema import Config
from lorafair.console import format_value
from lorafair.privacy.accounting import Releases, epsilon_of, noise_multiplier_for


def client_sampling(config: Config, clients: int) -> float:
    """q, the probability with which each of N clients takes part in a round."""
    return (config.federation.clients_per_round or clients) / clients


def client_noise_multiplier(config: Config, clients: int) -> float:
    """σ: the one that is given, or the smallest for the target ε after all rounds. Raises ConfigError."""
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    sampling = client_sampling(config, clients)
    return noise_multiplier_for(
        privacy.epsilon, privacy.delta, lambda sigma: [Releases(sigma, sampling, config.rounds)]
    )


def client_epsilon(config: Config, clients: int, noise_multiplier: float, rounds: int) -> float:
    """ε of every client after so many rounds at the δ of the configuration."""
    assert config.privacy.delta is not None
    releases = Releases(noise_multiplier, client_sampling(config, clients), rounds)
    return epsilon_of([releases], config.privacy.delta)


def client_result(config: Config, clients: int, noise_multiplier: float) -> dict[str, Any]:
    """For result.json: the mechanism and the ε of every client after all rounds."""
    privacy = config.privacy
    return {
        "unit": privacy.unit,
        "clip_norm": privacy.clip_norm,
        "clip_quantile": privacy.clip_quantile,
        "noise_multiplier": noise_multiplier,
        "noise_source": privacy.noise_source,
        "sampling_probability": client_sampling(config, clients),
        "delta": privacy.delta,
        "epsilon": client_epsilon(config, clients, noise_multiplier, config.rounds),
    }


def client_lines(config: Config, clients: int, noise_multiplier: float, products_share: float) -> Iterator[str]:
    """What is said at the start."""
    privacy, epsilon = config.privacy, client_epsilon(config, clients, noise_multiplier, config.rounds)
    shown = "∞: there is no noise" if math.isinf(epsilon) else f"{epsilon:.3g}"
    moves = "" if privacy.clip_quantile is None else f" that follows quantile {privacy.clip_quantile:g}"
    yield (
        f"privacy: of clients, noise multiplier {noise_multiplier:.4g}, clip norm {format_value(privacy.clip_norm)}"
        f"{moves}, each client in a round with probability {client_sampling(config, clients):.4g}; after all rounds ε "
        f"is at most {shown} at δ = {format_value(privacy.delta)}"
    )
    if products_share:
        yield f"privacy: a second release a round for LoRA-FAIR, with {100 * products_share:.3g} % of the budget"
    if privacy.noise_source == "system":
        yield "privacy: noise and samples come from the operating system's generator; this run does not repeat"


def client_warnings(config: Config, clients: int) -> Iterator[str]:
    """What is probably not meant."""
    delta = config.privacy.delta
    if delta is not None and delta * clients >= 1:
        yield (
            f"privacy.delta={delta:g} is not below 1 / {clients:,}, the number of clients: releasing one of them as it "
            "is would be allowed; set a smaller one"
        )

"""What a run says about its privacy: before the first round, after each, and at its end.

Letters: N clients of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafair.config.schema import Config, PrivacyConfig
from lorafair.console import format_value
from lorafair.privacy.examples import ExampleBudget

_LISTED = 256  # different clients whose ε result.json has: each takes some hundredths of a second


def privacy_result(
    privacy: PrivacyConfig,
    noise_multiplier: float,
    budget: ExampleBudget,
    names: Sequence[str],
    rounds: Sequence[int],
) -> dict[str, Any]:
    """For result.json: the mechanism, the largest ε, and that of each client after so many rounds (N,)."""
    listed = budget.kinds(rounds) <= _LISTED
    epsilons = budget.epsilons(noise_multiplier, rounds) if listed else []
    return {
        "unit": privacy.unit,
        "clip_norm": privacy.clip_norm,
        "noise_multiplier": noise_multiplier,
        "noise_source": privacy.noise_source,
        "delta": privacy.delta,
        "epsilon": max(epsilons) if listed else budget.largest_epsilon(noise_multiplier, rounds),
        "clients": dict(zip(names, epsilons, strict=True)) if listed else {},
    }


def privacy_text(result: Mapping[str, Any]) -> str:
    """A line for the table, from what `privacy_result` gives."""
    epsilon = result["epsilon"]
    shown = "∞" if math.isinf(epsilon) else f"{epsilon:.3g}"
    others = [value for value in result.get("clients", {}).values() if math.isfinite(value)]
    least = f", from {min(others):.3g} on" if others and min(others) < 0.995 * epsilon else ""
    unit = {"example": "image of any client"}.get(result["unit"], result["unit"])
    follows = "the noise follows from the seed, so this is a simulation"
    seeded = f"; {follows}" if result["noise_source"] == "seeded" else "; this run does not repeat"
    return (
        f"privacy: ε = {shown} at δ = {format_value(result['delta'])} for each {unit}{least} (noise multiplier "
        f"{result['noise_multiplier']:.4g}, clip norm {format_value(result['clip_norm'])}{seeded})"
    )


@dataclass(frozen=True)
class Mechanism:
    """What is known of example-level privacy before the first round."""

    config: Config
    budget: ExampleBudget
    noise_multiplier: float
    numbers: int  # trained by a client in the first round

    def lines(self, rounds: Sequence[int]) -> Iterator[str]:
        """What is said at the start, where each client takes part in so many rounds (N,)."""
        privacy = self.config.privacy
        epsilon = self.budget.largest_epsilon(self.noise_multiplier, rounds)
        shown = "∞: there is no noise" if math.isinf(epsilon) else f"{epsilon:.3g}"
        yield (
            f"privacy: DP-SGD at the clients, noise multiplier {self.noise_multiplier:.4g}, clip norm "
            f"{format_value(privacy.clip_norm)}; after all rounds ε is at most {shown} at δ = "
            f"{format_value(privacy.delta)}"
        )
        if privacy.noise_source == "system":
            yield "privacy: noise and samples come from the operating system's generator; this run does not repeat"

    def warnings(self) -> Iterator[str]:
        """What is probably not meant."""
        privacy, local = self.config.privacy, self.budget.local
        assert privacy.delta is not None
        assert privacy.clip_norm is not None
        largest = max(self.budget.sizes)
        if privacy.delta * largest >= 1:
            yield (
                f"privacy.delta={privacy.delta:g} is not below 1 / {largest:,}, the images of a client: releasing one "
                "of them as it is would be allowed; set a smaller one"
            )
        images = min(local.batch_size, max(self.budget.sizes))
        loud = self.noise_multiplier * privacy.clip_norm * math.sqrt(self.numbers) / images
        if local.clip_norm is not None and loud > local.clip_norm:
            yield (
                f"the noise of a step alone has a norm of about {loud:.3g}, and client.clip_norm={local.clip_norm:g} "
                "shortens every step to that; for plain DP-SGD set client.clip_norm=null"
            )

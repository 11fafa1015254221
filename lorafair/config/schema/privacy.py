"""The options of differential privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.config.options import option, when, when_given

_PRIVATE = when("privacy.unit", "client", "example")


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy: what one unit can change is bounded and hidden by Gaussian noise (extra `privacy`)."""

    unit: Literal["none", "client", "example"] = option(
        "none",
        """What is protected (add-or-remove neighbours). client: everything a client has, by noise on the sum of the
        clients' updates. example: each training image, by DP-SGD at every client (arXiv 1607.00133).""",
    )
    clip_norm: float | None = option(
        None,
        """C, the largest Euclidean norm of what one unit contributes: of a client's update, or of an image's
        gradient.""",
        above=0,
        requires=_PRIVATE,
        conditional_default=1.0,
    )
    noise_multiplier: float | None = option(
        None,
        """σ: the noise on a sum has standard deviation σ·C for every number. 0: contributions are clipped without
        noise, and ε is infinite. Give either this or privacy.epsilon.""",
        at_least=0,
        requires=_PRIVATE,
    )
    epsilon: float | None = option(
        None,
        """Target: the smallest σ is used for which the ε of every unit is at most this after all `rounds`. Give either
        this or privacy.noise_multiplier.""",
        above=0,
        requires=_PRIVATE,
    )
    delta: float | None = option(
        None,
        "δ of (ε, δ); it should be far below 1 / the number of units that are protected.",
        above=0,
        below=1,
        requires=_PRIVATE,
        conditional_default=1e-5,
    )
    noise_source: Literal["seeded", "system"] | None = option(
        None,
        """Where noise and random samples come from. seeded: from the seed, so that a run repeats; who knows the seed
        can take the noise away, so this is for simulations. system: from the operating system's generator for
        cryptography; the run does not repeat.""",
        requires=_PRIVATE,
        conditional_default="seeded",
    )
    clip_parts: dict[str, float] = option(
        {},
        """Clip A, B, core and head separately, to bounds in this ratio whose root of the sum of squares is clip_norm,
        as in {A: 1, B: 1, head: 2}; all parts that the method's clients send. ({}: an update is clipped as one
        vector). For privacy.unit=client.""",
    )
    clip_quantile: float | None = option(
        None,
        """Move the clipping bound so that this fraction of updates is not clipped, from clip_norm on (arXiv
        1905.03871); each bound of clip_parts by itself. null: the bound stays.""",
        above=0,
        below=1,
        requires=when("privacy.unit", "client"),
    )
    clip_rate: float | None = option(
        None,
        "η: the bound is multiplied by exp(−η·(fraction − clip_quantile)) after each round.",
        above=0,
        requires=when_given("privacy.clip_quantile"),
        conditional_default=0.2,
    )
    clip_share: float | None = option(
        None,
        "The share of the budget 1/σ² that the count of updates within the bound takes, so that it has noise, too.",
        above=0,
        below=1,
        requires=when_given("privacy.clip_quantile"),
        conditional_default=0.02,
    )
    products_share: float | None = option(
        None,
        """For method.name=lora_fair: the share of the budget 1/σ² of its second release, the mean of the products b_k
        a_k in the rows of Ā (0.05). 0: no second release; the method is then FedIT.""",
        at_least=0,
        below=1,
        requires=when("privacy.unit", "client"),
    )
    products_clip: float | None = option(
        None,
        """For method.name=lora_fair: the bound of its second release, as a fraction of the largest norm that clipped
        updates can have there, C²/2 (0.3/√L for L layers).""",
        above=0,
        at_most=1,
        requires=when("privacy.unit", "client"),
    )

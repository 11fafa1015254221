"""LA-LoRA: the factors take turns from step to step of local training, and their gradients are smoothed.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.aggregation.smoothing import Smoothing
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors, Part

_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


@dataclass(frozen=True)
class LALoRA(Aggregator):
    """Clients train B in the first, third, ... step of a round and A in the others; FedIT's average (arXiv 2602.19926).

    Only one factor is noised in a step, so that no product of two noises arises in B·A. The gradient of the factor is
    filtered by (1 4 6 4 1)/16, after clipping and noise. The head is trained in every step and not filtered, as in the
    authors' code. They let B learn twice as fast: client.b_learning_rate_ratio=2. How they treat the ends of a row is
    not clear from the text ("symmetric padding"); here they are mirrored.
    """

    averages_factors: ClassVar[bool] = True

    filter: bool = option(
        True, "Smooth the gradients of A along the in_features and those of B along the out_features."
    )

    @property
    def smoothing(self) -> Smoothing | None:
        """The binomial filter of five weights."""
        return Smoothing(_BINOMIAL) if self.filter else None

    def trains_in_step(self, round_index: int, step: int) -> tuple[Part, ...]:
        """One factor and the head; B first, because A has no gradient while B is zero."""
        return ("B", "head") if step % 2 == 0 else ("A", "head")

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """(Ā, B̄), as FedIT."""
        return LayerUpdate(factors=mean_factors(clients, weights))

"""RoLoRA: train and average one factor a round, in turns, while all clients share the other.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.model.adapter import LoRAFactors, Part


@dataclass(frozen=True)
class RoLoRA(Aggregator):
    """B in the first, third, ... round, A in the others; averaging is then exact (arXiv 2409.02346)."""

    averages_factors: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ("average",)

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """One factor and the head; B first, because A has no gradient while B is zero."""
        return ("B", "head") if round_index % 2 == 0 else ("A", "head")

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """(Ā, B̄), of which the trained one is sent; clients go on with the other as they have it."""
        return LayerUpdate(factors=mean_factors(clients, weights))

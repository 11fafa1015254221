"""FedSA-LoRA: share what A learns, keep B and the head with the client.

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
class FedSALoRA(Aggregator):
    """A is averaged; every client has its own B and head and is evaluated with them (arXiv 2410.01463)."""

    averages_factors: ClassVar[bool] = True
    personal_parts: ClassVar[tuple[Part, ...]] = ("B", "head")
    initializations: ClassVar[tuple[str, ...]] = ("average",)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Ā and B̄, of which only Ā is sent."""
        return LayerUpdate(factors=mean_factors(clients, weights))

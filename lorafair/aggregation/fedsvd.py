"""FedSVD: train B only, like FFA-LoRA, but give all clients a new, orthonormal A every round.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import shared_a, truncated_svd, weighted_mean
from lorafair.model.adapter import LoRAFactors, Part


@dataclass(frozen=True)
class FedSVD(Aggregator):
    """B is averaged, then B̄A = UΣVᵀ is rewritten as B = UΣ, A = Vᵀ without loss (arXiv 2505.12805)."""

    averages_factors: ClassVar[bool] = True
    decomposes: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ("average",)

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """B and the head."""
        return ("B", "head")

    def receives(self, round_index: int) -> tuple[Part, ...]:
        """Both factors: the server rewrites A, too."""
        return ("A", "B", "head")

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The SVD of B̄A, of rank R; clients hold A, or its first rows where LoRA ranks differ."""
        product = LoRAFactors(A=shared_a(clients, weights), B=weighted_mean(clients.B, weights))
        return LayerUpdate(factors=truncated_svd(product, clients.rank))

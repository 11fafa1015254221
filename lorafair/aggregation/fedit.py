"""FedIT: average the two factors separately, as if B̄Ā were the average of the products.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FedIT(Aggregator):
    """FedAvg on the factors (arXiv 2305.05644)."""

    averages_factors: ClassVar[bool] = True

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Ā = Σ p_k A_k and B̄ = Σ p_k B_k, from A (K, R, I), B (K, O, R) and weights (K,)."""
        return LayerUpdate(factors=mean_factors(clients, weights))

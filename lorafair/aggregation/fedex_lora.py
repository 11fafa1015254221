"""FedEx-LoRA: average the factors and merge what averaging misses into the frozen weights.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import aggregation_bias, mean_factors, truncated_svd
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FedExLoRA(Aggregator):
    """(Ā, B̄), and ΔR = ΔW − B̄Ā folded as factors of rank (K − 1)·R, or Σ r_k − min r_k (arXiv 2410.09432)."""

    residual_rank: int | None = option(
        None, "Send only the best approximation of ΔR of this rank (all of it, which is exact).", at_least=1
    )

    @property
    def folds(self) -> bool:
        """Always."""
        return True

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The mean of the factors, and ΔR or its truncated SVD to merge."""
        mean = mean_factors(clients, weights)
        if len(clients.A) == 1:
            return LayerUpdate(factors=mean)
        missed = aggregation_bias(clients, weights)
        if self.residual_rank is not None and self.residual_rank < missed.rank:
            missed = truncated_svd(missed, self.residual_rank)
        return LayerUpdate(factors=mean, folded=missed)

"""FedEx-LoRA: average the factors and merge what averaging misses into the frozen weights.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.coded_fold import (
    Coding,
    coded,
    coding_of,
    fold_bits_option,
    fold_rank_option,
    left_over,
    start_of,
    start_precision_option,
)
from lorafair.aggregation.factor_algebra import aggregation_bias, mean_factors, truncated_svd
from lorafair.config.options import option
from lorafair.errors import ConfigError
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FedExLoRA(Aggregator):
    """(Ā, B̄), and ΔR = ΔW − B̄Ā folded as factors of rank (K − 1)·R, or Σ r_k − min r_k (arXiv 2410.09432)."""

    residual_rank: int | None = option(
        None, "Send only the best approximation of ΔR of this rank (all of ΔR, which is exact).", at_least=1
    )
    fold_bits: int | None = fold_bits_option()
    fold_rank: int | None = fold_rank_option()
    start_precision: Literal["float16", "float32"] | None = start_precision_option()

    def __post_init__(self) -> None:
        """fold_rank is what residual_rank is, for methods that fold."""
        super().__post_init__()
        if self.residual_rank is not None and self.fold_rank is not None:
            raise ConfigError(
                f"method.residual_rank={self.residual_rank} and method.fold_rank={self.fold_rank} mean the same; "
                "give one of them"
            )

    @property
    def folds(self) -> bool:
        """Always."""
        return True

    @property
    def coding(self) -> Coding | None:
        """With method.fold_bits."""
        return coding_of(self.fold_bits, self.start_precision)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The mean of the factors, and ΔR or its truncated SVD to merge."""
        mean, rank = mean_factors(clients, weights), self.fold_rank or self.residual_rank
        if self.coding is not None:
            start, is_new = start_of(mean, self.coding), self.coding.half_start
            left = left_over(start, clients, weights, new_a=is_new, new_b=is_new)
            return LayerUpdate(factors=start, folded=coded(left, rank, self.coding))
        if len(clients.A) == 1:
            return LayerUpdate(factors=mean)
        missed = aggregation_bias(clients, weights)
        if rank is not None and rank < missed.rank:
            missed = truncated_svd(missed, rank)
        return LayerUpdate(factors=mean, folded=missed)

"""FlexLoRA: average the products and send their best approximation of rank R.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import truncated_svd, weighted_sum
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FlexLoRA(Aggregator):
    """Truncated SVD of ΔW = UΣVᵀ: B = UΣ, A = Vᵀ (arXiv 2402.11505).

    With the singular values in B, a step of A moves the product differently from one of B: the effective learning rates
    are not those of plain averaging.
    """

    decomposes: ClassVar[bool] = True

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The first R singular triples of ΔW; a client of LoRA rank r uses the first r of them."""
        return LayerUpdate(factors=truncated_svd(weighted_sum(clients, weights), clients.rank))

"""HETLoRA: average factors of different ranks, padded with zeros, by how much each client's update weighs.

Letters: K clients, R rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.adapter import LoRAFactors
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors, squared_norm


@dataclass(frozen=True)
class HETLoRA(Aggregator):
    """Weights ∝ ‖B_k A_k‖ instead of data sizes (arXiv 2401.06432); without its pruning of ranks by the clients."""

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Σ w_k A_k and Σ w_k B_k with w_k = ‖B_k A_k‖ / Σ ‖B_j A_j‖; the given weights where all products are zero."""
        exact = clients.to(torch.float64)
        pairs = zip(exact.A, exact.B, strict=True)
        norms = torch.stack([squared_norm(LoRAFactors(A=A, B=B)) for A, B in pairs]).clamp(min=0).sqrt()
        total = norms.sum()
        shares = torch.where(total > 0, norms / total, weights.to(norms))
        return LayerUpdate(factors=mean_factors(clients, shares))

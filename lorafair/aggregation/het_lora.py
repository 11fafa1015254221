"""HETLoRA: average factors of different LoRA ranks, padded with zeros, by how much each client's update weighs.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import blocks_of, mean_factors
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class HETLoRA(Aggregator):
    """Weights ∝ ‖B_k A_k‖ instead of data sizes (arXiv 2401.06432); without pruning of LoRA ranks by the clients."""

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Σ w_k A_k and Σ w_k B_k with w_k = ‖B_k A_k‖ / Σ ‖B_j A_j‖; the given weights where all products are zero."""
        norms = torch.cat([_squared_norms(block.to(torch.float64)) for block, _ in blocks_of(clients, weights)]).sqrt()
        total = norms.sum()
        normalized = torch.where(total > 0, norms / total, weights.to(norms))
        return LayerUpdate(factors=mean_factors(clients, normalized))


def _squared_norms(clients: LoRAFactors) -> Tensor:
    """‖B_k A_k‖² of every client, (K,)."""
    return ((clients.B.mT @ clients.B) * (clients.A @ clients.A.mT)).sum((1, 2)).clamp(min=0)

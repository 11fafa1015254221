"""raFLoRA: with mixed LoRA ranks, average every range of them over the clients that have it.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import add, lora_ranks_of, truncated_svd, weighted_sum
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class RaFLoRA(Aggregator):
    """Directions are averaged over the clients that have them; zero padding would shrink them (arXiv 2602.13486)."""

    decomposes: ClassVar[bool] = True

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The truncated SVD of Σ over ranges (l, h] of Σ_{k: r_k ≥ h} p_k B_k[:, l:h] A_k[l:h] / Σ_{k: r_k ≥ h} p_k."""
        ranks, parts, low = lora_ranks_of(clients), [], 0
        for high in sorted({rank for rank in ranks.tolist() if rank > 0}):
            have = ranks >= high
            having = weights.to(have.device, torch.float64)[have]
            if not bool(having.sum() > 0):  # agnostic weights can be zero: nobody who counts has the rest
                break
            # A boolean index copies.
            some = clients if have.all() else LoRAFactors(A=clients.A[have], B=clients.B[have])
            part = LoRAFactors(A=some.A[:, low:high], B=some.B[:, :, low:high])
            parts.append(weighted_sum(part, having / having.sum()))
            low = high
        whole = add(*parts) if parts else weighted_sum(clients, weights)
        return LayerUpdate(factors=truncated_svd(whole, clients.rank))

"""RBLA: with mixed LoRA ranks, average every direction over the clients that have it.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import blocks_of, directions_of, total
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class RBLA(Aggregator):
    """FedIT whose means leave out the zero padding (arXiv 2408.08699); it equals FedIT if all LoRA ranks are equal."""

    averages_factors: ClassVar[bool] = True

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Row r of A and column r of B: Σ p_k · / Σ p_k over the clients k with LoRA rank > r; zero if none."""
        have = directions_of(clients)  # (K, R)
        normalized = have * weights.to(clients.A.device, torch.float64).unsqueeze(1)
        whole = normalized.sum(0)  # may be zero of clients that have the direction: agnostic weights can be
        normalized = normalized / torch.where(whole > 0, whole, 1.0)
        return LayerUpdate(
            factors=LoRAFactors(
                A=total(
                    torch.einsum("kr,kri->ri", s, b.A.to(torch.float64)) for b, s in blocks_of(clients, normalized)
                ),
                B=total(
                    torch.einsum("kr,kor->or", s, b.B.to(torch.float64)) for b, s in blocks_of(clients, normalized)
                ),
            )
        )

"""Fed-PLoRA: clients of smaller LoRA rank have the whole adapter, and train some of its directions.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import blocks_of, mean_factors, total
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FedPLoRA(Aggregator):
    """Select-N-fold: r_k random directions are trained, the others stay as sent and take part (arXiv 2602.16936).

    Every direction is averaged over the clients that have trained it. All R are sent down, r_k up. It equals FedIT if
    all LoRA ranks are equal. Dropout acts on the input of all directions, also of those that the paper folds into W0.
    """

    averages_factors: ClassVar[bool] = True
    selects_directions: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ("average",)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Row j of A and column j of B: Σ p_k · / Σ p_k over those whose direction j is not the one that was sent.

        As it was sent, where no client has trained it; the mean of all clients for calls without `start`.
        """
        if start is None:
            return LayerUpdate(factors=mean_factors(clients, weights))
        sent_a, sent_b = start.A.to(clients.A), start.B.to(clients.B)
        trained = (sent_a != clients.A).any(-1) | (sent_b != clients.B).any(-2)  # (K, R)
        used = trained * weights.to(clients.A.device, torch.float64).unsqueeze(1)
        whole = used.sum(0)
        used = used / torch.where(whole > 0, whole, 1.0)
        A = total(torch.einsum("kr,kri->ri", s, b.A.to(torch.float64)) for b, s in blocks_of(clients, used))
        B = total(torch.einsum("kr,kor->or", s, b.B.to(torch.float64)) for b, s in blocks_of(clients, used))
        A = torch.where(whole.unsqueeze(1) > 0, A, sent_a.to(A))
        return LayerUpdate(factors=LoRAFactors(A=A, B=torch.where(whole > 0, B, sent_b.to(B))))

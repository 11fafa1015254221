"""FedRot-LoRA: turn every client's factors towards the global ones before averaging.

(B_k Q)(QᵀA_k) is the same update for every orthogonal Q, but other factors to average.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.alignment import aligned
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import blocks_of, mean_factors, total
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FedRotLoRA(Aggregator):
    """FedIT on factors that each client has turned towards those it was sent (arXiv 2602.23638).

    The authors align A and B in turns, round by round; here one rotation aligns both.
    """

    mixed_lora_ranks: ClassVar[bool] = False

    strength: float = option(0.5, "How far to turn: 1 aligns, 0 is FedIT.", at_least=0, at_most=1)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Ā and B̄ of the turned factors; without `start` those of the factors as they are."""
        if start is None:
            return LayerUpdate(factors=mean_factors(clients, weights))
        means = [mean_factors(aligned(block, start, self.strength), own) for block, own in blocks_of(clients, weights)]
        return LayerUpdate(factors=LoRAFactors(A=total(mean.A for mean in means), B=total(mean.B for mean in means)))

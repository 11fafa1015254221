"""FRLoRA: fold what a round has changed into the frozen weights, and start every round from the same factors of W0.

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
class FRLoRA(Aggregator):
    """W0 += s·(B̄Ā − B0A0), where A0, B0 are the principal triples of W0, subtracted from it (ICLR 2025, algorithm 1).

    Every round starts from (A0, B0). Clients fold by themselves, from the (Ā, B̄) that they are sent and the (A0, B0)
    that they have, so the traffic equals FedIT's. model.lora.initialization selects other starts.
    """

    averages_factors: ClassVar[bool] = True
    mixed_lora_ranks: ClassVar[bool] = False
    resets: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ("average",)
    lora_initializations: ClassVar[tuple[str, ...]] = ("pissa", "olora", "kaiming")

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Ā = Σ p_k A_k and B̄ = Σ p_k B_k, to be folded by whoever receives them."""
        return LayerUpdate(factors=mean_factors(clients, weights))

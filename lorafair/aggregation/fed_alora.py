"""Fed-ALoRA: share what B learns, keep A and the head with the client.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.model.adapter import LoRAFactors, Part


@dataclass(frozen=True)
class FedALoRA(Aggregator):
    """B is averaged; every client has its own A and head and is evaluated with them (arXiv 2509.25414).

    All clients start from the same A. The paper has no head; here it stays with the client, as in FedSA-LoRA, which
    shares A.
    """

    averages_factors: ClassVar[bool] = True
    personal_parts: ClassVar[tuple[Part, ...]] = ("A", "head")
    initializations: ClassVar[tuple[str, ...]] = ("average",)
    mixed_lora_ranks: ClassVar[bool] = False

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Ā and B̄, of which only B̄ is sent."""
        return LayerUpdate(factors=mean_factors(clients, weights))

"""FFA-LoRA: train B only; all clients share one A, so that averaging B is averaging the products.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import shared_a, weighted_mean
from lorafair.model.adapter import LoRAFactors, Part


@dataclass(frozen=True)
class FFALoRA(Aggregator):
    """B is trained and averaged; A is drawn once and never changes (arXiv 2403.12313)."""

    averages_factors: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ("average",)

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """B and the head."""
        return ("B", "head")

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """(A0, B̄); clients hold A0, or its first rows where LoRA ranks differ.

        A0 is found from them for calls without `start`; with it, `aggregate` keeps the A that was sent.
        """
        return LayerUpdate(LoRAFactors(A=shared_a(clients, weights), B=weighted_mean(clients.B, weights)))

"""FLoRA: stack the clients' factors, merge the stack into the frozen weights, start every round afresh.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors, packed_sum
from lorafair.model.adapter import LoRAFactors, Part


@dataclass(frozen=True)
class FLoRA(Aggregator):
    """Stacking [p_1 A_1; p_2 A_2; ...] and [B_1, B_2, ...] is exact for any LoRA ranks (arXiv 2409.05976)."""

    restarts: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ("average",)

    @property
    def folds(self) -> bool:
        """Always."""
        return True

    def receives(self, round_index: int) -> tuple[Part, ...]:
        """The head; the stack comes as the folded part, and fresh factors follow from the seed."""
        return ("head",)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """ΔW to merge, as factors of rank Σ r_k with the weights in A only (as a matrix for many), and zero factors."""
        nothing = mean_factors(clients, weights * 0)
        return LayerUpdate(factors=nothing, folded=packed_sum(clients, weights))

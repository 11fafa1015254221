"""FedRot-LoRA: turn every client's factors towards the global ones before averaging.

(B_k Q)(QᵀA_k) is the same update for every orthogonal Q, but other factors to average.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorafair.aggregation.alignment import aligned
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import blocks_of, mean_factors, total
from lorafair.aggregation.fedit import FedIT
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FedRotLoRA(Aggregator):
    """FedIT on factors that each client has rotated towards those that it was sent (arXiv 2602.23638).

    One rotation aligns both factors; with `turns`, as in the authors' code, A in one round and B in the next.
    """

    mixed_lora_ranks: ClassVar[bool] = False

    strength: float = option(0.5, "Strength of the rotation: 1 aligns fully, 0 is FedIT.", at_least=0, at_most=1)
    turns: bool = option(False, "No alignment after the first round, then of A and of B in alternating rounds.")

    def in_round(self, round_index: int) -> Aggregator:
        """With `turns`, FedIT after the first round, before which no factors were sent; then A and B alternate."""
        if not self.turns:
            return self
        if round_index == 0:
            return FedIT()
        return _OneFactor(self.strength, by="A" if round_index % 2 else "B")

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Ā and B̄ of the turned factors; without `start` those of the factors as they are."""
        return _turned_mean(clients, weights, start, self.strength)


@dataclass(frozen=True)
class _OneFactor(Aggregator):
    """The same with a rotation that aligns one factor, and turns the other with it."""

    strength: float
    by: Literal["A", "B"]

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Ā and B̄ of the turned factors."""
        return _turned_mean(clients, weights, start, self.strength, self.by)


def _turned_mean(
    clients: LoRAFactors,
    weights: Tensor,
    start: LoRAFactors | None,
    strength: float,
    by: Literal["A", "B"] | None = None,
) -> LayerUpdate:
    if start is None:
        return LayerUpdate(factors=mean_factors(clients, weights))
    means = [mean_factors(aligned(block, start, strength, by), own) for block, own in blocks_of(clients, weights)]
    return LayerUpdate(factors=LoRAFactors(A=total(mean.A for mean in means), B=total(mean.B for mean in means)))

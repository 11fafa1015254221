"""HETLoRA: average factors of different LoRA ranks, padded with zeros, by how much each client's update weighs.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import blocks_of, mean_factors
from lorafair.aggregation.rank_pruning import RankPruning
from lorafair.config.options import option, when_given
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class HETLoRA(Aggregator):
    """Weights ∝ ‖B_k A_k‖ instead of data sizes; with `pruning` clients lower their LoRA ranks (arXiv 2401.06432)."""

    pruning: float | None = option(
        None,
        """γ: a client of LoRA rank r is pruned to rank γ·r, rounded down, if training has made the directions beyond it
        smaller (no pruning).""",
        above=0,
        below=1,
    )
    pruning_penalty: float | None = option(
        None,
        "λ, the weight of the norms of these directions in the clients' loss.",
        at_least=0,
        requires=when_given("method.pruning"),
        conditional_default=0.01,
    )
    smallest_rank: int | None = option(
        None,
        "Clients do not prune below this LoRA rank.",
        at_least=1,
        requires=when_given("method.pruning"),
        conditional_default=1,
    )

    @property
    def rank_pruning(self) -> RankPruning | None:
        """Where `pruning` is set."""
        if self.pruning is None:
            return None
        penalty = 0.01 if self.pruning_penalty is None else self.pruning_penalty
        return RankPruning(self.pruning, penalty, self.smallest_rank or 1)

    @property
    def needs_all_layers(self) -> bool:
        """A client gives up directions of all layers, or of none."""
        return self.pruning is not None

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Σ w_k A_k and Σ w_k B_k with w_k = ‖B_k A_k‖ / Σ ‖B_j A_j‖; the given weights where all products are zero."""
        norms = torch.cat([_squared_norms(block.to(torch.float64)) for block, _ in blocks_of(clients, weights)]).sqrt()
        total = norms.sum()
        normalized = torch.where(total > 0, norms / total, weights.to(norms))
        return LayerUpdate(factors=mean_factors(clients, normalized))


def _squared_norms(clients: LoRAFactors) -> Tensor:
    """‖B_k A_k‖² of every client, (K,)."""
    return ((clients.B.mT @ clients.B) * (clients.A @ clients.A.mT)).sum((1, 2)).clamp(min=0)

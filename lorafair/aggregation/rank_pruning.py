"""Clients that lower their LoRA rank by themselves, where they do not need the last directions.

Letters: C or K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class RankPruning:
    """A penalty on the last directions, from ⌊γ r_k⌋ on, and the rule by which a client drops them.

    HETLoRA (arXiv 2401.06432): λ·‖B_k[:, γr:r]‖·‖A_k[γr:r]‖ is added to the local objective, and the rank falls from
    r to γr if the product of these norms is smaller after training than before. Products are summed over the layers,
    because a client has one rank. Before the first round B is zero, so nothing can be smaller.

    Example:
        >>> lorafair.RankPruning(decay=0.5, penalty=0.01, smallest=2).kept(lora_rank=16)
        8
    """

    decay: float  # γ
    penalty: float  # λ
    smallest: int  # LoRA rank

    def kept(self, lora_rank: int) -> int:
        """The rank after pruning; the same where none is left to prune."""
        return min(lora_rank, max(self.smallest, int(self.decay * lora_rank)))

    def last_directions(self, lora_ranks: Sequence[int], rank: int) -> Tensor:
        """Which directions these clients may give up, (C, R)."""
        have = torch.tensor(list(lora_ranks)).unsqueeze(1)
        kept = torch.tensor([self.kept(lora_rank) for lora_rank in lora_ranks]).unsqueeze(1)
        positions = torch.arange(rank)
        return (positions >= kept) & (positions < have)

    def pruned(self, before: Tensor, after: Tensor, lora_ranks: Sequence[int]) -> list[int]:
        """The ranks of K clients, from the sums of products before and after training (K,)."""
        less = (after < before).tolist()
        return [self.kept(rank) if smaller else rank for rank, smaller in zip(lora_ranks, less, strict=True)]


def tail_products(layers: Iterable[LoRAFactors], last: Tensor) -> Tensor:
    """Σ over layers of ‖B[:, last]‖·‖A[last]‖, (K,) float64, of A (K, R, I) and B (K, O, R) or of common ones."""
    mask = last.to(torch.float64)
    total: Tensor | None = None
    for factors in layers:
        A, B = factors.A.to(torch.float64), factors.B.to(torch.float64)
        of_a = (A.square().sum(-1) * mask.to(A.device)).sum(-1)
        of_b = (B.square().sum(-2) * mask.to(B.device)).sum(-1)
        product = (of_a * of_b).sqrt()
        total = product if total is None else total + product
    assert total is not None
    return total


def add_penalty(
    gradients: Mapping[str, LoRAFactors], values: Mapping[str, LoRAFactors], last: Tensor, penalty: float
) -> None:
    """Add the gradient of λ·Σ ‖B[:, last]‖·‖A[last]‖ to that of C clients, in place; 0 where a norm is."""
    for path, factors in values.items():
        tail_a = torch.where(last.unsqueeze(2), factors.A, 0.0)
        tail_b = torch.where(last.unsqueeze(1), factors.B, 0.0)
        of_a, of_b = (tail.flatten(1).norm(dim=1).view(-1, 1, 1) for tail in (tail_a, tail_b))
        gradients[path].A.add_(tail_a * (of_b / torch.where(of_a > 0, of_a, 1.0)), alpha=penalty)
        gradients[path].B.add_(tail_b * (of_a / torch.where(of_b > 0, of_b, 1.0)), alpha=penalty)

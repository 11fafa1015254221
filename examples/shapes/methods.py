"""An aggregation method: the mean of each number of the factors without its extremes.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lorafair
from lorafair import LoRAFactors


@lorafair.register_method("trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean(lorafair.Aggregator):
    """FedIT without the `cut` smallest and largest values of every number (after arXiv 1803.01498)."""

    cut: int = lorafair.option(1, "Values left out at each end, of every number.", at_least=0)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> lorafair.LayerUpdate:
        """The trimmed means of A (K, R, I) and B (K, O, R); all clients count the same."""
        return lorafair.LayerUpdate(LoRAFactors(A=self._mean(clients.A), B=self._mean(clients.B)))

    def _mean(self, stack: Tensor) -> Tensor:
        cut = min(self.cut, (len(stack) - 1) // 2)
        ordered = stack.to(torch.float64).sort(dim=0).values
        return ordered[cut : len(stack) - cut].mean(0)

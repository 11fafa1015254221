"""Clients that smooth the gradients of their factors along the features, against the noise of differential privacy.

Letters: C clients, R LoRA rank, I in_features, O out_features, F features of a factor: I of A, O of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lorafair.model.adapter import LoRAFactors, Part


@dataclass(frozen=True)
class Smoothing:
    """A filter along the in_features of A and the out_features of B, each direction by itself.

    The features are mirrored at both ends, (x_2 x_1 | x_1 x_2 ...), so that a symmetric kernel of sum 1 keeps the sum
    of a direction. The filter does not look at the images: after the noise it costs no privacy.

    Example:
        >>> lorafair.Smoothing((0.25, 0.5, 0.25)).smoothed(torch.tensor([0.0, 0.0, 4.0, 0.0]), 0)
        tensor([0., 1., 2., 1.])
    """

    kernel: tuple[float, ...]  # an odd number of weights

    def smoothed(self, values: Tensor, dim: int) -> Tensor:
        """The values filtered along one dimension; element by element, so that clients do not mix."""
        size, reach = values.shape[dim], len(self.kernel) // 2
        mirrored = values.index_select(dim, _mirror(size, reach, values.device))
        result = torch.zeros_like(values)
        for offset, weight in enumerate(self.kernel):
            result.add_(mirrored.narrow(dim, offset, size), alpha=weight)
        return result

    def apply(self, gradients: Mapping[str, LoRAFactors], parts: Sequence[Part]) -> None:
        """Smooth the gradients A (C, R, I) and B (C, O, R) of every layer, those among `parts`, in place."""
        for gradient in gradients.values():
            if "A" in parts:
                gradient.A.copy_(self.smoothed(gradient.A, -1))
            if "B" in parts:
                gradient.B.copy_(self.smoothed(gradient.B, -2))


@lru_cache(maxsize=64)  # a model has few sizes
def _mirror(size: int, reach: int, device: torch.device) -> Tensor:
    """Where F + 2·reach features, mirrored at both ends as often as it takes, come from; not to be changed."""
    place = torch.arange(-reach, size + reach) % (2 * size)
    return torch.where(place < size, place, 2 * size - 1 - place).to(device, non_blocking=True)

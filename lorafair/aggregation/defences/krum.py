"""Krum and multi-Krum (Blanchard et al., NeurIPS 2017, arXiv 1703.02757, section 4), on products of factors.

The score of a client is the sum of the squared distances of its update to the K − f − 2 nearest ones.

Letters: K clients of the round, f of them that may lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.defences.base import Selection
from lorafair.aggregation.update_geometry import distances


@dataclass(frozen=True)
class Krum(Selection):
    """The update of the one client with the lowest score."""

    fewest: ClassVar[int] = 3

    def kept(self, clients: int) -> int:
        """How many clients are kept."""
        return 1

    def weights(self, products: Tensor, weights: Tensor) -> Tensor:
        """Those of the clients with the lowest scores; ties go to the client that comes first."""
        count = len(products)
        nearest = max(1, count - self.suspects(count) - 2)
        squares = distances(products).square()
        scores = squares.sort(dim=1).values[:, 1 : nearest + 1].sum(1)  # the first one is the client itself
        chosen = scores.sort(stable=True).indices[: self.kept(count)]
        result = torch.zeros_like(weights)
        result[chosen] = weights[chosen]
        return result / result.sum()


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The K − f clients with the lowest scores, with the weights that they have."""

    def kept(self, clients: int) -> int:
        """K − f."""
        return max(1, clients - self.suspects(clients))

"""Medians of updates as points: the geometric median, the median client, and the mean of those near the median.

Letters: K clients of the round, f of them that may lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.defences.base import Selection
from lorafair.aggregation.update_geometry import distances

_STEPS, _TOLERANCE = 200, 1e-10
_SMOOTHING = 1e-6  # of the distances, relative to their median: a client at the median has no infinite weight


def geometric_median(products: Tensor, weights: Tensor) -> Tensor:
    """Weights (K,) with which the mean of the updates is their geometric median, arg min_x Σ p_k ‖x − ΔP_k‖.

    Weiszfeld's iteration with smoothed distances, as in RFA (Pillutla et al., arXiv 1912.13445, algorithm 2), on the
    inner products (K, K) of the updates; float64.
    """
    shares = weights / weights.sum()
    apart = distances(products)
    floor = float(_SMOOTHING * apart[apart > 0].median()) if (apart > 0).any() else 1.0
    for _ in range(_STEPS):
        new = weights / _to_mean(products, shares).clamp_min(floor)
        new /= new.sum()
        moved = float((new - shares).abs().max())
        shares = new
        if moved < _TOLERANCE:
            break
    return shares


def _to_mean(products: Tensor, shares: Tensor) -> Tensor:
    """‖Σ_j w_j ΔP_j − ΔP_k‖ (K,)."""
    with_mean = products @ shares
    return (products.diagonal() - 2 * with_mean + shares @ with_mean).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class GeometricMedian(Selection):
    """The weights of the geometric median (RFA, arXiv 1912.13445)."""

    def weights(self, products: Tensor, weights: Tensor) -> Tensor:
        """All clients keep a weight; far ones a small one."""
        return geometric_median(products, weights)


@dataclass(frozen=True)
class MedianClient(Selection):
    """The update of the client whose distances to all others have the smallest sum (the medoid)."""

    def weights(self, products: Tensor, weights: Tensor) -> Tensor:
        """All of it for one client; ties go to the one that comes first."""
        sums = distances(products) @ (weights / weights.sum())
        return torch.zeros_like(weights).index_fill_(0, sums.argmin(), 1.0)


@dataclass(frozen=True)
class TrimmedMean(Selection):
    """The mean of the updates without the f that are farthest from the geometric median."""

    def weights(self, products: Tensor, weights: Tensor) -> Tensor:
        """Those of the clients that are left; ties are left out from the last one on."""
        far = _to_mean(products, geometric_median(products, weights))
        left = far.sort(stable=True).indices[: len(far) - self.suspects(len(far))]
        result = torch.zeros_like(weights)
        result[left] = weights[left]
        return result / result.sum()

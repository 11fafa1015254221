"""Norm bounding: no update is longer than a bound (Sun et al., arXiv 1911.07963, section 3.2).

Letters: K clients of the round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafair.aggregation.defences.base import Shortening


@dataclass(frozen=True)
class NormBounding(Shortening):
    """Clients move less of their way, until their change of weights is as long as the bound.

    The bound is defence.norm_bound, or the median of the round's norms.
    """

    def fractions(self, shapes: Tensor) -> Tensor:
        """The smallest t in (0, 1] with ‖t·X + t²·Y‖ equal to the bound; 1 for updates that are not longer."""
        squares = shapes[:, 0] + 2 * shapes[:, 1] + shapes[:, 2]
        norms = squares.clamp_min(0.0).sqrt()
        bound = self.options.norm_bound
        limit = float(norms.quantile(0.5)) if bound is None else bound
        found = [
            1.0 if norm <= limit else _fraction(linear, mixed, square, limit)
            for norm, (linear, mixed, square) in zip(norms.tolist(), shapes.tolist(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)


def _fraction(linear: float, mixed: float, square: float, limit: float) -> float:
    """The smallest root in (0, 1) of ‖t·X + t²·Y‖² = limit², from ‖X‖², ⟨X, Y⟩ and ‖Y‖²."""
    roots = np.roots([square, 2 * mixed, linear, 0.0, -(limit**2)])
    real = [float(root.real) for root in roots if abs(root.imag) < 1e-9 * max(1.0, abs(root)) and 0 < root.real < 1]
    return min(real, default=0.0)

"""What federated training is compared with: all images in one place, and every client on its own.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.model.adapter import PARTS, LoRAFactors, Part


@dataclass(frozen=True)
class Centralized(Aggregator):
    """One client trains on the images of all clients: an upper reference for federated training."""

    pools_data: ClassVar[bool] = True

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The only client's factors, A (1, R, I) and B (1, O, R), without the leading axis."""
        return LayerUpdate(factors=mean_factors(clients, weights))


@dataclass(frozen=True)
class LocalOnly(Aggregator):
    """Clients exchange nothing: a lower reference for federated training."""

    personal_parts: ClassVar[tuple[Part, ...]] = PARTS

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The mean; no client is sent it."""
        return LayerUpdate(factors=mean_factors(clients, weights))

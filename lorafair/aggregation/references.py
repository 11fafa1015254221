"""What federated training is compared with: all images in one place, and every client on its own.

Letters: K clients, R rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.adapter import LoRAFactors
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors


@dataclass(frozen=True)
class Centralized(Aggregator):
    """One client trains on the images of all: what federated training would like to reach."""

    pools_data: ClassVar[bool] = True

    def combine(self, clients: LoRAFactors, weights: Tensor) -> LayerUpdate:
        """The only client's factors, A (1, R, I) and B (1, O, R), without the leading axis."""
        return LayerUpdate(factors=mean_factors(clients, weights))


@dataclass(frozen=True)
class LocalOnly(Aggregator):
    """Clients never exchange anything: what taking part has to beat."""

    personal: ClassVar[bool] = True

    def combine(self, clients: LoRAFactors, weights: Tensor) -> LayerUpdate:
        """Every client's own factors, A (K, R, I) and B (K, O, R), unchanged."""
        return LayerUpdate(factors=clients)

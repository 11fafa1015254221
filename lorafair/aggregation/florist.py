"""FLoRIST: the SVD of the average of the products, with as many directions a layer as its energy asks for.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import first_triples, svd, weighted_sum
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FLoRIST(Aggregator):
    """The fewest singular triples of ΔW that hold a fraction of its squared norm, at most R (arXiv 2506.09199)."""

    decomposes: ClassVar[bool] = True
    sends_fewer_directions: ClassVar[bool] = True
    lora_initializations: ClassVar[tuple[str, ...]] = ("kaiming",)  # what is dropped would be a part of W0

    energy: float = option(0.95, "Fraction of ‖ΔW‖² to keep.", above=0, at_most=1)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """B = UΣ, A = Vᵀ of the kept triples.

        The other columns of B are zero, and the other rows of A those of `start`, which the clients have already: with
        zero rows these directions could never be trained again.
        """
        U, values, Vt = svd(weighted_sum(clients, weights))
        energies = values.square().cumsum(0)
        enough = int((energies < self.energy * energies[-1]).sum()) + 1
        kept = min(enough, clients.rank, len(values))
        factors = first_triples(U, values, Vt, kept, clients.rank, None if start is None else start.A)
        return LayerUpdate(factors=factors, sent_lora_rank=kept)

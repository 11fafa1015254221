"""RAVAN: several heads of fixed bases, of which clients train small matrices and scales.

Letters: K clients, R LoRA rank, I in_features, O out_features, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, InitialLayer, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.config.options import option
from lorafair.model.adapter import CoreShape, LoRAFactors, Part


@dataclass(frozen=True)
class Ravan(Aggregator):
    """W0 + s·Σ_i s_i B_i H_i A_i: clients train H_i and s_i, and Σ p_k s_ik H_ik is the next H_i (arXiv 2506.05568).

    A_i and B_i, of R/h directions each, never change; over all heads they are orthonormal (Gram-Schmidt). H starts at
    zero, and the scales at 1 in every round. The aggregation is exact. The paper's s is 1: model.lora.alpha = rank.
    """

    mixed_lora_ranks: ClassVar[bool] = False
    initializations: ClassVar[tuple[str, ...]] = ("average",)
    lora_initializations: ClassVar[tuple[str, ...]] = ("kaiming",)

    heads: int = option(
        4, "h, the number of heads that share the R directions; model.lora.rank must be a multiple.", at_least=1
    )

    @property
    def core(self) -> CoreShape:
        """H_i and s_i of every head."""
        return CoreShape(self.heads, scaled=True)

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """The matrices between A and B, and the head."""
        return ("core", "head")

    def initialize(self, layer: InitialLayer) -> LayerUpdate:
        """Orthonormal rows of A, and columns of B, drawn from the seed."""
        A, B = layer.drawn.A.to(torch.float64), layer.drawn.B
        columns = torch.randn(B.shape, dtype=torch.float64, generator=layer.generator).to(B.device)
        return LayerUpdate(LoRAFactors(A=torch.linalg.qr(A.mT)[0].mT, B=torch.linalg.qr(columns)[0]))

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The bases, which all clients share; `combine_core` averages what is trained."""
        return LayerUpdate(factors=mean_factors(clients, weights))

"""Fed-SB: clients train a square matrix between two fixed bases, which approximate the first step of full training.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, InitialLayer, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.aggregation.initialization import leading_triples
from lorafair.config.options import option
from lorafair.model.adapter import Core, CoreShape, LoRAFactors, Part

_NOTHING = 1e-6  # of the largest singular value: what is smaller is rounding, of squares


@dataclass(frozen=True)
class FedSB(Aggregator):
    """W0 + s·B H A: clients train only H (R, R), and Σ p_k H_k is the next H, which is exact (arXiv 2502.15436).

    As in LoRA-SB (arXiv 2411.19557): B = U, A = Vᵀ and H = Σ/s at the start, of the first R singular triples of
    −η·sign(∇L(W0)), the first step of full training. The gradient is that of training images drawn from all clients, as
    in the authors' code; a federation that must not pool them would have to average it. The traffic of sending A and B
    once is not counted.
    """

    averages_factors: ClassVar[bool] = True
    mixed_lora_ranks: ClassVar[bool] = False
    initializations: ClassVar[tuple[str, ...]] = ("average",)
    lora_initializations: ClassVar[tuple[str, ...]] = ("kaiming",)

    first_step: float = option(1e-4, "η, the size of the first step that is approximated, as for AdamW.", above=0)
    images: int = option(50, "Number of training images for the gradient (all, if there are fewer).", at_least=1)

    @property
    def core(self) -> CoreShape:
        """One matrix (R, R)."""
        return CoreShape()

    @property
    def images_at_start(self) -> int:
        """Those of the gradient."""
        return self.images

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """The matrix between A and B, and the head."""
        return ("core", "head")

    def initialize(self, layer: InitialLayer) -> LayerUpdate:
        """The first R singular triples of −η·sign(∇L(W0)), the singular values between the bases."""
        assert layer.gradient is not None
        step, rank = -self.first_step * layer.gradient.sign(), layer.drawn.rank
        U, values, Vt = leading_triples(step, rank)
        if bool(values[-1] <= _NOTHING * values[0]):  # of few images: bases of zeros could not be trained
            U, values, Vt = torch.linalg.svd(step.to(torch.float64), full_matrices=False)
            U, values, Vt = U[:, :rank], values[:rank], Vt[:rank]
        H = torch.diag(values / layer.scaling).unsqueeze(0)  # of one head
        return LayerUpdate(LoRAFactors(A=Vt, B=U), core=Core(H=H, scales=values.new_ones(0)))

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The bases, which all clients share; `combine_core` averages what is trained."""
        return LayerUpdate(factors=mean_factors(clients, weights))

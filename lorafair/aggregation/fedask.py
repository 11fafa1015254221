"""FedASK: the sum of the products through two sketches, decomposed and shared out to both factors.

Letters: K clients, R LoRA rank, I in_features, O out_features, S columns of a sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import blocks_of, total
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors, Part
from lorafair.seeding import seeded

_NOTHING = 1e-12  # of the largest singular value: what is smaller is rounding


@dataclass(frozen=True)
class FedASK(Aggregator):
    """B = QU√Σ, A = √ΣVᵀ of the randomised SVD of ΔW, which clients take part in (arXiv 2507.09990).

    1. Clients send B_k(A_k Ω) with a common Gaussian Ω (I, S); the server sums them and takes an orthonormal basis Q.
    2. Clients send A_kᵀ(B_kᵀQ); their sum is (QᵀΔW)ᵀ, whose SVD is UΣVᵀ transposed.

    It is exact where ΔW has at most S = R + p directions: always with frozen A; with both factors trained it may have
    K·R. Both sketches are functions of factors that DP-SGD has noised, so they cost no privacy. A is as small as √Σ, by
    which the next round's steps of B are scaled. Ω is the same in all rounds, as in the authors' code, and in all runs.
    The processes of a simulation exchange factors, from which the server computes the sums; the sketches are counted.
    """

    averages_factors: ClassVar[bool] = True  # with frozen A
    decomposes: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ("average",)

    freeze_a: bool = option(
        True, "Clients train B only, as the paper does under differential privacy; false: both factors, as without it."
    )
    oversampling: int = option(
        2,
        "p, columns of a sketch beyond the LoRA rank. With frozen A the paper proves from 2 on that nothing is lost.",
        at_least=0,
    )

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """B and the head, or both factors."""
        return ("B", "head") if self.freeze_a else ("A", "B", "head")

    def receives(self, round_index: int) -> tuple[Part, ...]:
        """Both factors: the server rewrites A, too."""
        return ("A", "B", "head")

    def sketch_numbers(self, outputs: int, inputs: int, rank: int) -> tuple[int, int]:
        """Up both sketches, S(O + I); down Q, S·O, beside the factors. Ω follows from a seed."""
        columns = self.columns_of_sketch(outputs, inputs, rank)
        return columns * (outputs + inputs), columns * outputs

    def columns_of_sketch(self, outputs: int, inputs: int, rank: int) -> int:
        """S = R + p, and no more than the layer has directions."""
        return min(rank + self.oversampling, outputs, inputs)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The first R triples. A direction without a singular value keeps the row of A that clients have, as it could
        not be trained from zeros."""
        outputs, inputs, rank = clients.B.shape[1], clients.A.shape[2], clients.rank
        omega = sketching_matrix(inputs, self.columns_of_sketch(outputs, inputs, rank))
        Q = torch.linalg.qr(_first_sketch(clients, weights, omega))[0]
        U, values, Vt = torch.linalg.svd(_second_sketch(clients, weights, Q).mT, full_matrices=False)
        U, values, Vt = Q @ U[:, :rank], values[:rank], Vt[:rank]
        roots = torch.where(values > _NOTHING * values[0], values, 0.0).sqrt()
        A = torch.zeros_like(Vt) if start is None else start.A.to(Vt)
        A = torch.where(roots.unsqueeze(1) > 0, roots.unsqueeze(1) * Vt, A)
        return LayerUpdate(factors=LoRAFactors(A=A, B=U * roots))


def sketching_matrix(inputs: int, columns: int) -> Tensor:
    """Ω (I, S), standard normal numbers that follow from its size."""
    return torch.randn(inputs, columns, dtype=torch.float64, generator=seeded(0, "sketch", inputs, columns))


def _first_sketch(clients: LoRAFactors, weights: Tensor, omega: Tensor) -> Tensor:
    """Σ p_k B_k(A_k Ω), (O, S)."""
    omega = omega.to(clients.A.device)
    blocks = ((block.to(torch.float64), own) for block, own in blocks_of(clients, weights))
    return total(torch.einsum("k,kor,krs->os", own, block.B, block.A @ omega) for block, own in blocks)


def _second_sketch(clients: LoRAFactors, weights: Tensor, Q: Tensor) -> Tensor:
    """Σ p_k A_kᵀ(B_kᵀQ), (I, S)."""
    blocks = ((block.to(torch.float64), own) for block, own in blocks_of(clients, weights))
    return total(torch.einsum("k,kri,krs->is", own, block.A, block.B.mT @ Q) for block, own in blocks)

"""FedRPCA: split the clients' updates into what they share and what is their own, and amplify the latter.

Letters: K clients, R LoRA rank, I in_features, O out_features, n numbers of a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class FedRPCA(Aggregator):
    """Robust PCA of the clients' changes of A, and of B: mean(low rank) + β·mean(sparse) (arXiv 2506.01194)."""

    mixed_lora_ranks: ClassVar[bool] = False

    amplification: float = option(2.0, "β, the weight of the sparse parts; 1 is FedIT.", at_least=0)
    iterations: int = option(200, "Maximum number of iterations of the robust PCA.", at_least=1)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """start + Σ p_k L_k + β Σ p_k S_k for each factor, where L + S are the changes since `start` (zero if None)."""

        def merged(stack: Tensor, origin: Tensor | None) -> Tensor:
            exact = stack.to(torch.float64)
            base = torch.zeros_like(exact[0]) if origin is None else origin.to(exact)
            changes = (exact - base).flatten(1).mT  # (n, K)
            common, own = robust_pca(changes, self.iterations)
            exact_weights = weights.to(exact)
            return base + ((common + self.amplification * own) @ exact_weights).view_as(base)

        return LayerUpdate(
            factors=LoRAFactors(
                A=merged(clients.A, None if start is None else start.A),
                B=merged(clients.B, None if start is None else start.B),
            )
        )


def robust_pca(matrix: Tensor, iterations: int, tolerance: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Low-rank L and sparse S with L + S = M (n, K): min ‖L‖_* + ‖S‖_1/√max(n, K) by the augmented Lagrangian.

    (Candès et al., arXiv 0912.3599, algorithm 1, with its μ = nK / (4‖M‖_1).) What is left when the steps end is
    counted as sparse, so that the parts add up to M.
    """
    size = matrix.abs().sum()
    if not bool(size > 0):
        return matrix, torch.zeros_like(matrix)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    threshold = 4 * size / matrix.numel()  # 1/μ, of the singular values
    entry = threshold / math.sqrt(len(tall))  # of the entries
    sparse, dual = torch.zeros_like(tall), torch.zeros_like(tall)  # the latter over μ
    common, goal = tall, tolerance * matrix.norm()
    for _ in range(iterations):
        shifted = tall - sparse + dual
        # Singular values far below the threshold are lost in the Gram matrix, and are set to zero anyway.
        squares, basis = torch.linalg.eigh(shifted.mT @ shifted)
        values = squares.clamp(min=0).sqrt()
        kept = torch.where(values > threshold, 1 - threshold / values, 0.0)
        common = shifted @ ((basis * kept) @ basis.mT)
        rest = tall - common + dual
        step = rest.clamp(-entry, entry)
        sparse = rest - step
        gap = step - dual  # M − L − S
        dual = step  # for dual + gap
        if bool(gap.norm() <= goal):
            break
    common = common if tall is matrix else common.mT
    return common, matrix - common

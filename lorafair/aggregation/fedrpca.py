"""FedRPCA: split the clients' updates into what they share and what is their own, and amplify the latter.

Letters: K clients, R rank, I in_features, O out_features, n numbers of a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.adapter import LoRAFactors
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.config import ConfigError


@dataclass(frozen=True)
class FedRPCA(Aggregator):
    """Robust PCA of the clients' changes of A, and of B: mean(low rank) + β·mean(sparse) (arXiv 2506.01194)."""

    mixed_ranks: ClassVar[bool] = False

    amplification: float = 2.0
    """β, the weight of the sparse parts; 1 is FedIT."""
    iterations: int = 200
    """At most so many steps of the robust PCA."""

    def __post_init__(self) -> None:
        if not (self.amplification >= 0 and math.isfinite(self.amplification)):
            raise ConfigError(f"method.amplification={self.amplification} is out of range: it must be 0 or more")
        if self.iterations < 1:
            raise ConfigError(f"method.iterations={self.iterations} is out of range: it must be at least 1")

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """start + Σ p_k L_k + β Σ p_k S_k for each factor, where L + S are the changes since `start` (zero if None)."""

        def merged(stack: Tensor, origin: Tensor | None) -> Tensor:
            exact = stack.to(torch.float64)
            base = torch.zeros_like(exact[0]) if origin is None else origin.to(exact)
            changes = (exact - base).flatten(1).mT  # (n, K)
            common, own = robust_pca(changes, self.iterations)
            shares = weights.to(exact)
            return base + ((common + self.amplification * own) @ shares).view_as(base)

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
    sparsity, mu = 1 / math.sqrt(max(matrix.shape)), matrix.numel() / (4 * size)
    sparse, dual = torch.zeros_like(matrix), torch.zeros_like(matrix)
    common, goal = matrix, tolerance * matrix.norm()
    for _ in range(iterations):
        U, values, Vt = torch.linalg.svd(matrix - sparse + dual / mu, full_matrices=False)
        common = (U * (values - 1 / mu).clamp(min=0)) @ Vt
        rest = matrix - common + dual / mu
        sparse = rest.sign() * (rest.abs() - sparsity / mu).clamp(min=0)
        gap = matrix - common - sparse
        if bool(gap.norm() <= goal):
            break
        dual = dual + mu * gap
    return common, matrix - common

"""FLoRA-NA: average each factor with weights of its own, chosen so that the product of the means fits the update.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import transpose, weighted_mean
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors

_SETTLED = 1e-12  # relative gain below which P and Q stay
_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue of the normal equations: directions below it are left alone


@dataclass(frozen=True)
class FLoRANA(Aggregator):
    """Σ Q_k B_k and Σ P_k A_k with the P, Q of the least error to ΔW (arXiv 2509.26399, equation 6).

    P and Q are a layer's own and never sent. The paper does not say how it minimises: here by least squares for Q and
    for P in turns, from the aggregation weights on, so that the error is never above FedIT's.
    """

    iterations: int = option(100, "At most so many turns of least squares; 0 is FedIT.", at_least=0)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Σ P_k A_k and Σ Q_k B_k, from min ‖Σ p_k B_k A_k − (Σ Q_k B_k)(Σ P_k A_k)‖ over P and Q."""
        P, Q = fitted_weights(clients.to(torch.float64), weights, self.iterations)
        return LayerUpdate(factors=LoRAFactors(A=weighted_mean(clients.A, P), B=weighted_mean(clients.B, Q)))


def fitted_weights(clients: LoRAFactors, weights: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """P and Q (K,), of A and of B. Waits for a GPU once a turn."""
    exact = weights.to(clients.A)
    P, Q, before = exact, exact, 0.0
    mirrored = transpose(clients)  # of the transposed update, in which A and B have changed places
    for _ in range(iterations):
        Q, _ = _fitted(clients, exact, weighted_mean(clients.A, P), Q)
        P, fit = _fitted(mirrored, exact, weighted_mean(mirrored.A, Q), P)
        if fit <= before * (1 + _SETTLED):
            break
        before = fit
    return P, Q


def _fitted(clients: LoRAFactors, weights: Tensor, A: Tensor, Q: Tensor) -> tuple[Tensor, float]:
    """The least-squares weights of B for a given A (R, I), next to Q (K,), and by how much they lower ‖ΔW − BA‖².

    Of the normal equations in ⟨B_j A, B_k A⟩ and ⟨ΔW, B_k A⟩, both by way of R x R matrices.
    """
    target = torch.einsum("kor,krs->os", clients.B, weights.view(-1, 1, 1) * (clients.A @ A.mT))  # (O, R) ΔW·Aᵀ
    right = (clients.B * target).sum((1, 2))  # (K,)
    matrix = clients.B.flatten(1) @ (clients.B @ (A @ A.mT)).flatten(1).mT  # (K, K)
    values, basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
    missing = basis.mT @ (right - matrix @ Q)
    used = values > _RANK_TOLERANCE * values[-1].clamp_min(0)
    moved = Q + basis @ torch.where(used, missing / torch.where(used, values, 1.0), 0.0)
    return moved, float(2 * moved @ right - moved @ (matrix @ moved))

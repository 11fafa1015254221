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

_SETTLED = 1e-11  # relative change of P in a turn below which they stay
_ROUNDING = 1e-26  # of the squared right-hand side: a residual below it is noise
_MOST_STEPS = 50  # of conjugate gradients; each lowers the error


@dataclass(frozen=True)
class FLoRANA(Aggregator):
    """Σ Q_k B_k and Σ P_k A_k with the P and Q that minimise the error to ΔW (arXiv 2509.26399, equation 6).

    Each layer has its own P and Q; they are never sent. The paper does not give an algorithm. Here least squares is
    solved for Q and P in turns, starting from the aggregation weights, so that the error is never above FedIT's.
    """

    iterations: int = option(100, "Maximum number of least-squares iterations; 0 is FedIT.", at_least=0)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """Σ P_k A_k and Σ Q_k B_k, from min ‖Σ p_k B_k A_k − (Σ Q_k B_k)(Σ P_k A_k)‖ over P and Q."""
        P, Q = fitted_weights(clients.to(torch.float64), weights, self.iterations)
        return LayerUpdate(factors=LoRAFactors(A=weighted_mean(clients.A, P), B=weighted_mean(clients.B, Q)))


def fitted_weights(clients: LoRAFactors, weights: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """P and Q (K,), of A and of B. Waits for a GPU once a turn."""
    P = Q = weights.to(clients.A)
    exact, mirrored = P, transpose(clients)  # of the transposed update, in which A and B have changed places
    for _ in range(iterations):
        before = P
        Q = _fitted(clients, exact, weighted_mean(clients.A, P), Q)
        P = _fitted(mirrored, exact, weighted_mean(mirrored.A, Q), P)
        if bool((P - before).norm() <= _SETTLED * P.norm()):
            break
    return P, Q


def _fitted(clients: LoRAFactors, weights: Tensor, A: Tensor, Q: Tensor) -> Tensor:
    """The weights of B that minimise ‖ΔW − BA‖ for a given A (R, I), from Q (K,) on.

    By conjugate gradients on the normal equations in ⟨B_j A, B_k A⟩ and ⟨ΔW, B_k A⟩: clients that are alike leave these
    singular. Their (K, K) matrix is made where that costs less than the steps without it.
    """
    flat, gram = clients.B.flatten(1), A @ A.mT  # (K, O·R), (R, R)
    target = torch.einsum("kor,krs->os", clients.B, weights.view(-1, 1, 1) * (clients.A @ A.mT))  # (O, R) ΔW·Aᵀ
    right = flat @ target.flatten()  # (K,)
    matrix = flat @ (clients.B @ gram).flatten(1).mT if len(Q) <= 2 * _MOST_STEPS else None

    def normal(vector: Tensor) -> Tensor:
        if matrix is not None:
            return matrix @ vector
        return flat @ ((vector @ flat).view_as(target) @ gram).flatten()

    solution, residual = Q, right - normal(Q)
    direction, square = residual, residual @ residual
    enough = _ROUNDING * (right @ right)
    for _ in range(min(4 * len(Q), _MOST_STEPS)):
        along = normal(direction)
        curvature = direction @ along
        step = torch.where((square > enough) & (curvature > 0), square / curvature, 0.0)
        solution, residual = solution + step * direction, residual - step * along
        before, square = square, residual @ residual
        direction = residual + torch.where(before > 0, square / before, 0.0) * direction
    return solution

"""Choosing, among the factors of the same update, those next to given ones.

(B_k Q)(QᵀA_k) is the same product for every orthogonal Q, but what averaging makes of such factors depends on Q.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lorafair.aggregation.factor_algebra import directions_of
from lorafair.model.adapter import LoRAFactors


def aligned(
    clients: LoRAFactors, start: LoRAFactors, strength: float = 1.0, by: Literal["A", "B"] | None = None
) -> LoRAFactors:
    """Clients' factors (B_k Q_k, Q_kᵀA_k) in float64, turned towards `start` (R, I), (O, R).

    Q_k is the rotation that minimises ‖Q_kᵀA_k − A‖² + c‖B_k Q_k − B‖² (orthogonal Procrustes), where c makes the two
    factors of `start` count the same; B counts nothing while it is zero. Below `strength` 1 the rotation is the one
    next to (1 − strength)·I + strength·Q_k. With `by`, the distance of that factor alone counts. A client of smaller
    LoRA rank is turned within its own directions: what went into others could be lost on the way down.
    """
    A, B, target = clients.A.to(torch.float64), clients.B.to(torch.float64), start.to(torch.float64)
    target_a, target_b = target.A.to(A.device), target.B.to(A.device)
    square_b = target_b.square().sum()
    balance = torch.where(square_b > 0, target_a.square().sum() / square_b, 0.0)
    near_a, near_b = A @ target_a.mT, B.mT @ target_b  # (K, R, R)
    closeness = {None: near_a + balance * near_b, "A": near_a, "B": near_b}[by]
    turn = nearest_rotation(_within(closeness, directions_of(clients)))
    if strength < 1:
        identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        turn = nearest_rotation((1 - strength) * identity + strength * turn)
    return LoRAFactors(A=turn.mT @ A, B=B @ turn)


def _within(matrices: Tensor, have: Tensor) -> Tensor:
    """M (K, R, R) for which the nearest rotation leaves the directions alone that a client does not have, (K, R).

    There M is diagonal, with values above all singular values of the rest: that one then has the last singular value,
    whose sign may be turned.
    """
    diagonal = 2 * matrices.flatten(1).norm(dim=1) + 1  # (K,)
    alone = torch.diag_embed(diagonal.unsqueeze(1).expand_as(matrices[..., 0]))
    inside = have.unsqueeze(2) & have.unsqueeze(1)
    outside = ~have.unsqueeze(2) & ~have.unsqueeze(1)
    return torch.where(inside, matrices, torch.where(outside, alone, 0.0))


def nearest_rotation(matrices: Tensor) -> Tensor:
    """The rotation Q (determinant 1) of the largest tr(QᵀM) for each M (..., R, R)."""
    U, _, Vt = torch.linalg.svd(matrices)
    signs: Tensor = torch.ones_like(matrices[..., 0])
    signs[..., -1] = torch.linalg.det(U @ Vt).sign()
    turn: Tensor = (U * signs.unsqueeze(-2)) @ Vt
    return turn

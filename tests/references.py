"""Slow, dense, float64 versions of what the package computes in factor space, written from the formulas alone.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lorafair.model.adapter import LoRAFactors
from lorafair.seeding import seeded
from tests.torch_private import TorchDispatchMode


def random_clients(
    out_features: int = 7,
    in_features: int = 6,
    rank: int = 3,
    clients: int = 4,
    *,
    scale_b: float = 1.0,
    spread: float = 0.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[LoRAFactors, Tensor]:
    """Clients scattered by `spread` around common factors, and unequal weights."""
    generator = seeded(seed, "clients", out_features, in_features, rank, clients)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = normal(rank, in_features) + spread * normal(clients, rank, in_features)
    B = normal(out_features, rank) + spread * normal(clients, out_features, rank)
    weights = torch.rand(clients, generator=generator, dtype=torch.float64) + 0.2
    return LoRAFactors(A=A, B=scale_b * B).to(dtype), weights / weights.sum()


def ideal_update(clients: LoRAFactors, weights: Tensor) -> Tensor:
    """ΔW = Σ p_k B_k A_k, (O, I)."""
    products = [p * B @ A for p, A, B in zip(weights, clients.A.double(), clients.B.double(), strict=True)]
    return torch.stack(products).sum(0)


def mean(clients: LoRAFactors, weights: Tensor) -> LoRAFactors:
    """Ā and B̄."""
    A = sum(p * A for p, A in zip(weights, clients.A.double(), strict=True))
    B = sum(p * B for p, B in zip(weights, clients.B.double(), strict=True))
    return LoRAFactors(A=A, B=B)  # type: ignore[arg-type]


def objective(
    A: Tensor, B: Tensor, clients: LoRAFactors, weights: Tensor, *, similarity: str, regularization: float
) -> Tensor:
    """S(ΔW, BA) + λ(‖A − Ā‖² + ‖B − B̄‖²), on (O, I) matrices."""
    target, product, start = ideal_update(clients, weights), B @ A, mean(clients, weights)
    penalty_a = penalty_b = regularization
    if similarity == "frobenius":
        distance = (target - product).square().sum()
        penalty_b = regularization * torch.trace(start.A @ start.A.T).item() / start.rank
        penalty_a = regularization * torch.trace(start.B.T @ start.B).item() / start.rank
    elif similarity == "cosine":
        distance = 1 - cosine(target.flatten(), product.flatten())
    else:
        distance = 1 - cosine(target, product).mean()
    return distance + penalty_a * (A - start.A).square().sum() + penalty_b * (B - start.B).square().sum()


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """The cosine of two vectors, or of the columns of two matrices; 0 where one is zero."""
    lengths = (left.square().sum(0) * right.square().sum(0)).sqrt()
    return (left * right).sum(0) / torch.where(lengths > 0, lengths, 1.0)


def descend(
    clients: LoRAFactors,
    weights: Tensor,
    *,
    similarity: str,
    residual: str,
    regularization: float,
    steps: int,
    learning_rate: float,
) -> LoRAFactors:
    """The paper's procedure, literally: autograd on the dense objective and torch.optim.SGD from ΔA = ΔB = 0."""
    start = mean(clients, weights)
    A = start.A.clone().requires_grad_(residual != "B")
    B = start.B.clone().requires_grad_(residual != "A")
    optimizer = torch.optim.SGD([t for t in (A, B) if t.requires_grad], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(A, B, clients, weights, similarity=similarity, regularization=regularization).backward()
        optimizer.step()
    return LoRAFactors(A=A.detach(), B=B.detach())


def minimum(
    clients: LoRAFactors,
    weights: Tensor,
    *,
    similarity: str,
    residual: str,
    regularization: float,
    starts: int = 1,
) -> tuple[float, LoRAFactors]:
    """The lowest value and its factors that L-BFGS finds on the dense objective, from ΔA = ΔB = 0 and random starts.

    The unknowns are in units of the mean factors' entries, or L-BFGS would stop early where B is small.
    """
    start = mean(clients, weights)
    unit_a, unit_b = start.A.square().mean().sqrt(), start.B.square().mean().sqrt()
    count_a = start.A.numel() if residual != "B" else 0
    count_b = start.B.numel() if residual != "A" else 0

    def factors(z: Tensor) -> tuple[Tensor, Tensor]:
        A = start.A + unit_a * z[:count_a].view_as(start.A) if count_a else start.A
        B = start.B + unit_b * z[count_a:].view_as(start.B) if count_b else start.B
        return A, B

    def value_and_gradient(z: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(z).requires_grad_()
        value = objective(*factors(point), clients, weights, similarity=similarity, regularization=regularization)
        value.backward()
        return value.item(), point.grad.numpy()  # type: ignore[union-attr]

    def value(z: Tensor) -> Tensor:
        return objective(*factors(z), clients, weights, similarity=similarity, regularization=regularization)

    lowest, z = _polished(value, torch.from_numpy(_best(value_and_gradient, count_a + count_b, starts).x))
    A, B = factors(z)
    return lowest, LoRAFactors(A=A, B=B)


def _best(function: Callable[[np.ndarray], tuple[float, np.ndarray]], size: int, starts: int) -> Any:
    options = {"maxiter": 1500, "maxfun": 2000, "ftol": 0.0, "gtol": 1e-13, "maxcor": 50}
    draws = np.random.default_rng(0).standard_normal((starts, size))
    draws[0] = 0
    found = [minimize(function, z, jac=True, method="L-BFGS-B", options=options) for z in draws]
    return min(found, key=lambda result: result.fun)


def _polished(function: Callable[[Tensor], Tensor], z: Tensor, steps: int = 5) -> tuple[float, Tensor]:
    """The minimum next to z by Newton's method: in a flat valley L-BFGS stops where values differ by rounding only."""

    def slope(point: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(function, point)  # type: ignore[no-untyped-call, no-any-return]

    for _ in range(steps):
        curvature = torch.autograd.functional.hessian(function, z)  # type: ignore[no-untyped-call]
        moved = z - torch.linalg.lstsq(curvature, slope(z), driver="gelsd").solution
        if not (slope(moved).norm() < slope(z).norm() and function(moved) <= function(z) + 1e-12):
            break
        z = moved
    return float(function(z)), z


class OperationLog(TorchDispatchMode):
    """What tensor operations ran inside: their names, the devices of their results and the largest result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.devices: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.devices.add(tensor.device.type)
                self.largest = max(self.largest, tensor.numel())
        return result

"""Correct A and B together, or B under a similarity for which a fixed A is no help: descent in the factors.

Letters: K clients, R LoRA rank, I in_features, O out_features, N = K·R.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.factor_algebra import add
from lorafair.aggregation.solvers.layer_objective import LayerObjective, Residual
from lorafair.aggregation.solvers.trust_region import minimize
from lorafair.model.adapter import LoRAFactors
from lorafair.seeding import seeded

_STILL = 1e-6  # a change of the loss below it counts as none


def minimize_from(objective: LayerObjective, start: LoRAFactors, residual: Residual) -> LoRAFactors:
    """A local minimiser in the factors that `residual` names, reached from `start` without going up."""
    span = _Span.of(objective)
    small, origin = span.reduced(objective), span.coordinates(start)
    scaling = _Scaling.of(small, origin, residual)

    def point(z: Tensor) -> LoRAFactors:
        return _moved(origin, scaling.change(z))

    def hessian(z: Tensor) -> Callable[[Tensor], Tensor]:
        along = small.hessian(point(z))
        return lambda direction: scaling.pull_back(along(scaling.change(direction))) / scaling.unit

    found = minimize(
        lambda z: small(point(z)) / scaling.unit,
        lambda z: scaling.pull_back(small.gradient(point(z))) / scaling.unit,
        hessian,
        torch.zeros_like(scaling.pull_back(origin)),
    )
    return _moved(start, span.expand(scaling.change(found)))


def descend_from_mean(
    objective: LayerObjective, residual: Residual, *, steps: int, learning_rate: float
) -> LoRAFactors:
    """The iterate after `steps` of plain gradient descent from (Ā, B̄)."""
    span = _Span.of(objective)
    small = span.reduced(objective)
    A, B = small.mean.A, small.mean.B
    for _ in range(steps):
        slope = small.gradient(LoRAFactors(A=A, B=B))
        A = A if residual == "B" else A - learning_rate * slope.A
        B = B if residual == "A" else B - learning_rate * slope.B
    return _moved(objective.mean, span.expand(LoRAFactors(A=A - small.mean.A, B=B - small.mean.B)))


def descend_jointly(
    objectives: Sequence[LayerObjective],
    starts: Sequence[LoRAFactors],
    residual: Residual,
    *,
    steps: int,
    learning_rate: float,
    patience: int | None,
) -> list[LoRAFactors]:
    """The iterates of gradient descent on all layers at once, from `starts`.

    It ends early where the sum of the objectives was `patience` times in a row within 1e-6 of the last one that was
    not; the step of the last look is taken.
    """
    found, last, still = list(starts), math.inf, 0
    for _ in range(steps):
        seen = [f.value_and_gradient(at) for f, at in zip(objectives, found, strict=True)]
        slopes = [slope for _, slope in seen]
        found = [_step(at, slope, residual, learning_rate) for at, slope in zip(found, slopes, strict=True)]
        if patience is None:
            continue
        loss = sum(float(value) for value, _ in seen)
        if abs(last - loss) >= _STILL:
            last, still = loss, 0
            continue
        still += 1
        if still == patience:
            break
    return found


def _step(at: LoRAFactors, slope: LoRAFactors, residual: Residual, learning_rate: float) -> LoRAFactors:
    return LoRAFactors(
        A=at.A if residual == "B" else at.A - learning_rate * slope.A,
        B=at.B if residual == "A" else at.B - learning_rate * slope.B,
    )


def with_noise(mean: LoRAFactors, residual: Residual) -> LoRAFactors:
    """Mean factors plus a correction that is Xavier-uniform: ±√(6/(rows + columns)) (Glorot and Bengio 2010).

    Drawn on the CPU from the bytes of the mean, so anew for every layer and round and alike on all processes.
    """
    digest = hashlib.sha256(mean.A.cpu().numpy().tobytes() + mean.B.cpu().numpy().tobytes()).hexdigest()

    def drawn(factor: Tensor, name: str) -> Tensor:
        noise = torch.empty(factor.shape, dtype=factor.dtype)
        torch.nn.init.xavier_uniform_(noise, generator=seeded(0, "correction", name, digest))
        return factor + noise.to(factor.device)

    return LoRAFactors(
        A=mean.A if residual == "B" else drawn(mean.A, "A"), B=mean.B if residual == "A" else drawn(mean.B, "B")
    )


def _moved(factors: LoRAFactors, change: LoRAFactors) -> LoRAFactors:
    return LoRAFactors(A=factors.A + change.A, B=factors.B + change.B)


@dataclass(frozen=True)
class _Span:
    """Orthonormal bases of what the clients' B and A span, where that is less than everything.

    Neither a solution nor a gradient step leaves the span, and the rotation changes no inner product.
    """

    columns: Tensor | None  # (O, N)
    rows: Tensor | None  # (I, N)

    @classmethod
    def of(cls, objective: LayerObjective) -> _Span:
        ideal = objective.ideal
        if ideal.rank >= min(ideal.B.shape[0], ideal.A.shape[1]):
            ideal = add(ideal, objective.mean)  # the mean is in the span of the clients, but not always in that of ΔW
        tall, wide = ideal.rank < ideal.B.shape[0], ideal.rank < ideal.A.shape[1]
        # Column by column, the columns of (O, I) have to stay what they are.
        wide = wide and objective.similarity != "cosine_columns"
        return cls(
            columns=torch.linalg.qr(ideal.B).Q if tall else None,
            rows=torch.linalg.qr(ideal.A.mT).Q if wide else None,
        )

    def coordinates(self, factors: LoRAFactors) -> LoRAFactors:
        return LoRAFactors(
            A=factors.A if self.rows is None else factors.A @ self.rows,
            B=factors.B if self.columns is None else self.columns.mT @ factors.B,
        )

    def expand(self, factors: LoRAFactors) -> LoRAFactors:
        return LoRAFactors(
            A=factors.A if self.rows is None else factors.A @ self.rows.mT,
            B=factors.B if self.columns is None else self.columns @ factors.B,
        )

    def reduced(self, objective: LayerObjective) -> LayerObjective:
        return dataclasses.replace(
            objective, ideal=self.coordinates(objective.ideal), mean=self.coordinates(objective.mean)
        )


@dataclass(frozen=True)
class _Scaling:
    """Unknowns z in which each factor's own curvature at the start is about 1: small factors converge as fast.

    ΔA = U_B (s_A ∘ Z_A) and ΔB = (Z_B ∘ s_B) U_Aᵀ, with the eigenvectors of BᵀB and of AAᵀ at the start.
    """

    basis_a: Tensor  # U_B, (R, R)
    basis_b: Tensor  # U_A, (R, R)
    scale_a: Tensor  # s_A, (R, I); 0 where A is not corrected
    scale_b: Tensor  # s_B, (O, R); 0 where B is not corrected
    unit: Tensor  # the order of the objective's values, ()

    @classmethod
    def of(cls, objective: LayerObjective, start: LoRAFactors, residual: Residual) -> _Scaling:
        A, B, curvature = start.A, start.B, objective.curvature(start)
        unit = curvature.new_ones(())
        if objective.similarity == "frobenius":
            unit = objective.ideal_square + objective.penalty_b * B.square().sum()
            unit = torch.where(unit > 0, unit, 1.0)
        seen_by_b, basis_b = torch.linalg.eigh(A * curvature @ A.mT)
        seen_by_a, basis_a = torch.linalg.eigh(B.mT @ B)
        scale_a = _inverse_root((seen_by_a[:, None] * curvature + 2 * objective.penalty_a) / unit)
        scale_b = _inverse_root((seen_by_b + 2 * objective.penalty_b) / unit)
        return cls(
            basis_a=basis_a,
            basis_b=basis_b,
            scale_a=(scale_a * (residual != "B")).expand(A.shape),
            scale_b=(scale_b * (residual != "A")).expand(B.shape),
            unit=unit,
        )

    def change(self, z: Tensor) -> LoRAFactors:
        z_a, z_b = z[: self.scale_a.numel()], z[self.scale_a.numel() :]
        return LoRAFactors(
            A=self.basis_a @ (self.scale_a * z_a.view_as(self.scale_a)),
            B=(self.scale_b * z_b.view_as(self.scale_b)) @ self.basis_b.mT,
        )

    def pull_back(self, gradient: LoRAFactors) -> Tensor:
        z_a = self.scale_a * (self.basis_a.mT @ gradient.A)
        z_b = self.scale_b * (gradient.B @ self.basis_b)
        return torch.cat([z_a.flatten(), z_b.flatten()])


def _inverse_root(curvature: Tensor) -> Tensor:
    """1/√c, and 0 where the objective does not see the direction: a step there would be amplified rounding."""
    floor = 1e-13 * len(curvature) * curvature.amax()
    return torch.where(curvature > floor, curvature, torch.inf).rsqrt()

"""The objective in factor space and the trust-region minimiser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorafair.aggregation.solvers.layer_objective import Similarity, layer_objective
from lorafair.aggregation.solvers.trust_region import minimize
from lorafair.model.adapter import LoRAFactors
from tests import references

SIMILARITIES: tuple[Similarity, ...] = ("cosine", "cosine_columns", "frobenius")


def point_and_direction(clients: LoRAFactors, weights: Tensor) -> tuple[LoRAFactors, LoRAFactors]:
    mean = references.mean(clients, weights)
    point = LoRAFactors(A=1.3 * mean.A + 0.1, B=mean.B - 0.2)
    return point, LoRAFactors(A=mean.A.cos(), B=mean.B.sin())


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_objective_and_its_derivatives_are_those_of_the_dense_one(similarity: Similarity) -> None:
    clients, weights = references.random_clients()
    objective = layer_objective(clients, weights, similarity=similarity, regularization=0.3)
    point, direction = point_and_direction(clients, weights)

    def dense(A: Tensor, B: Tensor) -> Tensor:
        return references.objective(A, B, clients, weights, similarity=similarity, regularization=0.3)

    torch.testing.assert_close(objective(point), dense(point.A, point.B))
    slope_a, slope_b = torch.autograd.functional.jacobian(dense, (point.A, point.B))
    slope = objective.gradient(point)
    torch.testing.assert_close(slope.A, slope_a)
    torch.testing.assert_close(slope.B, slope_b)
    _, (bent_a, bent_b) = torch.autograd.functional.hvp(dense, (point.A, point.B), (direction.A, direction.B))
    bent = objective.hessian(point)(direction)
    torch.testing.assert_close(bent.A, bent_a)
    torch.testing.assert_close(bent.B, bent_b)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_objective_is_defined_where_a_column_or_everything_is_zero(similarity: Similarity) -> None:
    clients, weights = references.random_clients()
    A = clients.A.clone()
    A[:, :, 0] = 0
    clients = LoRAFactors(A=A, B=clients.B)
    objective = layer_objective(clients, weights, similarity=similarity, regularization=0.01)
    mean = references.mean(clients, weights)
    for point in (mean, LoRAFactors(A=mean.A, B=torch.zeros_like(mean.B))):
        expected = references.objective(point.A, point.B, clients, weights, similarity=similarity, regularization=0.01)
        torch.testing.assert_close(objective(point), expected)
        slope = objective.gradient(point)
        assert slope.A.isfinite().all()
        assert slope.B.isfinite().all()
        bent = objective.hessian(point)(mean)
        assert bent.A.isfinite().all()
        assert bent.B.isfinite().all()


def minimize_by_autograd(function: Callable[[Tensor], Tensor], start: list[float]) -> Tensor:
    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(function, z)  # type: ignore[no-any-return]

    def hessian(z: Tensor) -> Callable[[Tensor], Tensor]:
        matrix = torch.autograd.functional.hessian(function, z)
        return lambda direction: matrix @ direction

    return minimize(function, gradient, hessian, torch.tensor(start, dtype=torch.float64))


def test_minimizer_walks_the_bent_valley_of_rosenbrock() -> None:
    found = minimize_by_autograd(lambda z: (1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2, [-1.2, 1.0])
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_minimizer_leaves_a_saddle_along_negative_curvature() -> None:
    found = minimize_by_autograd(lambda z: z[0] ** 2 + 0.25 * z[1] ** 4 - 0.5 * z[1] ** 2, [1.0, 1e-3])
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_minimizer_stays_where_the_gradient_is_zero() -> None:
    assert torch.equal(minimize_by_autograd(lambda z: (z**2).sum(), [0.0, 0.0]), torch.zeros(2, dtype=torch.float64))


def test_minimizer_never_goes_up() -> None:
    heights: list[float] = []

    def function(z: Tensor) -> Tensor:
        return (z[0] - 2) ** 4 + (z[0] - 2 * z[1]) ** 2 + torch.sin(5 * z[0])

    def value(z: Tensor) -> Tensor:
        heights.append(float(function(z)))
        return function(z)

    start = torch.tensor([0.0, 3.0], dtype=torch.float64)
    found = minimize(
        value,
        lambda z: torch.autograd.functional.jacobian(function, z),  # type: ignore[arg-type,return-value]
        lambda z: lambda direction: torch.autograd.functional.hessian(function, z) @ direction,  # type: ignore[operator]
        start,
    )
    assert float(function(found)) == pytest.approx(min(heights), abs=1e-14)

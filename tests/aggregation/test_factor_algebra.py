"""The algebra of factors against the same quantities of (O, I) matrices."""

from __future__ import annotations

import pytest
import torch

from lorafair.aggregation import factor_algebra
from lorafair.aggregation.factor_algebra import (
    add,
    aggregation_bias,
    inner,
    mean_factors,
    split_ideal_update,
    square_of_sum,
    squared_norm,
    squared_row_norms,
    transpose,
    weighted_mean,
    weighted_sum,
)
from lorafair.model.adapter import LoRAFactors
from tests import references


def dense(product: LoRAFactors) -> torch.Tensor:
    return product.B.double() @ product.A.double()


@pytest.fixture
def pair() -> tuple[LoRAFactors, LoRAFactors]:
    clients, _ = references.random_clients(9, 7, 3, 2)
    return tuple(LoRAFactors(A=A, B=B) for A, B in zip(clients.A, clients.B, strict=True))  # type: ignore[return-value]


def test_weighted_mean_is_float64_for_any_shape_and_dtype() -> None:
    weights = torch.tensor([0.25, 0.75])
    for shape in [(), (3,), (2, 3)]:
        stack = torch.arange(2 * max(1, torch.Size(shape).numel()), dtype=torch.float32).view(2, *shape)
        mean = weighted_mean(stack, weights)
        assert mean.dtype == torch.float64
        assert torch.equal(mean, 0.25 * stack[0].double() + 0.75 * stack[1].double())


def test_mean_and_weighted_sum_are_the_definitions() -> None:
    clients, weights = references.random_clients()
    reference = references.mean(clients, weights)
    mean = mean_factors(clients, weights)
    torch.testing.assert_close(mean.A, reference.A)
    torch.testing.assert_close(mean.B, reference.B)
    torch.testing.assert_close(dense(weighted_sum(clients, weights)), references.ideal_update(clients, weights))


def test_ideal_update_is_mean_product_plus_bias() -> None:
    clients, weights = references.random_clients()
    before = clients.A.clone()
    ideal = split_ideal_update(clients, weights)
    torch.testing.assert_close(dense(ideal.mean) + dense(ideal.bias), references.ideal_update(clients, weights))
    assert torch.equal(clients.A, before), "the clients' factors must not be changed"


def test_sums_transposes_inner_products_and_norms(pair: tuple[LoRAFactors, LoRAFactors]) -> None:
    left, right = pair
    torch.testing.assert_close(dense(add(left, right)), dense(left) + dense(right))
    torch.testing.assert_close(dense(transpose(left)), dense(left).T)
    torch.testing.assert_close(inner(left, right), (dense(left) * dense(right)).sum())
    torch.testing.assert_close(squared_norm(left), dense(left).square().sum())
    torch.testing.assert_close(squared_row_norms(left), dense(left).square().sum(1))


@pytest.mark.parametrize("rank", [1, 5, 6, 7, 40], ids=lambda rank: f"rank {rank} of (8, 12)")
def test_norms_are_right_whichever_way_is_cheaper(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_algebra, "_BLOCK", 3)
    clients, _ = references.random_clients(8, 12, rank, 1)
    product = LoRAFactors(A=clients.A[0], B=clients.B[0])
    torch.testing.assert_close(squared_norm(product), dense(product).square().sum())
    torch.testing.assert_close(squared_row_norms(product), dense(product).square().sum(1))


def test_bias_of_float32_clients_is_good_to_their_precision() -> None:
    clients, weights = references.random_clients(40, 50, 4, 6, dtype=torch.float32)
    ideal = split_ideal_update(clients, weights)
    torch.testing.assert_close(ideal.bias_square(), dense(ideal.bias).square().sum(), rtol=3e-7, atol=0)
    assert ideal.bias_square().dtype == torch.float64


def test_square_of_sum_has_no_noise_where_terms_cancel() -> None:
    u = torch.tensor([0.1, 0.7, 1.3], dtype=torch.float64)
    v = -u * (1 + 1e-15)
    assert square_of_sum(u @ u, u @ v, v @ v) == 0
    v = -0.9 * u
    torch.testing.assert_close(square_of_sum(u @ u, u @ v, v @ v), (u + v) @ (u + v))


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)], ids="{}".format)
@pytest.mark.parametrize("numbers", [1, 150, 10_000], ids="{} at a time".format)
def test_sums_over_many_clients_are_matrices_and_the_same(
    numbers: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, weights = references.random_clients(*shape, 3, 20)
    ideal, mean = references.ideal_update(clients, weights), references.mean(clients, weights)
    monkeypatch.setattr(factor_algebra, "_CLIENT_NUMBERS", numbers)
    found = split_ideal_update(clients, weights)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.mean.A, mean.A, **close)
    torch.testing.assert_close(found.mean.B, mean.B, **close)
    torch.testing.assert_close(dense(found.bias), ideal - mean.B @ mean.A, **close)
    torch.testing.assert_close(dense(weighted_sum(clients, weights)), ideal, **close)
    torch.testing.assert_close(dense(aggregation_bias(clients, weights)), ideal - mean.B @ mean.A, **close)
    assert found.bias.rank == weighted_sum(clients, weights).rank == (60 if numbers == 10_000 else 7)

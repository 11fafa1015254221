"""LoRA-FAIR: its solutions are the minimisers, theory holds, and nothing breaks at the edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafair.aggregation.base import aggregate
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.solvers import directions
from lorafair.aggregation.solvers.directions import Problems, cosine_loss, solve_cosine
from lorafair.errors import LorafairError
from lorafair.model.adapter import AdapterState, LoRAFactors
from lorafair.seeding import seeded
from tests import references

SIMILARITIES, RESIDUALS = ("cosine", "cosine_columns", "frobenius"), ("B", "A", "both")
EVERY_KIND = list(itertools.product(SIMILARITIES, RESIDUALS))
GLOBAL_KINDS = [("cosine", "B"), ("cosine", "A"), ("cosine_columns", "A"), ("frobenius", "B"), ("frobenius", "A")]


def combine(clients: LoRAFactors, weights: torch.Tensor, **options: Any) -> LoRAFactors:
    return LoRAFair(**options).combine(clients, weights).factors


def value(factors: LoRAFactors, clients: LoRAFactors, weights: torch.Tensor, similarity: str, penalty: float) -> float:
    return float(
        references.objective(factors.A, factors.B, clients, weights, similarity=similarity, regularization=penalty)
    )


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
@pytest.mark.parametrize("shape", [(7, 6, 3, 4), (5, 9, 2, 3), (12, 5, 1, 2)], ids=str)
def test_exact_is_the_minimum_that_lbfgs_finds(shape: tuple[int, ...], similarity: str, residual: str) -> None:
    for scale_b, penalty in [(1.0, 1.0), (1.0, 1e-4), (0.03, 0.01), (1e-3, 1e-4)]:
        clients, weights = references.random_clients(*shape, scale_b=scale_b)
        options: dict[str, Any] = {"similarity": similarity, "residual": residual, "regularization": penalty}
        found = combine(clients, weights, **options)
        reached = value(found, clients, weights, similarity, penalty)
        lowest, minimiser = references.minimum(clients, weights, **options)
        assert reached == pytest.approx(lowest, rel=1e-8)
        # With less penalty than this the valley is too flat for the reference to reach its bottom.
        if penalty * scale_b**2 > 1e-9:
            assert relative(found.A, minimiser.A) < 1e-7
            assert relative(found.B, minimiser.B) < 1e-7


def opposed_clients(seed: int) -> tuple[LoRAFactors, torch.Tensor]:
    """The second client has about the first one's product, but factors of opposite sign."""
    clients, weights = references.random_clients(4, 5, 2, 3, spread=1.5, seed=seed)
    A, B = clients.A.clone(), clients.B.clone()
    A[1], B[1] = -0.8 * A[0] + 0.1 * A[1], -1.2 * B[0]
    return LoRAFactors(A=A, B=B), weights


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 6, 27])
def test_exact_is_the_global_minimum_where_averaging_points_the_wrong_way(seed: int) -> None:
    clients, weights = opposed_clients(seed)
    A, B = _mean(clients, weights)
    assert (references.ideal_update(clients, weights) * (B @ A)).sum() < 0
    for penalty in (1.0, 1e-2):
        found = combine(clients, weights, regularization=penalty)
        lowest, _ = references.minimum(
            clients, weights, similarity="cosine", residual="B", regularization=penalty, starts=4
        )
        assert value(found, clients, weights, "cosine", penalty) <= lowest + 1e-9


@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
def test_gradient_vanishes_at_the_solution(similarity: str, residual: str) -> None:
    clients, weights = references.random_clients(8, 10, 3, 4)
    found = combine(clients, weights, similarity=similarity, residual=residual)
    A, B = found.A.clone().requires_grad_(), found.B.clone().requires_grad_()
    value = references.objective(A, B, clients, weights, similarity=similarity, regularization=0.01)
    slope_a, slope_b = torch.autograd.grad(value, (A, B))
    largest = (
        max(1.0, references.ideal_update(clients, weights).square().sum().item()) if similarity == "frobenius" else 1
    )
    assert residual == "B" or slope_a.norm() < 1e-12 * largest
    assert residual == "A" or slope_b.norm() < 1e-12 * largest


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("decades", [1, 3])
def test_gradient_vanishes_for_badly_conditioned_factors(decades: int, penalty: float) -> None:
    clients, weights = references.random_clients(30, 40, 16, 5, spread=0.3)
    clients = LoRAFactors(A=clients.A * torch.logspace(0, -decades, 16, dtype=torch.float64)[:, None], B=clients.B)
    B = combine(clients, weights, regularization=penalty).B.requires_grad_()
    mean = references.mean(clients, weights)
    value = references.objective(mean.A, B, clients, weights, similarity="cosine", regularization=penalty)
    (slope,) = torch.autograd.grad(value, B)
    assert slope.norm() * mean.B.norm() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
@pytest.mark.parametrize(("scale_b", "penalty"), [(1.0, 0.1), (1.0, 1e-3), (0.01, 1e-3)])
def test_exact_is_no_worse_than_sgd(similarity: str, residual: str, scale_b: float, penalty: float) -> None:
    clients, weights = references.random_clients(8, 10, 3, 4, scale_b=scale_b)
    options = {"similarity": similarity, "residual": residual, "regularization": penalty}
    exact, descended = combine(clients, weights, **options), combine(clients, weights, solver="sgd", **options)
    reached = value(exact, clients, weights, similarity, penalty)
    assert reached <= value(descended, clients, weights, similarity, penalty) + 1e-12
    assert reached <= value(references.mean(clients, weights), clients, weights, similarity, penalty) + 1e-12


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(GLOBAL_KINDS),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 5)),
    scale_b=st.floats(-4, 1).map(lambda exponent: 10**exponent),
    penalty=st.floats(-6, 2).map(lambda exponent: 10**exponent),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_exact_is_finite_and_no_worse_than_sgd_or_averaging_for_any_clients(
    kind: tuple[str, str], shape: tuple[int, ...], scale_b: float, penalty: float, spread: float, seed: int
) -> None:
    similarity, residual = kind
    clients, weights = references.random_clients(*shape, scale_b=scale_b, spread=spread, seed=seed)
    options = {"similarity": similarity, "residual": residual, "regularization": penalty}
    exact, mean = combine(clients, weights, **options), references.mean(clients, weights)
    reached = value(exact, clients, weights, similarity, penalty)
    assert exact.A.isfinite().all()
    assert exact.B.isfinite().all()
    assert reached <= value(mean, clients, weights, similarity, penalty) + 1e-12
    if similarity != "frobenius":
        moved = (exact.B, mean.B) if residual == "B" else (exact.A, mean.A)
        assert moved[0].norm() <= moved[1].norm() * (1 + 1e-9), "a cosine has no use for larger factors"
    descended = combine(clients, weights, solver="sgd", sgd_steps=200, sgd_learning_rate=1e-3, **options)
    assert reached <= value(descended, clients, weights, similarity, penalty) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
@pytest.mark.parametrize("scale_b", [1.0, 0.05])
def test_sgd_gives_the_iterates_of_dense_autograd(similarity: str, residual: str, scale_b: float) -> None:
    # One small and one large number of clients: K·R on either side of O and I.
    for clients_count, steps in ((2, 200), (5, 30)):
        clients, weights = references.random_clients(8, 7, 2, clients_count, scale_b=scale_b)
        options: dict[str, Any] = {"similarity": similarity, "residual": residual, "regularization": 0.01}
        found = combine(clients, weights, solver="sgd", sgd_steps=steps, sgd_learning_rate=2e-3, **options)
        expected = references.descend(clients, weights, steps=steps, learning_rate=2e-3, **options)
        assert relative(found.A, expected.A) < 1e-9
        assert relative(found.B, expected.B) < 1e-9


def test_sgd_defaults_are_the_papers() -> None:
    clients, weights = references.random_clients(6, 5, 2, 3, scale_b=0.1)
    expected = references.descend(
        clients, weights, similarity="cosine", residual="B", regularization=0.01, steps=1000, learning_rate=0.01
    )
    assert relative(combine(clients, weights, solver="sgd").B, expected.B) < 1e-9


def test_sgd_inflates_a_small_b_and_the_exact_solver_does_not() -> None:
    clients, weights = references.random_clients(scale_b=1e-3)
    size = references.mean(clients, weights).B.norm()
    assert combine(clients, weights, solver="sgd").B.norm() > 5 * size
    assert combine(clients, weights).B.norm() <= size


def test_sgd_that_diverges_says_what_to_change() -> None:
    clients, weights = references.random_clients()
    for residual in RESIDUALS:
        with pytest.raises(
            LorafairError, match=r"method\.sgd_learning_rate=1000000\.0 diverged in layer .*solver=exact"
        ):
            combine(clients, weights, similarity="frobenius", residual=residual, solver="sgd", sgd_learning_rate=1e6)


NO_BIAS = {
    "one client": lambda A, B: (A[:1], B[:1]),
    "equal clients": lambda A, B: (A[:1].expand_as(A), B[:1].expand_as(B)),
    "shared A": lambda A, B: (A[:1].expand_as(A), B),
    "shared B": lambda A, B: (A, B[:1].expand_as(B)),
}


@pytest.mark.parametrize("case", NO_BIAS)
@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
def test_nothing_to_correct_where_averaging_has_no_bias(case: str, similarity: str, residual: str) -> None:
    clients, weights = references.random_clients()
    A, B = NO_BIAS[case](clients.A, clients.B)
    clients, weights = LoRAFactors(A=A, B=B), weights[: len(A)] / weights[: len(A)].sum()
    if similarity == "frobenius":
        # The paper's objective has its minimum at B̄Ā = ΔW whatever λ is.
        assert (
            references.objective(*_mean(clients, weights), clients, weights, similarity=similarity, regularization=1)
            < 1e-25
        )
    for scale_b in (1.0, 1e-4):
        scaled = LoRAFactors(A=A, B=scale_b * B)
        mean = references.mean(scaled, weights)
        found = combine(scaled, weights, similarity=similarity, residual=residual)
        assert relative(found.A, mean.A) < 1e-12
        assert relative(found.B, mean.B) < 1e-12


def _mean(clients: LoRAFactors, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = references.mean(clients, weights)
    return mean.A, mean.B


@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
def test_large_penalty_gives_fedit(similarity: str, residual: str) -> None:
    clients, weights = references.random_clients()
    mean = references.mean(clients, weights)
    for penalty in (1e8, 1e16, 1e100):
        found = combine(clients, weights, similarity=similarity, residual=residual, regularization=penalty)
        assert relative(found.A, mean.A) < 1e-7
        assert relative(found.B, mean.B) < 1e-7


def test_without_penalty_the_product_is_the_projection_on_the_rows_of_a() -> None:
    clients, weights = references.random_clients(7, 6, 3, 4)
    mean = references.mean(clients, weights)
    projection = torch.linalg.pinv(mean.A) @ mean.A
    for similarity in ("frobenius", "cosine"):
        found = combine(clients, weights, similarity=similarity, regularization=0.0)
        torch.testing.assert_close(found.B @ found.A, references.ideal_update(clients, weights) @ projection)
    transposed = combine(clients, weights, similarity="cosine", residual="A", regularization=0.0)
    onto_columns = mean.B @ torch.linalg.pinv(mean.B)
    torch.testing.assert_close(transposed.B @ transposed.A, onto_columns @ references.ideal_update(clients, weights))


def test_least_squares_lies_between_the_svd_and_fedit() -> None:
    clients, weights = references.random_clients(9, 8, 2, 5)
    ideal, mean = references.ideal_update(clients, weights), references.mean(clients, weights)

    def error(factors: LoRAFactors) -> float:
        return float((ideal - factors.B @ factors.A).norm())

    floor = torch.linalg.svdvals(ideal)[2:].norm().item()
    one, both = (
        combine(clients, weights, similarity="frobenius", residual=residual, regularization=1e-9)
        for residual in ("B", "both")
    )
    assert floor < error(one) < error(mean)
    assert error(both) == pytest.approx(floor, rel=1e-5), "alternating least squares converges to the truncated SVD"


def test_correcting_both_is_no_worse_than_correcting_one() -> None:
    clients, weights = references.random_clients()
    for similarity in SIMILARITIES:
        reached = {
            residual: value(
                combine(clients, weights, similarity=similarity, residual=residual), clients, weights, similarity, 0.01
            )
            for residual in RESIDUALS
        }
        assert reached["both"] <= min(reached["B"], reached["A"]) + 1e-12


def test_relative_penalty_of_the_frobenius_form_ignores_the_scale_of_a() -> None:
    clients, weights = references.random_clients()
    scaled = LoRAFactors(A=100 * clients.A, B=clients.B)
    for residual in ("B", "A"):
        expected = combine(clients, weights, similarity="frobenius", residual=residual)
        found = combine(scaled, weights, similarity="frobenius", residual=residual)
        torch.testing.assert_close(found.B @ found.A, 100 * (expected.B @ expected.A))


@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
def test_rescaling_makes_the_product_as_long_as_the_ideal_update_in_its_direction(
    similarity: str, residual: str
) -> None:
    clients, weights = references.random_clients(scale_b=0.1)
    plain = combine(clients, weights, similarity=similarity, residual=residual)
    found = combine(clients, weights, similarity=similarity, residual=residual, rescale=True)
    ideal, product = references.ideal_update(clients, weights), found.B @ found.A
    assert ((ideal - product) * product).sum().abs() < 1e-12 * ideal.square().sum()
    same, scaled = (
        ((plain.A, found.A), (plain.B, found.B)) if residual != "A" else ((plain.B, found.B), (plain.A, found.A))
    )
    assert torch.equal(*same)
    assert relative(scaled[0] / scaled[0].norm(), scaled[1] / scaled[1].norm()) < 1e-12


def test_rescaling_never_turns_a_factor_around() -> None:
    clients, weights = opposed_clients(1)
    plain = combine(clients, weights, regularization=1e6)
    assert (references.ideal_update(clients, weights) * (plain.B @ plain.A)).sum() < 0
    assert torch.equal(combine(clients, weights, regularization=1e6, rescale=True).B, plain.B)


def test_rescaling_undoes_the_inflation_of_sgd() -> None:
    clients, weights = references.random_clients(scale_b=1e-3)
    ideal = references.ideal_update(clients, weights)
    errors = {}
    for rescale in (False, True):
        found = combine(clients, weights, solver="sgd", rescale=rescale)
        errors[rescale] = relative(found.B @ found.A, ideal)
    assert errors[False] > 5
    assert errors[True] < 0.6


def zero_b(clients: LoRAFactors) -> LoRAFactors:
    return LoRAFactors(A=clients.A, B=torch.zeros_like(clients.B))


def zero_a(clients: LoRAFactors) -> LoRAFactors:
    return LoRAFactors(A=torch.zeros_like(clients.A), B=clients.B)


@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_empty_update_stays_empty(similarity: str, residual: str, penalty: float) -> None:
    clients, weights = references.random_clients()
    for empty in (zero_b(clients), zero_a(clients)):
        for rescale in (False, True):
            found = combine(
                empty, weights, similarity=similarity, residual=residual, regularization=penalty, rescale=rescale
            )
            mean = references.mean(empty, weights)
            torch.testing.assert_close(found.A, mean.A)
            torch.testing.assert_close(found.B, mean.B)


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_updates_that_cancel_give_a_cosine_no_direction(penalty: float) -> None:
    clients, _ = references.random_clients(clients=2)
    A, B = clients.A[0], clients.B[0]
    clients = LoRAFactors(A=torch.stack([2 * A, -A]), B=torch.stack([B, 2 * B]))
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    found, mean = combine(clients, weights, regularization=penalty), references.mean(clients, weights)
    assert references.ideal_update(clients, weights).norm() < 1e-15 * (mean.B @ mean.A).norm()
    torch.testing.assert_close(found.B, mean.B)


@pytest.mark.parametrize("similarity", ["cosine", "frobenius"])
def test_mean_of_b_may_vanish_though_the_update_does_not(similarity: str) -> None:
    clients, _ = references.random_clients(clients=2)
    clients = LoRAFactors(A=clients.A, B=torch.stack([clients.B[0], -clients.B[0]]))
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    projection = torch.linalg.pinv(clients.A.mean(0)) @ clients.A.mean(0)
    found = combine(clients, weights, similarity=similarity, regularization=0.0)
    torch.testing.assert_close(found.B @ found.A, references.ideal_update(clients, weights) @ projection)
    small = LoRAFactors(A=clients.A, B=0.1 * clients.B)
    assert value(combine(small, weights, similarity=similarity), small, weights, similarity, 0.01) < 1
    assert combine(small, weights, similarity="cosine", regularization=1e6).B.norm() == 0, "too dear, so ΔB = 0"


@pytest.mark.slow
@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_rank_deficient_factors(similarity: str, residual: str, penalty: float) -> None:
    clients, weights = references.random_clients(7, 6, 4, 3)
    A, B = clients.A.clone(), clients.B.clone()
    A[:, 1], A[:, 2] = A[:, 0], 0
    B[:, :, 3] = B[:, :, 0]
    clients = LoRAFactors(A=A, B=B)
    found = combine(clients, weights, similarity=similarity, residual=residual, regularization=penalty)
    mean = references.mean(clients, weights)
    assert found.A.isfinite().all()
    assert found.B.isfinite().all()
    before = value(mean, clients, weights, similarity, penalty)
    assert value(found, clients, weights, similarity, penalty) <= before + 1e-12


@pytest.mark.parametrize(("similarity", "residual"), EVERY_KIND)
@pytest.mark.parametrize("size", [(30, 20, 4, 4), (9, 4, 6, 2)], ids=["dependent rows", "more factors than columns"])
def test_no_inflation_where_nothing_is_penalised_or_seen(
    similarity: str, residual: str, size: tuple[int, int, int, int]
) -> None:
    clients, weights = references.random_clients(*size)
    clients = LoRAFactors(A=clients.A.clone(), B=0.1 * clients.B)
    clients.A[:, -1] = clients.A[:, 0]
    found = combine(clients, weights, similarity=similarity, residual=residual, regularization=0.0)
    mean = references.mean(clients, weights)
    for new, old in ((found.A, mean.A), (found.B, mean.B)):
        assert new.norm() < 10 * old.norm()
    assert value(found, clients, weights, similarity, 0.0) <= value(mean, clients, weights, similarity, 0.0) + 1e-12


@pytest.mark.parametrize("similarity", ["cosine", "frobenius"])
@pytest.mark.parametrize("penalty", [0.0, 1e-8, 0.01])
def test_b_keeps_what_the_averaged_a_does_not_see(similarity: str, penalty: float) -> None:
    clients, weights = references.random_clients(7, 8, 6, 4)
    mixing = torch.randn(6, 3, generator=seeded(0, "mixing"), dtype=torch.float64)
    clients = LoRAFactors(A=mixing @ clients.A[:, :3], B=clients.B)
    unseen = torch.linalg.svd(mixing).U[:, 3:]
    change = combine(clients, weights, similarity=similarity, regularization=penalty).B
    change = change - references.mean(clients, weights).B
    assert change.norm() > 1e-3
    assert (change @ unseen).norm() < 1e-9


def test_more_factors_than_the_matrix_has_rows_and_clients_without_weight() -> None:
    clients, _ = references.random_clients(3, 4, 3, 5)
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    without = LoRAFactors(A=clients.A[[0, 2, 3]], B=clients.B[[0, 2, 3]])
    for similarity, residual in GLOBAL_KINDS:
        expected = combine(without, weights[[0, 2, 3]], similarity=similarity, residual=residual)
        found = combine(clients, weights, similarity=similarity, residual=residual)
        torch.testing.assert_close(found.A, expected.A)
        torch.testing.assert_close(found.B, expected.B)


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        clients, weights = references.random_clients()
        found = combine(clients, weights, residual="both")
    outside, weights = references.random_clients()
    torch.testing.assert_close(found.B, combine(outside, weights, residual="both").B)


def test_same_layer_gives_the_same_result_beside_others() -> None:
    """A rank smaller than the largest of the batch is padded; that must not show."""
    small, weights = references.random_clients(5, 9, 1, 4)
    large, _ = references.random_clients(7, 6, 5, 4)
    together = aggregate(LoRAFair(), AdapterState({"small": small, "large": large}, {}), weights)
    torch.testing.assert_close(together.factors["small"].B, combine(small, weights).B)
    assert together.factors["small"].B.shape == (5, 1)


def opposing_problems(seed: int, count: int, rank: int) -> Problems:
    """Problems over many orders of magnitude; in some the ideal update of B is about −t times its mean."""
    generator = seeded(seed, "problems")

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    e = 10 ** (-12 * uniform(count, rank) * uniform(count, 1))
    mean = 10 ** (-6 * uniform(count, rank) * uniform(count, 1))
    bias = 10 ** (12 * (uniform(count, rank) - 0.5) * uniform(count, 1) + 4 * (uniform(count, 1) - 0.5))
    overlap = (2 * uniform(count, rank) - 1) * (mean * bias).sqrt()
    t = e * (1 + 10 ** (2 * uniform(count, rank) - 1))
    opposed = uniform(count, 1) < 0.3
    bias = torch.where(opposed, t.square() * mean * (1 + 1e-6 * uniform(count, rank)), bias)
    overlap = torch.where(opposed, -t * mean, overlap)
    return Problems(
        eigenvalues=e,
        mean=mean,
        overlap=overlap,
        bias=bias,
        residual=(bias / e).sum(1) * (1 + uniform(count) / 2),
        weight=torch.ones(count, dtype=torch.float64),
        penalty=10 ** (2 - 10 * uniform(count)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(1, 9))
def test_starting_from_a_root_close_by_finds_the_same_minimum(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = opposing_problems(rank, 2000, rank)
    found = cosine_loss(problems, solve_cosine(problems))
    monkeypatch.setattr(directions, "_CUT_STEPS", (16,) * 9)
    expected = cosine_loss(problems, solve_cosine(problems))
    assert bool((found <= expected * (1 + 1e-10)).all())


@pytest.mark.parametrize("exponent", [-13, -15, -17, -30, -200])
@pytest.mark.parametrize(("rank", "spread"), [(6, 0.7), (16, 3.0)])
def test_a_penalty_of_next_to_nothing_keeps_the_update(rank: int, spread: float, exponent: int) -> None:
    """The limit for λ → 0 is the multiple of the least-squares solution that is next to B̄."""
    clients, weights = references.random_clients(30, 40, rank, 5, spread=spread)
    mean, ideal = references.mean(clients, weights), references.ideal_update(clients, weights)
    fitted = ideal @ torch.linalg.pinv(mean.A)
    limit = fitted * (fitted * mean.B).sum() / fitted.square().sum()
    penalty = 10.0**exponent / float(mean.B.square().sum())
    assert relative(combine(clients, weights, regularization=penalty).B, limit) < 1e-8


def columns_through_zero(seed: int) -> tuple[LoRAFactors, torch.Tensor]:
    """Small, opposed clients: descent carries some columns of the product through zero."""
    clients, weights = references.random_clients(6, 9, 2, 2, spread=1.5, seed=seed)
    A, B = clients.A.clone(), clients.B.clone()
    A[1], B[1] = -0.8 * A[0], -1.2 * B[0]
    return LoRAFactors(A=0.01 * A, B=B), weights


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2, 4, 8])
def test_descent_by_columns_survives_a_column_that_passes_zero(seed: int) -> None:
    clients, weights = columns_through_zero(seed)
    options: dict[str, Any] = {"similarity": "cosine_columns", "residual": "A", "regularization": 0.01}
    found = combine(clients, weights, solver="sgd", sgd_steps=200, **options)
    expected = references.descend(clients, weights, steps=200, learning_rate=0.01, **options)
    # After a column has passed close to zero its path hangs on the last bit; its size does not.
    assert 0.2 < float(found.A.norm() / expected.A.norm()) < 5


def public_descent(
    layers: list[LoRAFactors], weights: torch.Tensor, steps: int, patience: int | None, starts: list[torch.Tensor]
) -> tuple[list[torch.Tensor], int]:
    """Autograd and torch.optim.SGD on dense matrices, all layers jointly, as in descendants of the authors' code."""
    means = [references.mean(layer, weights) for layer in layers]
    changes = [start.clone().requires_grad_() for start in starts]
    optimizer = torch.optim.SGD(changes, lr=0.05)
    last, still = float("inf"), 0
    for step in range(steps):
        optimizer.zero_grad()
        losses = [
            references.objective(
                mean.A, mean.B + change, layer, weights, similarity="cosine_columns", regularization=1.0
            )
            for layer, mean, change in zip(layers, means, changes, strict=True)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizer.step()
        if patience is None:
            continue
        if abs(last - loss.item()) < 1e-6:
            still += 1
            if still >= patience:
                return [m.B + c.detach() for m, c in zip(means, changes, strict=True)], step + 1
        else:
            last, still = loss.item(), 0
    return [m.B + c.detach() for m, c in zip(means, changes, strict=True)], steps


@pytest.mark.slow
@pytest.mark.parametrize(("start", "patience"), [("xavier", None), ("zero", 5), ("xavier", 5)])
def test_the_descent_of_public_code_is_reproduced(start: str, patience: int | None) -> None:
    layers = {f"layer{n}": references.random_clients(8, 7, 2, 3, spread=0.2, seed=n)[0] for n in range(2)}
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    options: dict[str, Any] = {"similarity": "cosine_columns", "solver": "sgd", "regularization": 1.0}
    begun = LoRAFair(**options, sgd_start=start, sgd_steps=1, sgd_learning_rate=1e-300)  # type: ignore[arg-type]
    means = {path: references.mean(layer, weights) for path, layer in layers.items()}
    starts = [update.factors.B - means[path].B for path, update in begun.combine_layers(layers, weights).items()]
    expected, taken = public_descent(list(layers.values()), weights, 150, patience, starts)
    assert (taken < 150) == (patience is not None)
    method = LoRAFair(**options, sgd_start=start, sgd_steps=150, sgd_learning_rate=0.05, sgd_patience=patience)  # type: ignore[arg-type]
    for update, B in zip(method.combine_layers(layers, weights).values(), expected, strict=True):
        torch.testing.assert_close(update.factors.B, B, rtol=1e-8, atol=1e-10)


def test_the_xavier_start_is_uniform_within_its_bound_and_drawn_anew_for_other_clients() -> None:
    drawn = []
    for seed in (0, 0, 1):
        clients, weights = references.random_clients(40, 30, 8, 3, seed=seed)
        found = combine(
            clients, weights, solver="sgd", sgd_start="xavier", sgd_steps=1, sgd_learning_rate=1e-300, residual="both"
        )
        mean = references.mean(clients, weights)
        drawn.append((found.A - mean.A, found.B - mean.B))
    for noise, bound in zip(drawn[0], ((6 / 38) ** 0.5, (6 / 48) ** 0.5), strict=True):
        assert 0.97 * bound < noise.abs().max() <= bound
        assert noise.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    torch.testing.assert_close(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0][1], drawn[2][1])

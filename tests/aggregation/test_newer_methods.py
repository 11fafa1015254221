"""Methods of 2025 and 2026 against dense float64 computations written from their formulas.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lorafair.aggregation.base import Aggregator, InitialLayer, LayerUpdate, aggregate
from lorafair.aggregation.bias import bias_metrics
from lorafair.aggregation.fed_alora import FedALoRA
from lorafair.aggregation.fed_plora import FedPLoRA
from lorafair.aggregation.fed_sb import FedSB
from lorafair.aggregation.fedask import FedASK, sketching_matrix
from lorafair.aggregation.fedit import FedIT
from lorafair.aggregation.fedmomentum import FedMomentum
from lorafair.aggregation.fedrot_lora import FedRotLoRA
from lorafair.aggregation.flex_lora import FlexLoRA
from lorafair.aggregation.flora_na import FLoRANA
from lorafair.aggregation.frlora import FRLoRA
from lorafair.aggregation.glora import GLoRA
from lorafair.aggregation.la_lora import LALoRA
from lorafair.aggregation.ravan import Ravan
from lorafair.aggregation.registry import method_of
from lorafair.aggregation.smoothing import Smoothing
from lorafair.communication.traffic import round_traffic
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.model.adapter import PARTS, AdapterLayout, AdapterState, Core, LoRAFactors
from lorafair.seeding import seeded
from tests import references

SIZES = [(7, 6, 3, 4), (30, 25, 2, 3), (5, 40, 4, 6), (9, 9, 3, 2)]  # O, I, R, K


def product(factors: LoRAFactors) -> Tensor:
    return factors.B.double() @ factors.A.double()


def folded_product(update: LayerUpdate) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if update.folded is None else product(update.folded)


def best_weights(clients: LoRAFactors, weights: Tensor) -> tuple[float, LoRAFactors]:
    """min ‖ΔW − (Σ Q_k B_k)(Σ P_k A_k)‖² on (O, I) matrices by BFGS over the 2K numbers, from P = Q = weights."""
    ideal, count = references.ideal_update(clients, weights), len(weights)

    def factors(z: Tensor) -> LoRAFactors:
        A = sum(z[k] * clients.A[k] for k in range(count))
        B = sum(z[count + k] * clients.B[k] for k in range(count))
        return LoRAFactors(A=A, B=B)  # type: ignore[arg-type]

    def value_and_gradient(z: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(z).requires_grad_()
        value = (ideal - product(factors(point))).square().sum()
        value.backward()
        return value.item(), point.grad.numpy()  # type: ignore[union-attr]

    found = minimize(value_and_gradient, torch.cat([weights, weights]).numpy(), jac=True, method="BFGS", tol=1e-10)
    return float(found.fun), factors(torch.from_numpy(found.x))


@pytest.mark.parametrize("size", SIZES)
def test_flora_na_finds_the_best_weights_of_each_factor(size: tuple[int, int, int, int]) -> None:
    clients, weights = references.random_clients(*size)
    ideal = references.ideal_update(clients, weights)
    lowest, expected = best_weights(clients, weights)
    found = product(FLoRANA().combine(clients, weights).factors)
    assert float((ideal - found).square().sum()) == pytest.approx(lowest, rel=1e-8)
    torch.testing.assert_close(found, product(expected), rtol=1e-4, atol=1e-4)


def test_flora_na_is_fedit_before_the_first_turn_and_no_worse_after_any() -> None:
    clients, weights = references.random_clients(20, 15, 4, 5)
    ideal, fedit = references.ideal_update(clients, weights), FedIT().combine(clients, weights).factors
    start = FLoRANA(iterations=0).combine(clients, weights).factors
    assert torch.equal(start.A, fedit.A)
    assert torch.equal(start.B, fedit.B)
    errors = [
        float((ideal - product(FLoRANA(iterations=turns).combine(clients, weights).factors)).norm())
        for turns in (0, 1, 2, 4, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.97 * errors[0]
    zero = LoRAFactors(A=clients.A, B=torch.zeros_like(clients.B))
    assert torch.equal(FLoRANA().combine(zero, weights).factors.A, fedit.A)


def projected(clients: LoRAFactors, weights: Tensor, server_rank: int, rank: int) -> Tensor:
    """ΔW on the leading eigenvectors of Σ p_k P_k, cut to a rank: by pseudo-inverses and dense decompositions."""
    products = (clients.B.double() @ clients.A.double()).numpy()
    projectors = sum(p * (W @ np.linalg.pinv(W, rcond=1e-10)) for p, W in zip(weights.numpy(), products, strict=True))
    reference = np.linalg.eigh(projectors)[1][:, ::-1][:, :server_rank]
    ideal = sum(p * W for p, W in zip(weights.numpy(), products, strict=True))
    U, values, Vt = np.linalg.svd(reference @ reference.T @ ideal, full_matrices=False)
    return torch.from_numpy((U[:, :rank] * values[:rank]) @ Vt[:rank])


@pytest.mark.parametrize("server_rank", [None, 1, 2, 4, 6, 100])
@pytest.mark.parametrize("size", SIZES)
def test_glora_projects_on_the_columns_that_clients_have_most_in_common(
    size: tuple[int, int, int, int], server_rank: int | None
) -> None:
    clients, weights = references.random_clients(*size)
    factors = GLoRA(server_rank=server_rank).combine(clients, weights).factors
    expected = projected(clients, weights, server_rank or size[2], size[2])
    torch.testing.assert_close(product(factors), expected, rtol=1e-8, atol=1e-8)
    used = min(size[2], server_rank or size[2])
    torch.testing.assert_close((factors.A @ factors.A.mT)[:used, :used], torch.eye(used, dtype=torch.float64))
    assert (factors.B.norm(dim=0).diff() <= 1e-12).all(), "a smaller LoRA rank takes the largest singular values"


def test_glora_does_not_depend_on_how_clients_factorise_their_updates() -> None:
    clients, weights = references.random_clients(12, 10, 3, 4)
    Q = torch.randn(4, 3, 3, generator=seeded(3), dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
    turned = LoRAFactors(A=torch.linalg.solve(Q, clients.A), B=clients.B @ Q)
    ours = [product(GLoRA().combine(of, weights).factors) for of in (clients, turned)]
    torch.testing.assert_close(ours[0], ours[1])
    fedit = [product(FedIT().combine(of, weights).factors) for of in (clients, turned)]
    assert (fedit[0] - fedit[1]).norm() > 0.1 * fedit[0].norm()


@pytest.mark.parametrize("ranks", [(3, 2, 1), (1, 3, 3, 2), (2, 2)])
def test_glora_is_flex_lora_where_the_server_holds_all_columns_that_clients_have(ranks: tuple[int, ...]) -> None:
    clients, weights = references.random_clients(14, 9, 3, len(ranks))
    for k, rank in enumerate(ranks):
        clients.A[k, rank:], clients.B[k, :, rank:] = 0, 0
    ideal = references.ideal_update(clients, weights)
    best = product(FlexLoRA().combine(clients, weights).factors)
    whole = GLoRA(server_rank=sum(ranks)).combine(clients, weights).factors
    torch.testing.assert_close(product(whole), best)
    errors = [
        float((product(GLoRA(server_rank=rank).combine(clients, weights).factors) - ideal).norm())
        for rank in (1, sum(ranks) - 1, sum(ranks))
    ]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(
        product(GLoRA(server_rank=2).combine(clients, weights).factors), projected(clients, weights, 2, 3)
    )


def test_glora_leaves_the_rows_of_a_that_it_does_not_use_to_the_clients() -> None:
    clients, weights = references.random_clients(12, 10, 4, 3)
    start = LoRAFactors(A=torch.randn(4, 10, dtype=torch.float64), B=torch.zeros(12, 4))
    factors = GLoRA(server_rank=2).combine(clients, weights, start).factors
    assert torch.equal(factors.A[2:], start.A[2:])
    assert not factors.B[:, 2:].any()
    nothing = LoRAFactors(A=clients.A, B=torch.zeros_like(clients.B))
    unmoved = GLoRA().combine(nothing, weights, start).factors
    assert not product(unmoved).any()
    assert unmoved.A.isfinite().all()


def test_glora_sums_the_projectors_of_many_clients_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, weights = references.random_clients(9, 8, 2, 30)
    expected = product(GLoRA(server_rank=4).combine(clients, weights).factors)
    monkeypatch.setattr("lorafair.aggregation.factor_algebra._CLIENT_NUMBERS", 200)
    torch.testing.assert_close(product(GLoRA(server_rank=4).combine(clients, weights).factors), expected)
    torch.testing.assert_close(expected, projected(clients, weights, 4, 2))


@pytest.mark.parametrize("energy", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_fedmomentum_shares_out_the_first_triples_and_folds_the_next(
    size: tuple[int, int, int, int], energy: float
) -> None:
    clients, weights = references.random_clients(*size)
    U, values, Vt = np.linalg.svd(references.ideal_update(clients, weights).numpy(), full_matrices=False)
    squares, rank = values**2, size[2]
    kept = next(n for n in range(1, len(values) + 1) if squares[:n].sum() >= energy * squares.sum() * (1 - 1e-12))
    update = FedMomentum(energy=energy).combine(clients, weights)
    factors = update.factors
    torch.testing.assert_close(product(factors), torch.from_numpy((U[:, :rank] * values[:rank]) @ Vt[:rank]))
    torch.testing.assert_close(factors.A @ factors.A.mT, torch.diag(torch.from_numpy(values[:rank])))
    torch.testing.assert_close(factors.B.mT @ factors.B, torch.diag(torch.from_numpy(values[:rank])))
    if energy < 1:
        assert (0 if update.folded is None else update.folded.rank) == max(0, kept - rank)
    expected = torch.from_numpy((U[:, rank:kept] * values[rank:kept]) @ Vt[rank:kept])
    torch.testing.assert_close(folded_product(update).expand_as(expected), expected, rtol=1e-6, atol=1e-9)


def test_fedmomentum_leaves_a_row_of_a_to_train_where_the_update_has_no_direction() -> None:
    clients, weights = references.random_clients(12, 10, 4, 3)
    clients.A[:, 2:], clients.B[:, :, 2:] = 0, 0
    clients = LoRAFactors(A=clients.A[:1].expand_as(clients.A).clone(), B=clients.B)  # so that ΔW has rank 2
    start = LoRAFactors(A=torch.randn(4, 10, dtype=torch.float64), B=torch.zeros(12, 4))
    update = FedMomentum().combine(clients, weights, start)
    torch.testing.assert_close(product(update.factors), references.ideal_update(clients, weights))
    assert torch.equal(update.factors.A[2:], start.A[2:])
    assert not update.factors.B[:, 2:].any()
    assert update.folded is None


def soft_rotation(matrix: np.ndarray, strength: float) -> np.ndarray:
    """The proper rotation that is nearest to (1 − λ)·I + λ·(the one nearest to a matrix), by SVDs alone."""

    def nearest(target: np.ndarray) -> np.ndarray:
        U, _, Vt = np.linalg.svd(target)
        if np.linalg.det(U @ Vt) < 0:
            Vt[-1] *= -1
        return U @ Vt

    return nearest((1 - strength) * np.eye(len(matrix)) + strength * nearest(matrix))


@pytest.mark.parametrize(("turn", "by"), [(1, "A"), (2, "B"), (3, "A")])
def test_fedrot_lora_in_turns_aligns_one_factor_after_each_round(turn: int, by: str) -> None:
    clients, weights = references.random_clients(9, 8, 3, 4)
    start = references.random_clients(9, 8, 3, 1, seed=7)[0]
    start = LoRAFactors(A=start.A[0], B=start.B[0])
    A, B = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(9, 3, dtype=torch.float64)
    for k in range(4):
        near = clients.A[k] @ start.A.T if by == "A" else clients.B[k].T @ start.B
        Q = torch.from_numpy(soft_rotation(near.numpy(), 0.4))
        A += weights[k] * Q.T @ clients.A[k]
        B += weights[k] * clients.B[k] @ Q
    factors = FedRotLoRA(strength=0.4, turns=True).in_round(turn).combine(clients, weights, start).factors
    torch.testing.assert_close(factors.A, A)
    torch.testing.assert_close(factors.B, B)


def test_fedrot_lora_aligns_nothing_after_the_first_round_where_it_takes_turns() -> None:
    assert FedRotLoRA(turns=True).in_round(0) == FedIT()
    assert FedRotLoRA().in_round(0) == FedRotLoRA()


def clients_of_cores(method: Aggregator, rank: int) -> tuple[AdapterState, AdapterState, Tensor]:
    """Three clients that share A and B of one layer, what they were sent, and their weights."""
    assert method.core is not None
    generator = seeded(0, "cores", rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sent = LoRAFactors(A=normal(rank, 8), B=normal(9, rank))
    of_h, of_scales = method.core.of_rank(rank)
    held = LoRAFactors(A=sent.A.expand(3, -1, -1), B=sent.B.expand(3, -1, -1))
    cores = {"layer": Core(H=normal(3, *of_h), scales=normal(3, *of_scales))}
    start = {"layer": Core(H=normal(*of_h), scales=torch.ones(of_scales, dtype=torch.float64))}
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return AdapterState({"layer": held}, {}, cores), AdapterState({"layer": sent}, {}, start), weights


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_ravan_averages_what_each_head_adds_and_starts_with_scales_of_one(heads: int) -> None:
    method = Ravan(heads=heads)
    clients, sent, weights = clients_of_cores(method, rank=4)
    size, factors, cores = 4 // heads, sent.factors["layer"], clients.cores["layer"]
    parts = [slice(i * size, (i + 1) * size) for i in range(heads)]
    ideal = torch.zeros(9, 8, dtype=torch.float64)
    for k in range(3):
        for i, part in enumerate(parts):
            ideal += weights[k] * cores.scales[k, i] * factors.B[:, part] @ cores.H[k, i] @ factors.A[part]
    update = aggregate(method, clients, weights, sent, method.receives(0))
    new, found = update.cores["layer"], torch.zeros(9, 8, dtype=torch.float64)
    for i, part in enumerate(parts):
        found += factors.B[:, part] @ new.H[i] @ factors.A[part]
    torch.testing.assert_close(found, ideal)
    assert new.scales.eq(1).all()
    assert torch.equal(update.factors["layer"].A, factors.A)
    assert torch.equal(update.factors["layer"].B, factors.B)
    metrics = bias_metrics(clients, weights, update)
    assert metrics["error_before"] < 1e-7
    assert metrics["error_after"] < 1e-7


def test_ravan_starts_from_orthonormal_bases_of_the_seed() -> None:
    drawn = LoRAFactors(A=torch.rand(4, 8), B=torch.zeros(9, 4))
    given = (InitialLayer(drawn, torch.zeros(9, 8), 1.0, seeded(seed)) for seed in (0, 0, 1))
    one, same, other = (Ravan().initialize(layer).factors for layer in given)
    torch.testing.assert_close(one.A @ one.A.mT, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(one.B.mT @ one.B, torch.eye(4, dtype=torch.float64))
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.B, other.B)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.lora.rank=6"], "model.lora.rank=6 cannot be dealt out to the 4 heads of method.name=ravan"),
        (["model.lora.client_ranks=[4,2,1]"], "needs the same LoRA rank everywhere"),
        (["federation.initialization=fresh"], "federation.initialization=fresh does not fit method.name=ravan"),
        (["model.lora.initialization=pissa"], "model.lora.initialization=pissa does not fit method.name=ravan"),
    ],
)
def test_ravan_refuses_what_it_cannot_work_with(tiny: Callable[..., Config], options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of(tiny("method.name=ravan", *options))


OUT, IN, RANK, HEAD = 9, 8, 4, 15  # of the layer, and numbers of the head


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        (FLoRANA(), RANK * (OUT + IN), RANK * (OUT + IN)),
        (FRLoRA(), RANK * (OUT + IN), RANK * (OUT + IN)),
        (FedRotLoRA(turns=True), RANK * (OUT + IN), RANK * (OUT + IN)),
        (FedMomentum(energy=0), RANK * (OUT + IN), RANK * (OUT + IN)),
        (FedMomentum(energy=1), RANK * (OUT + IN), IN * (OUT + IN)),  # all triples there are
        (Ravan(heads=2), 2 * 2 * 2, 2 * 2 * 2),
        (FedSB(), RANK * RANK, RANK * RANK),
        (FedALoRA(), RANK * OUT - HEAD, RANK * OUT - HEAD),  # the head stays with the client
        (LALoRA(), RANK * (OUT + IN), RANK * (OUT + IN)),
        (FedASK(oversampling=3), 7 * (OUT + IN), 7 * OUT + RANK * (OUT + IN)),  # both sketches; Q and the factors
        (FedASK(oversampling=9), IN * (OUT + IN), IN * OUT + RANK * (OUT + IN)),  # no more columns than directions
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Aggregator) else str(value),
)
def test_clients_are_charged_what_they_send_and_receive(method: Aggregator, up: int, down: int) -> None:
    if method.core is not None:
        clients, sent, weights = clients_of_cores(method, RANK)
    else:
        factors, weights = references.random_clients(OUT, IN, RANK, 3)
        clients = AdapterState({"layer": factors}, {})
        sent = AdapterState({"layer": LoRAFactors(A=factors.A[0], B=factors.B[0])}, {})
    layout = AdapterLayout.of({"layer": ((RANK, IN), (OUT, RANK))}, {"head": (HEAD,)}, method.core)
    update = aggregate(method, clients, weights, sent, method.receives(0))
    traffic = round_traffic(layout, method, update, 0, (RANK,) * 3)
    assert (traffic.up, traffic.down) == (12 * (up + HEAD), 12 * (down + HEAD))  # three clients, four bytes


def test_fed_sb_starts_from_the_singular_triples_of_a_first_step_of_signs() -> None:
    gradient = torch.from_numpy(np.random.default_rng(2).standard_normal((9, 7)))
    step = -0.01 * np.sign(gradient.numpy())
    U, values, Vt = np.linalg.svd(step)
    drawn = LoRAFactors(A=torch.rand(3, 7), B=torch.zeros(9, 3))
    update = FedSB(first_step=0.01).initialize(InitialLayer(drawn, torch.zeros(9, 7), 2.0, seeded(0), gradient))
    A, B, core = update.factors.A, update.factors.B, update.core
    assert core is not None
    torch.testing.assert_close(A @ A.mT, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(B.mT @ B, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(core.H, torch.diag(torch.from_numpy(values[:3] / 2))[None])
    torch.testing.assert_close(2 * B @ core.H[0] @ A, torch.from_numpy((U[:, :3] * values[:3]) @ Vt[:3]))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_fed_sb_has_whole_bases_where_the_gradient_has_fewer_directions(rank: int) -> None:
    """As that of one image can. A row of A, or column of B, of zeros leaves its part of the matrix untrained."""
    factor = torch.randn(9, rank, generator=seeded(1)).sign(), torch.randn(rank, 7, generator=seeded(2)).sign()
    gradient, drawn = factor[0] @ factor[1], LoRAFactors(A=torch.randn(3, 7), B=torch.zeros(9, 3))
    update = FedSB(first_step=0.01).initialize(InitialLayer(drawn, torch.zeros(9, 7), 2.0, seeded(0), gradient))
    A, B = update.factors.A, update.factors.B
    for basis in (A @ A.mT, B.mT @ B):
        torch.testing.assert_close(basis, torch.eye(3, dtype=torch.float64))
    assert update.core is not None
    torch.testing.assert_close(2.0 * B @ update.core.H[0] @ A, -0.01 * gradient.sign().double())


def test_fed_sb_averages_the_matrix_between_the_bases_exactly() -> None:
    clients, sent, weights = clients_of_cores(FedSB(), rank=4)
    factors, H = sent.factors["layer"], clients.cores["layer"].H
    ideal = sum(weights[k] * factors.B @ H[k, 0] @ factors.A for k in range(3))
    update = aggregate(FedSB(), clients, weights, sent, FedSB().receives(0))
    torch.testing.assert_close(factors.B @ update.cores["layer"].H[0] @ factors.A, ideal)
    assert torch.equal(update.factors["layer"].B, factors.B)
    assert update.cores["layer"].scales.shape == (0,)


def test_fed_plora_averages_each_direction_over_the_clients_that_have_trained_it() -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, 3)
    sent = references.random_clients(OUT, IN, RANK, 1, seed=4)[0]
    start = LoRAFactors(A=sent.A[0], B=sent.B[0])
    trained = [[0, 1], [1], [1, 3]]  # of each client; nobody has trained direction 2
    for k, own in enumerate(trained):
        for j in set(range(RANK)) - set(own):
            clients.A[k, j], clients.B[k, :, j] = start.A[j], start.B[:, j]
    update = aggregate(FedPLoRA(), AdapterState({"layer": clients}, {}), weights, AdapterState({"layer": start}, {}))
    factors = update.factors["layer"]
    for j in range(RANK):
        having = [k for k, own in enumerate(trained) if j in own]
        share = sum(float(weights[k]) for k in having)
        row = sum(weights[k] * clients.A[k, j] for k in having) / share if having else start.A[j]
        column = sum(weights[k] * clients.B[k, :, j] for k in having) / share if having else start.B[:, j]
        torch.testing.assert_close(factors.A[j], row)
        torch.testing.assert_close(factors.B[:, j], column)
    layout = AdapterLayout.of({"layer": ((RANK, IN), (OUT, RANK))}, {"head": (HEAD,)})
    traffic = round_traffic(layout, FedPLoRA(), update, 0, (2, 1, 2))
    assert traffic.up == 4 * (5 * (OUT + IN) + 3 * HEAD)
    assert traffic.down == 4 * 3 * (RANK * (OUT + IN) + HEAD)


def test_fed_plora_is_fedit_for_clients_that_train_all_directions() -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, 3)
    start = LoRAFactors(A=torch.zeros(RANK, IN), B=torch.zeros(OUT, RANK))
    ours, fedit = (method.combine(clients, weights, start).factors for method in (FedPLoRA(), FedIT()))
    torch.testing.assert_close(ours.A, fedit.A)
    torch.testing.assert_close(ours.B, fedit.B)


def test_fed_plora_has_one_scaling_for_all(tiny: Callable[..., Config]) -> None:
    options = ["method.name=fed_plora", "model.lora.client_ranks=[4,2,1]", "model.lora.client_scaling=own"]
    with pytest.raises(ConfigError, match=r"model\.lora\.client_scaling=own does not fit method\.name=fed_plora"):
        method_of(tiny(*options))


def test_fed_alora_averages_b_and_leaves_a_and_the_head_to_the_clients() -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, 3)
    method = FedALoRA()
    assert method.trains(0) == PARTS
    assert "B" in method.sends(0)
    assert not {"A", "head"} & {*method.sends(0), *method.receives(0)}
    assert set(method.personal_parts) == {"A", "head"}
    expected = sum(weights[k] * clients.B[k] for k in range(3))
    torch.testing.assert_close(method.combine(clients, weights).factors.B, expected)


@pytest.mark.parametrize("ranks", [(4, 2, 1), (1, 4, 4), (2, 2, 1)])
def test_products_are_fitted_where_lora_ranks_differ(ranks: tuple[int, ...]) -> None:
    clients, weights = references.random_clients(OUT, IN, 4, 3)
    for k, own in enumerate(ranks):
        clients.A[k, own:], clients.B[k, :, own:] = 0, 0
    sent = references.random_clients(OUT, IN, 4, 1, seed=4)[0]
    start = LoRAFactors(A=sent.A[0], B=torch.zeros(OUT, 4, dtype=torch.float64))
    ideal, state = references.ideal_update(clients, weights), AdapterState({"layer": clients}, {})
    errors = {}
    for method in (FedIT(), FLoRANA(), FedMomentum(energy=1)):
        update = aggregate(method, state, weights, AdapterState({"layer": start}, {}))
        whole = product(update.factors["layer"])
        if "layer" in update.folded:
            whole = whole + product(update.folded["layer"])
        errors[type(method)] = float((whole - ideal).norm() / ideal.norm())
    assert errors[FLoRANA] < errors[FedIT]
    assert errors[FedMomentum] < 1e-12


def test_flora_na_fits_many_clients_without_a_matrix_of_pairs() -> None:
    clients, weights = references.random_clients(OUT, IN, 2, 150)
    ideal = references.ideal_update(clients, weights)
    fedit, fitted = (product(method.combine(clients, weights).factors) for method in (FedIT(), FLoRANA()))
    U, values, Vt = np.linalg.svd(ideal.numpy())
    best = torch.from_numpy((U[:, :2] * values[:2]) @ Vt[:2])  # which so many clients have in their span
    assert (ideal - fitted).norm() < (ideal - fedit).norm()
    torch.testing.assert_close((ideal - fitted).norm(), (ideal - best).norm(), rtol=1e-3, atol=0)


def sketched(clients: LoRAFactors, weights: Tensor, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """What FedASK's two stages leave of ΔW, Q QᵀΔW, and its factors of all directions, on (O, I) matrices."""
    ideal = references.ideal_update(clients, weights).numpy()
    Q = np.linalg.qr(ideal @ sketching_matrix(ideal.shape[1], columns).numpy())[0]
    return ideal, Q @ (Q.T @ ideal)


@pytest.mark.parametrize("oversampling", [0, 2, 30])
@pytest.mark.parametrize("size", SIZES)
def test_fedask_shares_out_the_triples_of_what_the_sketches_see(
    size: tuple[int, int, int, int], oversampling: int
) -> None:
    clients, weights = references.random_clients(*size)
    outputs, inputs, rank, _ = size
    _, seen = sketched(clients, weights, min(rank + oversampling, outputs, inputs))
    U, values, Vt = np.linalg.svd(seen, full_matrices=False)
    factors = FedASK(oversampling=oversampling, freeze_a=False).combine(clients, weights).factors
    torch.testing.assert_close(product(factors), torch.from_numpy((U[:, :rank] * values[:rank]) @ Vt[:rank]))
    torch.testing.assert_close(factors.A @ factors.A.mT, torch.diag(torch.from_numpy(values[:rank])))
    torch.testing.assert_close(factors.B.mT @ factors.B, torch.diag(torch.from_numpy(values[:rank])))


def test_fedask_comes_closer_to_the_best_approximation_with_more_columns() -> None:
    """What Q misses and what the truncation cuts off are orthogonal, and the latter is no more than the best leaves."""
    clients, weights = references.random_clients(40, 30, 4, 6)
    ideal = references.ideal_update(clients, weights)
    best = float(torch.linalg.svdvals(ideal)[4:].norm())
    errors = []
    for oversampling in (0, 8, 20, 26):
        _, seen = sketched(clients, weights, 4 + oversampling)
        factors = FedASK(oversampling=oversampling, freeze_a=False).combine(clients, weights).factors
        errors.append(float((ideal - product(factors)).norm()))
        missed = float(np.linalg.norm(ideal.numpy() - seen))
        assert best * (1 - 1e-12) <= errors[-1] <= (missed**2 + best**2) ** 0.5 * (1 + 1e-12)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2:] == pytest.approx([best] * 2)  # ΔW has 24 directions


@pytest.mark.parametrize("oversampling", [0, 2])
@pytest.mark.parametrize("size", SIZES)
def test_fedask_is_exact_where_clients_share_a(size: tuple[int, int, int, int], oversampling: int) -> None:
    clients, weights = references.random_clients(*size)
    shared = LoRAFactors(A=clients.A[:1].expand_as(clients.A), B=clients.B)
    factors = FedASK(oversampling=oversampling).combine(shared, weights).factors
    torch.testing.assert_close(product(factors), references.ideal_update(shared, weights))


def test_fedask_leaves_a_row_of_a_to_train_where_the_update_has_no_direction() -> None:
    clients, weights = references.random_clients(12, 10, 4, 3)
    clients.B[:, :, 2:] = 0
    shared = LoRAFactors(A=clients.A[:1].expand_as(clients.A).clone(), B=clients.B)  # so that ΔW has rank 2
    start = LoRAFactors(A=torch.randn(4, 10, dtype=torch.float64, generator=seeded(0)), B=torch.zeros(12, 4))
    factors = FedASK().combine(shared, weights, start).factors
    torch.testing.assert_close(product(factors), references.ideal_update(shared, weights))
    assert torch.equal(factors.A[2:], start.A[2:])
    assert not factors.B[:, 2:].any()
    nothing = FedASK().combine(LoRAFactors(shared.A, torch.zeros_like(shared.B)), weights, start).factors
    assert torch.equal(nothing.A, start.A)


@pytest.mark.parametrize("ranks", [(4, 2, 1), (1, 4, 4)])
def test_fedask_sums_products_of_different_lora_ranks(ranks: tuple[int, ...]) -> None:
    clients, weights = references.random_clients(OUT, IN, 4, 3)
    shared = LoRAFactors(A=clients.A[:1].repeat(3, 1, 1), B=clients.B)
    for k, own in enumerate(ranks):
        shared.A[k, own:], shared.B[k, :, own:] = 0, 0
    factors = FedASK().combine(shared, weights).factors
    torch.testing.assert_close(product(factors), references.ideal_update(shared, weights))


def test_what_fedask_trains_is_what_its_paper_trains_with_and_without_privacy() -> None:
    assert FedASK().trains(0) == FedASK().sends(0) == ("B", "head")
    assert FedASK(freeze_a=False).trains(0) == ("A", "B", "head")
    assert {"A", "B"} < set(FedASK().receives(0))


def test_la_lora_takes_turns_from_step_to_step_and_averages_both_factors() -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, 3)
    method, mean = LALoRA(), references.mean(clients, weights)
    assert method.trains(3) == method.sends(3) == PARTS
    assert [method.trains_in_step(3, step)[0] for step in range(4)] == ["B", "A", "B", "A"]
    assert all("head" in method.trains_in_step(3, step) for step in range(4))
    torch.testing.assert_close(method.combine(clients, weights).factors.A, mean.A)
    torch.testing.assert_close(method.combine(clients, weights).factors.B, mean.B)
    assert LALoRA(filter=False).smoothing is None


@pytest.mark.parametrize("features", [1, 2, 3, 40])
def test_smoothing_is_a_filter_along_the_features_that_keeps_sums(features: int) -> None:
    smoothing = LALoRA().smoothing
    assert smoothing is not None
    values = torch.randn(3, 5, features, dtype=torch.float64, generator=seeded(0, "smoothing"))
    mirrored = np.pad(values.numpy(), ((0, 0), (0, 0), (2, 2)), mode="symmetric")
    expected = sum(w * mirrored[:, :, i : i + features] for i, w in enumerate(np.array([1, 4, 6, 4, 1]) / 16))
    torch.testing.assert_close(smoothing.smoothed(values, -1), torch.from_numpy(np.asarray(expected)))
    torch.testing.assert_close(smoothing.smoothed(values, -1).sum(-1), values.sum(-1))
    of_rows = smoothing.smoothed(values.mT.contiguous(), -2)
    torch.testing.assert_close(of_rows.mT, smoothing.smoothed(values, -1))


def test_smoothing_lowers_the_variance_of_white_noise_by_the_sum_of_squared_weights() -> None:
    kernel = (0.25, 0.5, 0.25)
    noise = torch.randn(400, 1000, dtype=torch.float64, generator=seeded(0, "white"))
    inner = Smoothing(kernel).smoothed(noise, -1)[:, 1:-1]
    assert float(inner.square().mean()) == pytest.approx(sum(w * w for w in kernel), rel=0.01)


def test_control_variates_do_not_fit_factors_that_take_turns(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"client\.scaffold=true does not fit method\.name=la_lora; possible: "):
        method_of(tiny("method.name=la_lora", "client.scaffold=true", "client.optimizer=sgd"))

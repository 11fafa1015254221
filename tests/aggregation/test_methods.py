"""Every method against a dense float64 computation written from its formula, and what theory says must hold.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.references as references
from lorafair.aggregation.alignment import aligned, nearest_rotation
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import aggregation_bias, lora_ranks_of, svd
from lorafair.aggregation.fedex_lora import FedExLoRA
from lorafair.aggregation.fedrot_lora import FedRotLoRA
from lorafair.aggregation.fedrpca import FedRPCA, robust_pca
from lorafair.aggregation.fedsvd import FedSVD
from lorafair.aggregation.flex_lora import FlexLoRA
from lorafair.aggregation.flora import FLoRA
from lorafair.aggregation.florist import FLoRIST
from lorafair.aggregation.het_lora import HETLoRA
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.raflora import RaFLoRA
from lorafair.aggregation.rbla import RBLA
from lorafair.model.adapter import LoRAFactors
from lorafair.registry import METHODS

SIZES = [(7, 6, 3, 4), (30, 25, 2, 3), (5, 40, 4, 6), (40, 5, 4, 1), (9, 9, 3, 2)]  # O, I, R, K


def product(factors: LoRAFactors) -> Tensor:
    return factors.B.double() @ factors.A.double()


def applied(update: LayerUpdate) -> Tensor:
    """What the clients' next round starts from, folded part included, (O, I)."""
    whole = product(update.factors)
    return whole if update.folded is None else whole + product(update.folded)


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    U, values, Vt = np.linalg.svd(matrix.numpy())
    return torch.from_numpy((U[:, :rank] * values[:rank]) @ Vt[:rank])


def mixed(ranks: tuple[int, ...], seed: int = 0) -> tuple[LoRAFactors, Tensor]:
    """Clients of these ranks, padded with zeros to the largest."""
    clients, weights = references.random_clients(10, 8, max(ranks), len(ranks), seed=seed)
    for k, rank in enumerate(ranks):
        clients.A[k, rank:] = 0
        clients.B[k, :, rank:] = 0
    return clients, weights


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", [FLoRA(), FedExLoRA(), LoRAFair(fold=True), LoRAFair(fold=True, residual="both")])
def test_methods_that_promise_it_are_exact(method: Aggregator, size: tuple[int, int, int, int]) -> None:
    clients, weights = references.random_clients(*size)
    update = method.combine(clients, weights)
    torch.testing.assert_close(applied(update), references.ideal_update(clients, weights), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_flora_stacks_all_clients_and_weights_them_once(size: tuple[int, int, int, int]) -> None:
    clients, weights = references.random_clients(*size)
    update = FLoRA().combine(clients, weights)
    assert update.folded is not None
    assert update.folded.rank == size[2] * size[3]
    stacked_b = torch.cat(list(clients.B), dim=1)
    torch.testing.assert_close(update.folded.B, stacked_b)
    stacked_a = torch.cat([p * A for p, A in zip(weights, clients.A, strict=True)])
    torch.testing.assert_close(update.folded.A, stacked_a)
    assert not product(update.factors).any()


@pytest.mark.parametrize("size", SIZES)
def test_flex_lora_is_the_best_approximation_of_rank_r(size: tuple[int, int, int, int]) -> None:
    clients, weights = references.random_clients(*size)
    factors = FlexLoRA().combine(clients, weights).factors
    expected = best_of_rank(references.ideal_update(clients, weights), size[2])
    torch.testing.assert_close(product(factors), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factors.A @ factors.A.mT, torch.eye(size[2], dtype=torch.float64))
    norms = factors.B.norm(dim=0)
    assert (norms.diff() <= 1e-12).all(), "singular values descend, so that a smaller rank takes the largest"


@pytest.mark.parametrize("size", SIZES)
def test_svd_in_factor_space_is_the_dense_one(size: tuple[int, int, int, int]) -> None:
    clients, _ = references.random_clients(*size)
    one = LoRAFactors(A=clients.A[0], B=clients.B[0])
    U, values, Vt = svd(one)
    torch.testing.assert_close((U * values) @ Vt, product(one))
    dense = torch.linalg.svdvals(product(one))[: len(values)]
    torch.testing.assert_close(values[: size[2]], dense[: size[2]])


@pytest.mark.parametrize("size", [size for size in SIZES if size[3] > 1])
def test_the_bias_has_rank_of_one_client_less(size: tuple[int, int, int, int]) -> None:
    clients, weights = references.random_clients(*size)
    mean = references.mean(clients, weights)
    bias = aggregation_bias(clients, weights)
    assert bias.rank == (size[3] - 1) * size[2]
    torch.testing.assert_close(product(bias), references.ideal_update(clients, weights) - mean.B @ mean.A)


def test_fedex_lora_averages_and_folds_as_much_as_it_is_told() -> None:
    clients, weights = references.random_clients(12, 11, 2, 4)
    mean = references.mean(clients, weights)
    for rank in (1, 3):
        update = FedExLoRA(residual_rank=rank).combine(clients, weights)
        torch.testing.assert_close(update.factors.B, mean.B)
        assert update.folded is not None
        expected = best_of_rank(references.ideal_update(clients, weights) - mean.B @ mean.A, rank)
        torch.testing.assert_close(product(update.folded), expected, rtol=1e-9, atol=1e-9)
    assert FedExLoRA().combine(*references.random_clients(clients=1)).folded is None


@pytest.mark.parametrize("size", SIZES)
def test_fedsvd_rewrites_the_mean_without_loss(size: tuple[int, int, int, int]) -> None:
    clients, weights = references.random_clients(*size)
    shared = LoRAFactors(A=clients.A[:1].expand_as(clients.A), B=clients.B)
    factors = FedSVD().combine(shared, weights).factors
    torch.testing.assert_close(product(factors), references.ideal_update(shared, weights), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factors.A @ factors.A.mT, torch.eye(size[2], dtype=torch.float64))


@pytest.mark.parametrize("ranks", [(3, 3, 3), (4, 2, 1), (2, 4, 4, 3)])
def test_het_lora_weighs_clients_by_their_updates(ranks: tuple[int, ...]) -> None:
    clients, weights = mixed(ranks)
    norms = [float(np.linalg.norm((B @ A).numpy())) for A, B in zip(clients.A, clients.B, strict=True)]
    norm_weights = torch.tensor(norms) / sum(norms)
    expected = references.mean(clients, norm_weights.double())
    factors = HETLoRA().combine(clients, weights).factors
    torch.testing.assert_close(factors.A, expected.A, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(factors.B, expected.B, rtol=1e-6, atol=1e-6)
    nothing = LoRAFactors(A=clients.A, B=torch.zeros_like(clients.B))
    torch.testing.assert_close(HETLoRA().combine(nothing, weights).factors.A, references.mean(nothing, weights).A)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_florist_keeps_the_fewest_directions_that_hold_the_energy(energy: float) -> None:
    clients, weights = references.random_clients(20, 18, 4, 3, spread=0.3)
    start = LoRAFactors(A=torch.randn(4, 18), B=torch.zeros(20, 4))
    ideal = references.ideal_update(clients, weights)
    squares = np.linalg.svd(ideal.numpy())[1] ** 2
    kept = next(n for n in range(1, 19) if squares[:n].sum() >= energy * squares.sum() * (1 - 1e-12))
    update = FLoRIST(energy=energy).combine(clients, weights, start)
    assert update.sent_lora_rank == min(kept, 4)
    torch.testing.assert_close(product(update.factors), best_of_rank(ideal, min(kept, 4)), rtol=1e-9, atol=1e-9)
    assert torch.equal(update.factors.A[update.sent_lora_rank :], start.A[update.sent_lora_rank :].double())


@pytest.mark.parametrize("ranks", [(3, 3, 3), (4, 2, 1), (2, 4, 4, 3), (1, 5)])
def test_raflora_averages_each_range_of_ranks_over_those_who_have_it(ranks: tuple[int, ...]) -> None:
    clients, weights = mixed(ranks)
    assert lora_ranks_of(clients).tolist() == list(ranks)
    expected = torch.zeros(10, 8, dtype=torch.float64)
    for r in range(max(ranks)):  # range by range is direction by direction
        have = [k for k, rank in enumerate(ranks) if rank > r]
        total = sum(weights[k] for k in have)
        for k in have:
            expected += weights[k] / total * torch.outer(clients.B[k, :, r], clients.A[k, r])
    factors = RaFLoRA().combine(clients, weights).factors
    torch.testing.assert_close(product(factors), best_of_rank(expected, max(ranks)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [(3, 3, 3), (4, 2, 1), (2, 4, 4, 3), (1, 5)])
def test_rbla_averages_each_direction_over_those_who_have_it(ranks: tuple[int, ...]) -> None:
    clients, weights = mixed(ranks)
    factors = RBLA().combine(clients, weights).factors
    for r in range(max(ranks)):
        have = [k for k, rank in enumerate(ranks) if rank > r]
        row = sum(weights[k] * clients.A[k, r] for k in have) / sum(weights[k] for k in have)
        column = sum(weights[k] * clients.B[k, :, r] for k in have) / sum(weights[k] for k in have)
        torch.testing.assert_close(factors.A[r], row)
        torch.testing.assert_close(factors.B[:, r], column)


def test_raflora_without_mixed_ranks_is_flex_lora() -> None:
    clients, weights = references.random_clients()
    ours, other = RaFLoRA().combine(clients, weights).factors, FlexLoRA().combine(clients, weights).factors
    torch.testing.assert_close(product(ours), product(other))


def start_of(clients: LoRAFactors) -> LoRAFactors:
    generator = torch.Generator().manual_seed(5)
    A = clients.A.mean(0) + 0.3 * torch.randn(clients.A.shape[1:], generator=generator, dtype=torch.float64)
    B = clients.B.mean(0) + 0.3 * torch.randn(clients.B.shape[1:], generator=generator, dtype=torch.float64)
    return LoRAFactors(A=A, B=B)


def test_alignment_keeps_the_products_and_undoes_a_rotation() -> None:
    clients, _ = references.random_clients(20, 15, 4, 3)
    turned = aligned(clients, start_of(clients))
    torch.testing.assert_close(turned.B @ turned.A, clients.B @ clients.A)
    start = start_of(clients)
    rotation = nearest_rotation(torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3, dtype=torch.float64))
    copies = LoRAFactors(A=rotation.mT @ start.A, B=start.B @ rotation)  # K times the start, in other coordinates
    undone = aligned(copies, start)
    torch.testing.assert_close(undone.A, start.A.expand_as(undone.A))
    torch.testing.assert_close(undone.B, start.B.expand_as(undone.B))


def test_alignment_finds_the_rotation_that_no_small_turn_improves() -> None:
    clients, _ = references.random_clients(9, 8, 3, 4)
    start = start_of(clients)
    balance = start.A.square().sum() / start.B.square().sum()

    def distance(factors: LoRAFactors) -> Tensor:
        return (factors.A - start.A).square().sum((1, 2)) + balance * (factors.B - start.B).square().sum((1, 2))

    turned = aligned(clients, start)
    assert (distance(turned) < distance(clients)).all()
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(20):
            skew = size * torch.randn(3, 3, generator=generator, dtype=torch.float64)
            Q = torch.linalg.matrix_exp(skew - skew.mT)
            other = LoRAFactors(A=Q.mT @ turned.A, B=turned.B @ Q)
            assert (distance(other) >= distance(turned) - 1e-9).all()


def test_fedrot_lora_from_no_turn_to_a_full_one() -> None:
    clients, weights = references.random_clients(9, 8, 3, 4)
    start = start_of(clients)
    plain, full = references.mean(clients, weights), references.mean(aligned(clients, start), weights)
    for strength, expected in ((0.0, plain), (1.0, full)):
        factors = FedRotLoRA(strength=strength).combine(clients, weights, start).factors
        torch.testing.assert_close(factors.A, expected.A)
        torch.testing.assert_close(factors.B, expected.B)
    ideal = references.ideal_update(clients, weights)
    half = FedRotLoRA(strength=0.5).combine(clients, weights, start).factors
    assert (product(half) - ideal).norm() < (product(plain) - ideal).norm()


def test_robust_pca_separates_a_common_part_from_spikes() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(300, 1, generator=generator, dtype=torch.float64) @ torch.ones(1, 12, dtype=torch.float64)
    spikes = 5 * torch.randn(300, 12, generator=generator, dtype=torch.float64)
    spikes[torch.rand(300, 12, generator=generator) > 0.03] = 0
    low_rank, sparse = robust_pca(common + spikes, 500)
    torch.testing.assert_close(low_rank + sparse, common + spikes)
    assert (low_rank - common).norm() < 0.03 * common.norm()
    assert robust_pca(torch.zeros(4, 3), 10)[0].norm() == 0


def test_fedrpca_amplifies_the_sparse_part_of_the_changes() -> None:
    clients, weights = references.random_clients(20, 15, 3, 5, spread=0.2)
    start = start_of(clients)
    plain = FedRPCA(amplification=1).combine(clients, weights, start).factors
    mean = references.mean(clients, weights)
    torch.testing.assert_close(plain.A, mean.A)
    torch.testing.assert_close(plain.B, mean.B)
    amplified = FedRPCA(amplification=3).combine(clients, weights, start).factors
    changes = (clients.B - start.B).flatten(1).mT
    low_rank, sparse = robust_pca(changes, 200)
    expected = start.B + ((low_rank + 3 * sparse) @ weights).view_as(start.B)
    torch.testing.assert_close(amplified.B, expected)


@pytest.mark.parametrize("name", [name for name in METHODS.names if name not in ("fedrpca", "het_lora")])
def test_one_client_or_equal_clients_keep_their_update(name: str) -> None:
    clients, _ = references.random_clients(clients=1)
    method, start = METHODS[name](), start_of(clients)
    for count in (1, 3):
        same = LoRAFactors(A=clients.A.expand(count, -1, -1), B=clients.B.expand(count, -1, -1))
        if name == "florist":
            method = FLoRIST(energy=1.0)
        update = method.combine(same, torch.full((count,), 1 / count, dtype=torch.float64), start)
        torch.testing.assert_close(applied(update), product(LoRAFactors(clients.A[0], clients.B[0])))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_errors_lie_between_the_floor_of_the_svd_and_plain_averaging(seed: int) -> None:
    clients, weights = references.random_clients(20, 16, 3, 5, seed=seed)
    ideal = references.ideal_update(clients, weights)
    mean, start = references.mean(clients, weights), start_of(clients)
    floor, plain = (best_of_rank(ideal, 3) - ideal).norm(), (mean.B @ mean.A - ideal).norm()

    def error(**options: object) -> Tensor:
        method = LoRAFair(similarity="frobenius", regularization=1e-9, **options)  # type: ignore[arg-type]
        return (applied(method.combine(clients, weights, start)) - ideal).norm()

    assert floor <= error(residual="both") + 1e-9
    assert error(residual="both") <= error() + 1e-9
    assert error() <= plain
    assert floor <= error(align=True)
    assert error(fold=True, align=True) < 1e-9 * plain


def test_aligned_lora_fair_does_not_depend_on_the_clients_coordinates() -> None:
    clients, weights = references.random_clients(20, 15, 4, 3)
    start = start_of(clients)
    rotation = nearest_rotation(torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    turned = LoRAFactors(A=rotation.mT @ clients.A, B=clients.B @ rotation)

    def combined(method: LoRAFair, of: LoRAFactors) -> Tensor:
        return product(method.combine(of, weights, start).factors)

    aligning, plain = LoRAFair(align=True), LoRAFair()
    torch.testing.assert_close(combined(aligning, turned), combined(aligning, clients), rtol=1e-6, atol=1e-8)
    assert (combined(plain, turned) - combined(plain, clients)).norm() > 0.1 * combined(plain, clients).norm()

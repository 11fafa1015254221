"""Clients of different LoRA ranks: every method against dense loops over the clients' own, unpadded factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafair.aggregation.alignment import aligned
from lorafair.aggregation.base import Aggregator, ServerUpdate, aggregate
from lorafair.aggregation.bias import bias_metrics
from lorafair.aggregation.factor_algebra import is_identity
from lorafair.aggregation.fedex_lora import FedExLoRA
from lorafair.aggregation.fedit import FedIT
from lorafair.aggregation.fedsvd import FedSVD
from lorafair.aggregation.ffa_lora import FFALoRA
from lorafair.aggregation.flora import FLoRA
from lorafair.aggregation.het_lora import HETLoRA
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.raflora import RaFLoRA
from lorafair.aggregation.rbla import RBLA
from lorafair.aggregation.ro_lora import RoLoRA
from lorafair.communication.traffic import round_traffic
from lorafair.model.adapter import AdapterLayout, AdapterState, LoRAFactors
from lorafair.seeding import seeded
from tests import references

OUT, IN = 10, 12
RANKS = [(4, 2, 1), (1, 4, 4, 2), (3, 3, 2), (2, 1, 2), (6, 3, 3, 1, 1, 1)]
LARGEST = 4


def mixed(
    ranks: tuple[int, ...], *, rank: int | None = None, shared: str = "", seed: int = 0, scale_b: float = 1.0
) -> tuple[LoRAFactors, Tensor, LoRAFactors]:
    """Clients of these ranks padded to `rank`, their weights, and what they were sent; `shared` factors are as sent."""
    rank = rank or max(ranks)
    clients, weights = references.random_clients(OUT, IN, rank, len(ranks), seed=seed, scale_b=scale_b)
    generator = seeded(seed, "sent")
    A = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
    B = scale_b * torch.randn(OUT, rank, generator=generator, dtype=torch.float64)
    for k, own in enumerate(ranks):
        clients.A[k] = A if "A" in shared else clients.A[k]
        clients.B[k] = B if "B" in shared else clients.B[k]
        clients.A[k, own:], clients.B[k, :, own:] = 0, 0
    return clients, weights, LoRAFactors(A=A, B=B)


def ideal_of(clients: LoRAFactors, weights: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """ΔW, entry by entry from each client's own directions."""
    whole = torch.zeros(OUT, IN, dtype=torch.float64)
    for k, own in enumerate(ranks):
        for r in range(own):
            whole += weights[k] * torch.outer(clients.B[k, :, r], clients.A[k, r])
    return whole


def product(factors: LoRAFactors) -> Tensor:
    return factors.B.double() @ factors.A.double()


def error(found: Tensor, ideal: Tensor) -> float:
    return float((found - ideal).norm() / ideal.norm())


@pytest.mark.parametrize("ranks", RANKS)
def test_fedsvd_decomposes_the_mean_b_times_the_a_that_clients_share(ranks: tuple[int, ...]) -> None:
    clients, weights, sent = mixed(ranks, shared="A")
    factors = aggregate(FedSVD(), state(clients), weights, state(sent)).factors["layer"]
    torch.testing.assert_close(product(factors), ideal_of(clients, weights, ranks), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factors.A @ factors.A.mT, torch.eye(max(ranks), dtype=torch.float64))


def test_fedsvd_over_rounds_is_exact_whatever_ranks_take_part() -> None:
    """Three rounds of clients that add to B what depends on nothing but themselves."""
    A = torch.randn(LARGEST, IN, generator=seeded(0, "A"), dtype=torch.float64)
    held = LoRAFactors(A=A, B=torch.zeros(OUT, LARGEST, dtype=torch.float64))
    for turn, ranks in enumerate([(4, 2, 1), (4, 4, 2), (4, 1, 1)]):
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        clients = LoRAFactors(A=held.A.repeat(3, 1, 1), B=held.B.repeat(3, 1, 1))
        clients.B.add_(torch.randn(3, OUT, LARGEST, generator=seeded(0, turn), dtype=torch.float64))
        for k, own in enumerate(ranks):
            clients.A[k, own:], clients.B[k, :, own:] = 0, 0
        held = aggregate(FedSVD(), state(clients), weights, state(held)).factors["layer"]
        torch.testing.assert_close(product(held), ideal_of(clients, weights, ranks), rtol=1e-9, atol=1e-9)


def state(factors: LoRAFactors) -> AdapterState:
    return AdapterState({"layer": factors}, {})


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("method", "turn", "shared"), [(FFALoRA(), 0, "A"), (RoLoRA(), 0, "A"), (RoLoRA(), 1, "B")])
def test_the_reported_error_is_that_of_what_clients_hold_afterwards(
    method: Aggregator, turn: int, shared: str, ranks: tuple[int, ...]
) -> None:
    clients, weights, sent = mixed(ranks, shared=shared)
    update = aggregate(method, state(clients), weights, state(sent), method.receives(turn))
    kept = (update.factors["layer"].A, sent.A) if shared == "A" else (update.factors["layer"].B, sent.B)
    assert torch.equal(*kept)
    metrics = bias_metrics(state(clients), weights, update)
    assert metrics["error_after"] < 1e-7
    assert metrics["cosine_after"] == pytest.approx(1, abs=1e-12)
    assert metrics["error_before"] > 0.05


def test_ffa_lora_alone_gives_the_shared_a_and_no_mean_of_padding() -> None:
    clients, weights, sent = mixed((4, 2, 1), shared="A")
    torch.testing.assert_close(FFALoRA().combine(clients, weights).factors.A, sent.A)


@pytest.mark.parametrize("scale_b", [1.0, 1e-3])
@pytest.mark.parametrize("ranks", [*RANKS, (16, 8, 8, 4, 4, 4)])
@pytest.mark.parametrize("options", [{}, {"residual": "A"}, {"similarity": "frobenius"}], ids=str)
def test_lora_fair_leaves_no_larger_error_than_fedit(
    options: dict[str, str], ranks: tuple[int, ...], scale_b: float
) -> None:
    for seed in range(3):
        clients, weights, _ = mixed(ranks, seed=seed, scale_b=scale_b)
        ideal, mean = ideal_of(clients, weights, ranks), references.mean(clients, weights)
        found = LoRAFair(**options).combine(clients, weights).factors  # type: ignore[arg-type]
        assert error(product(found), ideal) <= error(product(mean), ideal) + 1e-12
        residue = ideal - product(found)
        assert (residue * product(found)).sum().abs() < 1e-9 * ideal.square().sum(), "as long as fits best"


def test_lora_fair_does_not_correct_where_that_would_turn_the_update_around() -> None:
    clients, _, _ = mixed((2, 2, 1))
    clients.A[1], clients.B[1] = -0.8 * clients.A[0], -1.2 * clients.B[0]
    weights = torch.tensor([0.5, 0.49, 0.01], dtype=torch.float64)
    mean = references.mean(clients, weights)
    assert (ideal_of(clients, weights, (2, 2, 1)) * product(mean)).sum() < 0
    torch.testing.assert_close(LoRAFair(regularization=1e6).combine(clients, weights).factors.B, mean.B)


def test_rescaling_can_be_refused_and_equal_ranks_are_left_as_they_were() -> None:
    clients, weights, _ = mixed((4, 2, 1))
    default, plain, asked = (LoRAFair(rescale=r).combine(clients, weights).factors.B for r in (None, False, True))
    torch.testing.assert_close(default, asked)
    assert error(plain, asked) > 0.01
    equal, weights = references.random_clients()
    default, plain = (LoRAFair(rescale=r).combine(equal, weights).factors.B for r in (None, False))
    assert torch.equal(default, plain)


@pytest.mark.parametrize("options", [{"residual": "both"}, {"similarity": "cosine_columns", "solver": "sgd"}], ids=str)
def test_free_corrections_are_rescaled_too(options: dict[str, str]) -> None:
    clients, weights, _ = mixed((3, 2, 1))
    default, asked = (LoRAFair(**options, rescale=r).combine(clients, weights).factors for r in (None, True))  # type: ignore[arg-type]
    torch.testing.assert_close(product(default), product(asked))


@pytest.mark.parametrize("ranks", [(2, 1, 2), (3, 2, 1)])
def test_alignment_stays_within_the_directions_that_a_client_has(ranks: tuple[int, ...]) -> None:
    """No client has all of the five: nothing of the update may go where it is not kept."""
    clients, weights, sent = mixed(ranks, rank=5)
    turned = aligned(clients, sent)
    torch.testing.assert_close(turned.B @ turned.A, clients.B @ clients.A)
    for k, own in enumerate(ranks):
        assert not turned.A[k, own:].any()
        assert not turned.B[k, :, own:].any()
    update = aggregate(LoRAFair(align=True, fold=True), state(clients), weights, state(sent))
    used = LoRAFactors(A=update.factors["layer"].A[: max(ranks)], B=update.factors["layer"].B[:, : max(ranks)])
    whole = product(used) + product(update.folded["layer"])
    torch.testing.assert_close(whole, ideal_of(clients, weights, ranks), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", RANKS)
def test_alignment_finds_the_best_turn_within_a_clients_directions(ranks: tuple[int, ...]) -> None:
    clients, _, sent = mixed(ranks)
    turned = aligned(clients, sent)
    balance = sent.A.square().sum() / sent.B.square().sum()

    def distance(A: Tensor, B: Tensor, own: int) -> Tensor:
        return (A[:own] - sent.A[:own]).square().sum() + balance * (B[:, :own] - sent.B[:, :own]).square().sum()

    generator = seeded(0, "turns")
    for k, own in enumerate(ranks):
        reached = distance(turned.A[k], turned.B[k], own)
        assert reached <= distance(clients.A[k], clients.B[k], own) + 1e-9
        for size in (1e-3, 0.1, 1.0):
            skew = size * torch.randn(own, own, generator=generator, dtype=torch.float64)
            Q = torch.linalg.matrix_exp(skew - skew.mT)
            assert distance(Q.mT @ turned.A[k, :own], turned.B[k, :, :own] @ Q, own) >= reached - 1e-9


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_folded_has_no_padding_and_is_charged_without(ranks: tuple[int, ...]) -> None:
    clients, weights, sent = mixed(ranks)
    ideal, mean = ideal_of(clients, weights, ranks), references.mean(clients, weights)
    layout = AdapterLayout.of({"layer": ((max(ranks), IN), (OUT, max(ranks)))}, {})
    stack = FLoRA().combine(clients, weights).folded
    residual = FedExLoRA().combine(clients, weights).folded
    assert stack is not None
    assert residual is not None
    torch.testing.assert_close(product(stack), ideal, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(product(residual), ideal - product(mean), rtol=1e-9, atol=1e-9)
    assert stack.rank == sum(ranks)
    assert residual.rank <= sum(ranks) - min(ranks)
    update = aggregate(FLoRA(), state(clients), weights, state(sent))
    traffic = round_traffic(layout, FLoRA(), update, 0, ranks)
    assert traffic.up == 4 * sum(ranks) * (OUT + IN)
    assert traffic.down == 4 * len(ranks) * sum(ranks) * (OUT + IN)


def test_many_clients_are_charged_the_matrix_and_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafair.aggregation.factor_algebra._CLIENT_NUMBERS", 100)
    clients, weights = references.random_clients(OUT, IN, 3, 40)
    update = aggregate(FLoRA(), state(clients), weights)
    assert is_identity(update.folded["layer"].B)
    layout = AdapterLayout.of({"layer": ((3, IN), (OUT, 3))}, {})
    assert round_traffic(layout, FLoRA(), update, 0, (3,) * 40).down == 4 * 40 * OUT * IN
    small = ServerUpdate(update.factors, {"layer": LoRAFactors(A=torch.ones(2, IN), B=torch.ones(OUT, 2))}, {}, {})
    assert round_traffic(layout, FLoRA(), small, 0, (3,)).down == 4 * 2 * (OUT + IN), "factors as they are"


@pytest.mark.parametrize("method", [FedIT(), RBLA(), HETLoRA(), LoRAFair(), FedExLoRA(fold_bits=4)], ids=str)
def test_directions_whose_clients_weigh_nothing_stay_as_they_were_sent(method: Aggregator) -> None:
    """As agnostic weights may be. From zeros they could never be trained again."""
    clients, _, sent = mixed((4, 2, 1))
    weights = torch.tensor([0.0, 0.75, 0.25], dtype=torch.float64)
    factors = aggregate(method, state(clients), weights, state(sent)).factors["layer"]
    if isinstance(method, HETLoRA):  # whose weights are others
        assert (factors.A[2:] != sent.A[2:]).all()
        return
    torch.testing.assert_close(factors.A[2:], sent.A[2:])
    torch.testing.assert_close(factors.B[:, 2:], sent.B[:, 2:])
    assert (factors.A[:2] != sent.A[:2]).all()


def test_raflora_leaves_out_ranges_of_clients_that_weigh_nothing() -> None:
    clients, _, sent = mixed((4, 2, 1))
    weights = torch.tensor([0.0, 0.75, 0.25], dtype=torch.float64)
    factors = aggregate(RaFLoRA(), state(clients), weights, state(sent)).factors["layer"]
    of_all = weights[1] * torch.outer(clients.B[1, :, 0], clients.A[1, 0])
    of_all += weights[2] * torch.outer(clients.B[2, :, 0], clients.A[2, 0])
    second = torch.outer(clients.B[1, :, 1], clients.A[1, 1])
    torch.testing.assert_close(product(factors), of_all + second)


def test_fedit_is_what_lora_fair_is_compared_with() -> None:
    """The numbers that mixed ranks were found wrong with: 0.6 left by the cosine, half of it by averaging."""
    ranks = (16, 8, 8, 4, 4, 4)
    clients, weights, _ = mixed(ranks, scale_b=1e-3)
    ideal = ideal_of(clients, weights, ranks)
    errors = [
        error(product(method.combine(clients, weights).factors), ideal)
        for method in (FedIT(), LoRAFair(rescale=False), LoRAFair())
    ]
    assert errors[1] > errors[0] > errors[2]

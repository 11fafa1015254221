"""The coded exact fold: against dense float64 arithmetic in numpy, and the bytes of its message."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lorafair.aggregation.base import AdapterState, Aggregator, aggregate, check_finite
from lorafair.aggregation.coded_fold import Coding, integers, rounded
from lorafair.aggregation.fedex_lora import FedExLoRA
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.registry import build_aggregator, method_of
from lorafair.config.loading import load_config
from lorafair.errors import ConfigError
from lorafair.model.adapter import LoRAFactors
from tests import references

OUT, IN, RANK, CLIENTS = 23, 19, 2, 4


def dense_q(matrix: np.ndarray[Any, Any], bits: int, axis: int) -> np.ndarray[Any, Any]:
    """Q of every column (axis 0) or row (axis 1), from the formula."""
    scale = np.abs(matrix).max(axis=axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return scale * np.round(matrix / scale)


def reference(
    clients: LoRAFactors, weights: torch.Tensor, start: LoRAFactors, rank: int, bits: int
) -> np.ndarray[Any, Any]:
    """F of the first `rank` triples of T − B'A', dense."""
    left = references.ideal_update(clients, weights).numpy() - start.B.numpy() @ start.A.numpy()
    U, S, Vt = np.linalg.svd(left)
    B, A = U[:, :rank] * np.sqrt(S[:rank]), np.sqrt(S[:rank])[:, None] * Vt[:rank]
    product: np.ndarray[Any, Any] = dense_q(B, bits, 0) @ dense_q(A, bits, 1)
    return product


def half(factors: LoRAFactors) -> LoRAFactors:
    return LoRAFactors(A=factors.A.half().double(), B=factors.B.half().double())


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("start_precision", ["float16", "float32"])
def test_fedex_lora_folds_what_the_formula_says(bits: int, rank: int, start_precision: str) -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, CLIENTS, seed=bits, scale_b=0.03)
    method = build_aggregator(
        {"name": "fedex_lora", "fold_bits": bits, "fold_rank": rank, "start_precision": start_precision}
    )
    update, start = method.combine(clients, weights), references.mean(clients, weights)
    start = half(start) if start_precision == "float16" else start
    torch.testing.assert_close(update.factors.A, start.A, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(update.factors.B, start.B, rtol=1e-12, atol=1e-15)
    assert update.folded is not None
    wanted = torch.from_numpy(reference(clients, weights, start, min(rank, (CLIENTS - 1) * RANK + 2 * RANK), bits))
    # A column's sign in the SVD is free and Q is odd; the scale is rounded to float32.
    torch.testing.assert_close(update.folded.B @ update.folded.A, wanted, rtol=1e-5, atol=1e-7 * float(wanted.norm()))


@pytest.mark.parametrize("residual", ["B", "A", "both"])
def test_lora_fair_folds_what_its_rounded_start_leaves(residual: str) -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, CLIENTS, scale_b=0.03)
    plain = build_aggregator({"name": "lora_fair", "residual": residual}).combine(clients, weights).factors
    method = build_aggregator(
        {"name": "lora_fair", "residual": residual, "fold": True, "fold_bits": 4, "fold_rank": 4 * RANK}
    )
    update = method.combine(clients, weights)
    torch.testing.assert_close(update.factors.B, half(plain).B, rtol=0, atol=0)
    torch.testing.assert_close(update.factors.A, half(plain).A, rtol=0, atol=0)
    wanted = torch.from_numpy(reference(clients, weights, half(plain), 4 * RANK, 4))
    assert update.folded is not None
    torch.testing.assert_close(update.folded.B @ update.folded.A, wanted, rtol=1e-5, atol=1e-7 * float(wanted.norm()))


@pytest.mark.parametrize("name", ["fedex_lora", "lora_fair"])
def test_with_all_ranks_and_many_bits_nothing_is_left(name: str) -> None:
    """And with four bits about a quarter of the residual; of one client, or of equal ones, what half precision leaves.

    The residual of LoRA-FAIR and of FedEx-LoRA is another one, because they start elsewhere.
    """
    fold = {} if name == "fedex_lora" else {"fold": True}
    clients, weights = references.random_clients(OUT, IN, RANK, CLIENTS, scale_b=0.03)
    one = LoRAFactors(A=clients.A[:1], B=clients.B[:1])
    equal = LoRAFactors(A=clients.A[:1].expand(CLIENTS, -1, -1), B=clients.B[:1].expand(CLIENTS, -1, -1))
    for given, own, most in ((clients, weights, 1e-4), (one, torch.ones(1), 1e-7), (equal, weights, 1e-7)):
        ideal, left = references.ideal_update(given, own), {}
        for bits in (4, 16):
            update = build_aggregator({"name": name, "fold_bits": bits, **fold}).combine(given, own)
            assert update.folded is not None
            what = ideal - update.factors.B @ update.factors.A
            left[bits] = (what - update.folded.B @ update.folded.A).norm() / what.norm()
            error = (what - update.folded.B @ update.folded.A).norm() / ideal.norm()
            if bits == 16:
                assert error < most
        assert left[16] < 1e-3 < 0.02 < left[4] < 0.4


@pytest.mark.parametrize("bits", [2, 4, 7, 16])
def test_rounded_factors_give_back_their_whole_numbers_exactly(bits: int) -> None:
    clients, _ = references.random_clients(OUT, IN, 8, 1, seed=bits)
    made = LoRAFactors(A=clients.A[0].clone(), B=clients.B[0] * torch.logspace(-30, 3, 8, dtype=torch.float64))
    made.B[:, 1], made.A[2] = 0, 1e-44  # a column of zeros, and one below what float32 holds well
    once = rounded(made, bits)
    twice = rounded(once, bits)
    assert torch.equal(once.A, twice.A)
    assert torch.equal(once.B, twice.B)
    numbers, scales = integers(once.B, bits, dim=0)
    assert scales.dtype == torch.float32
    assert torch.equal(numbers * scales.double(), once.B)
    largest = 2 ** (bits - 1) - 1
    assert numbers.abs().amax(0).tolist() == [largest, 0, *[largest] * 6]
    assert torch.equal(once.A[2], torch.zeros(IN, dtype=torch.float64))
    ok = [0, *range(2, 8)]
    assert ((once.B - made.B).abs() <= scales.double() * (0.5 + 1e-3))[:, ok].all()


def test_the_bytes_of_four_bits_and_four_times_the_rank_are_those_of_fedit_and_a_little() -> None:
    for outputs, inputs, rank in ((768, 768, 16), (768, 3072, 16), (384, 1536, 8)):
        down = 2 * rank * (outputs + inputs) + Coding(4, half_start=True).message_bytes(4 * rank, outputs, inputs)
        fedit = 4 * rank * (outputs + inputs)
        assert down == fedit + 32 * rank
        assert down < 1.006 * fedit
    assert Coding(3, half_start=False).message_bytes(5, 4, 3) == math.ceil(5 * 7 * 3 / 8) + 40


@pytest.mark.parametrize("name", ["fedex_lora", "lora_fair"])
def test_a_start_beyond_half_precision_stays_finite(name: str) -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, CLIENTS, scale_b=1e6)
    fold = {} if name == "fedex_lora" else {"fold": True}
    method = build_aggregator({"name": name, "fold_bits": 16, **fold})
    update = aggregate(method, AdapterState({"layer": clients}, {}), weights)
    check_finite(method, update)
    ideal = references.ideal_update(clients, weights)
    factors, folded = update.factors["layer"], update.folded["layer"]
    assert (ideal - factors.B.double() @ factors.A.double() - folded.B @ folded.A).norm() < 1e-3 * ideal.norm()


def test_folded_factors_of_float32_clients_keep_their_exact_numbers() -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, CLIENTS, dtype=torch.float32)
    folded = aggregate(FedExLoRA(fold_bits=4), AdapterState({"layer": clients}, {}), weights).folded["layer"]
    again = rounded(folded, 4)
    assert torch.equal(again.A, folded.A)
    assert torch.equal(again.B, folded.B)


def test_a_fold_without_bits_may_be_of_low_rank_too() -> None:
    clients, weights = references.random_clients(OUT, IN, RANK, CLIENTS)
    for method in (LoRAFair(fold=True, fold_rank=2), FedExLoRA(fold_rank=2), FedExLoRA(residual_rank=2)):
        update = method.combine(clients, weights)
        left = references.ideal_update(clients, weights) - update.factors.B @ update.factors.A
        assert update.folded is not None
        assert update.folded.rank == 2
        found = (left - update.folded.B @ update.folded.A).norm()
        torch.testing.assert_close(found, torch.linalg.svdvals(left)[2:].norm())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lora_fair", "fold_bits": 4}, "method.fold_bits=4 has no effect: it needs method.fold=true"),
        ({"name": "lora_fair", "fold_rank": 4}, "method.fold_rank=4 has no effect: it needs method.fold=true"),
        ({"name": "fedex_lora", "fold_bits": 1}, "method.fold_bits=1 is out of range: it must be from 2 to 16"),
        ({"name": "fedex_lora", "start_precision": "float16"}, "it needs method.fold_bits"),
        ({"name": "fedex_lora", "fold_bits": 4, "start_precision": "half"}, "possible: float16, float32"),
        ({"name": "fedex_lora", "fold_rank": 4, "residual_rank": 4}, "mean the same; give one of them"),
        ({"name": "fedit", "fold_bits": 4}, "it belongs to lora_fair, fedex_lora"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_aggregator(options)
    assert message in str(caught.value)


def test_a_server_optimizer_would_move_what_was_coded() -> None:
    pairs = ("method.name=fedex_lora", "method.fold_bits=4", "server.optimizer=fedavgm")
    with pytest.raises(ConfigError, match=r"server\.optimizer=fedavgm does not fit method\.fold_bits"):
        method_of(load_config(*pairs))
    built: Aggregator = method_of(load_config(*pairs[:2]))
    assert built.coding == Coding(4, half_start=True)

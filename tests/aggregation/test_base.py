"""The server step as a whole: every method's contract, the reported bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lorafair.aggregation import factor_algebra
from lorafair.aggregation.base import Aggregator, LayerUpdate, ServerUpdate, aggregate
from lorafair.aggregation.bias import bias_metrics
from lorafair.aggregation.fedit import FedIT
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.references import Centralized, LocalOnly
from lorafair.aggregation.registry import build_aggregator
from lorafair.aggregation.solvers import directions
from lorafair.model.adapter import PARTS, AdapterState, LoRAFactors, row
from lorafair.registry import METHODS
from tests import references
from tests.references import OperationLog
from tests.torch_private import FakeTensorMode

IN_FACTOR_SPACE = {
    "fedit": FedIT(),
    "cosine": LoRAFair(),
    "cosine A": LoRAFair(residual="A"),
    "frobenius": LoRAFair(similarity="frobenius"),
    "frobenius A rescaled": LoRAFair(similarity="frobenius", residual="A", rescale=True),
    "cosine_columns A": LoRAFair(similarity="cosine_columns", residual="A"),
}
READS_A_VALUE = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2"}


def two_layers(dtype: torch.dtype = torch.float64) -> tuple[AdapterState, torch.Tensor]:
    """Two layers of different shapes and ranks, and a head; 4 clients."""
    first, weights = references.random_clients(7, 6, 3, dtype=dtype)
    second, _ = references.random_clients(5, 9, 2, dtype=dtype)
    head = {"head.weight": torch.arange(24.0, dtype=dtype).view(4, 2, 3), "head.scale": torch.arange(4.0, dtype=dtype)}
    return AdapterState(factors={"first": first, "second": second}, head=head), weights


def test_fedit_averages_the_factors_and_every_method_the_head() -> None:
    clients, weights = two_layers()
    update = aggregate(FedIT(), clients, weights)
    for path, factors in clients.factors.items():
        mean = references.mean(factors, weights)
        torch.testing.assert_close(update.factors[path].A, mean.A)
        torch.testing.assert_close(update.factors[path].B, mean.B)
    torch.testing.assert_close(
        update.head["head.weight"], (weights[:, None, None] * clients.head["head.weight"]).sum(0)
    )
    torch.testing.assert_close(update.head["head.scale"], weights @ clients.head["head.scale"])
    assert update.folded == {}


SHIPPED = {name: METHODS[name] for name in METHODS.names}
GO_ON = [name for name, m in SHIPPED.items() if m.mixed_lora_ranks and not (m.restarts or m.decomposes)]


@pytest.mark.parametrize("name", GO_ON)
def test_directions_that_no_client_of_the_round_has_stay_as_they_were_sent(name: str) -> None:
    """From a zero row of A and a zero column of B no later round could train them again."""
    sent = row(two_layers()[0], 0)
    clients, weights = two_layers()
    for factors in clients.factors.values():
        factors.A[:, 1:] = 0
        factors.B[:, :, 1:] = 0
    update = aggregate(SHIPPED[name](), clients, weights, sent)
    for path, start in sent.factors.items():
        found = update.factors[path]
        assert torch.equal(found.A[1:], start.A[1:])
        assert torch.equal(found.B[:, 1:], start.B[:, 1:])
        assert not torch.equal(found.A[0], start.A[0])


def test_centralized_returns_its_only_client() -> None:
    factors, _ = references.random_clients(clients=1)
    update = aggregate(Centralized(), AdapterState({"layer": factors}, {}), torch.ones(1))
    assert torch.equal(update.factors["layer"].A, factors.A[0])
    assert torch.equal(update.factors["layer"].B, factors.B[0])
    assert Centralized.pools_data


def test_local_only_leaves_everything_with_the_clients() -> None:
    clients, weights = two_layers(torch.float32)
    method = LocalOnly()
    assert method.personal_parts == PARTS
    assert method.sends(0) == method.receives(0) == ()
    update = aggregate(method, clients, weights)  # of all clients, sent to none
    torch.testing.assert_close(update.factors["first"].B, aggregate(FedIT(), clients, weights).factors["first"].B)


def test_folded_factors_are_passed_on_in_the_clients_precision() -> None:
    class Folding(FedIT):
        @property
        def folds(self) -> bool:
            return True

        def combine(self, clients: LoRAFactors, weights: torch.Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
            return dataclasses.replace(
                super().combine(clients, weights), folded=LoRAFactors(clients.A[0], clients.B[0])
            )

    clients, weights = two_layers(torch.float32)
    update = aggregate(Folding(), clients, weights)
    assert set(update.folded) == {"first", "second"}
    assert update.folded["first"].A.dtype == torch.float32


@pytest.mark.parametrize("aggregator", IN_FACTOR_SPACE.values(), ids=IN_FACTOR_SPACE.keys())
def test_order_of_clients_does_not_matter(aggregator: Aggregator) -> None:
    clients, weights = two_layers()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = AdapterState(
        factors={path: LoRAFactors(A=f.A[order], B=f.B[order]) for path, f in clients.factors.items()},
        head={name: tensor[order] for name, tensor in clients.head.items()},
    )
    expected, update = aggregate(aggregator, clients, weights), aggregate(aggregator, shuffled, weights[order])
    for path in clients.factors:
        torch.testing.assert_close(update.factors[path].A, expected.factors[path].A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(update.factors[path].B, expected.factors[path].B, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregator", IN_FACTOR_SPACE.values(), ids=IN_FACTOR_SPACE.keys())
def test_layers_together_are_the_layers_one_by_one(aggregator: Aggregator) -> None:
    clients, weights = two_layers()
    together = aggregate(aggregator, clients, weights)
    for path, factors in clients.factors.items():
        alone = aggregator.combine(factors, weights).factors
        torch.testing.assert_close(together.factors[path].A, alone.A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.factors[path].B, alone.B, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregator", IN_FACTOR_SPACE.values(), ids=IN_FACTOR_SPACE.keys())
def test_float32_clients_get_the_float64_answer_rounded(aggregator: Aggregator) -> None:
    clients, weights = two_layers(torch.float32)
    exact = AdapterState(
        factors={path: factors.to(torch.float64) for path, factors in clients.factors.items()},
        head={name: tensor.double() for name, tensor in clients.head.items()},
    )
    update, expected = aggregate(aggregator, clients, weights), aggregate(aggregator, exact, weights)
    for path in clients.factors:
        assert update.factors[path].B.dtype == torch.float32
        torch.testing.assert_close(update.factors[path].A.double(), expected.factors[path].A, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(update.factors[path].B.double(), expected.factors[path].B, rtol=1e-6, atol=1e-6)
    assert update.head["head.weight"].dtype == torch.float32


@contextmanager
def elsewhere(device: str) -> Iterator[None]:
    """Tensors of "meta" hold no values; those of "cuda" are pretended, so no GPU is needed."""
    if device == "meta":
        yield
    else:
        with FakeTensorMode():
            yield


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("name", ["fedit", "cosine", "frobenius A rescaled"])
def test_nothing_leaves_the_device_or_depends_on_values(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch is built without CUDA this also fails for t[...], which only then needs a driver: use methods."""
    monkeypatch.setattr(directions, "_CUT_STEPS", (6, 3))  # the solver's loops are long, and every turn is the same
    with elsewhere(device):
        layers = {
            "first": LoRAFactors(A=torch.empty(4, 3, 6, device=device), B=torch.empty(4, 7, 3, device=device)),
            "second": LoRAFactors(A=torch.empty(4, 2, 9, device=device), B=torch.empty(4, 5, 2, device=device)),
        }
        clients = AdapterState(layers, {"head.weight": torch.empty(4, 2, 3, device=device)})
        weights = torch.empty(4, device=device)
        with OperationLog() as log:
            update = aggregate(IN_FACTOR_SPACE[name], clients, weights)
            metrics = bias_metrics(clients, weights, update)
    assert log.devices == {device}
    assert {tensor.device.type for tensor in metrics.values()} == {device}
    assert update.factors["first"].B.shape == (7, 3)


@pytest.mark.parametrize("aggregator", IN_FACTOR_SPACE.values(), ids=IN_FACTOR_SPACE.keys())
def test_no_operation_waits_for_a_value(aggregator: Aggregator) -> None:
    clients, weights = two_layers()
    with OperationLog() as log:
        bias_metrics(clients, weights, aggregate(aggregator, clients, weights))
    assert not log.names & READS_A_VALUE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedit", "cosine", "frobenius A rescaled"])
def test_layer_of_forty_billion_entries_needs_no_more_than_its_factors(name: str) -> None:
    factors, weights = references.random_clients(200_000, 200_000, 4, 3, dtype=torch.float32)
    clients = AdapterState({"layer": factors}, {})
    with OperationLog() as log:
        update = aggregate(IN_FACTOR_SPACE[name], clients, weights)
        metrics = bias_metrics(clients, weights, update)
    assert log.largest <= factors.A.numel() + 2 * 4 * 200_000
    assert metrics["error_after"] <= metrics["error_before"] + 1e-6


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("options", [{}, {"align": True, "fold": True, "residual": "both", "rescale": True}], ids=str)
def test_clients_in_blocks_are_the_clients_at_once(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if options and name != "lora_fair":
        pytest.skip("options of lora_fair")
    layers = {f"{o}x{i}": references.random_clients(o, i, 3, 20)[0] for o, i in ((7, 9), (9, 7))}
    weights = references.random_clients(clients=20)[1]
    for factors in layers.values() if SHIPPED[name].mixed_lora_ranks else ():
        factors.A[::3, 2:] = 0
        factors.B[::3, :, 2:] = 0
    clients = AdapterState(layers, {"head": torch.arange(60.0).view(20, 3)})
    start, method = row(clients, 1), build_aggregator({"name": name, **options})
    expected = aggregate(method, clients, weights, start)
    metrics = bias_metrics(clients, weights, expected)
    for numbers in (1, 200):
        monkeypatch.setattr(factor_algebra, "_CLIENT_NUMBERS", numbers)
        found = aggregate(method, clients, weights, start)
        torch.testing.assert_close(found.head, expected.head)
        assert found.folded.keys() == expected.folded.keys()
        for path in layers:
            for one, other in ((found.factors, expected.factors), (found.folded, expected.folded)):
                if path in other:
                    product = other[path].B @ other[path].A
                    torch.testing.assert_close(one[path].B @ one[path].A, product, rtol=1e-9, atol=1e-9)
            assert path not in found.folded or found.folded[path].rank <= 7 + 2 * 3
        for metric, values in bias_metrics(clients, weights, found).items():
            torch.testing.assert_close(values, metrics[metric], rtol=1e-7, atol=1e-7)


def test_metrics_are_those_of_the_dense_matrices() -> None:
    clients, weights = two_layers()
    update = aggregate(LoRAFair(regularization=1e-3), clients, weights)
    metrics = bias_metrics(clients, weights, update)
    for index, (path, factors) in enumerate(clients.factors.items()):
        ideal, mean, new = (
            references.ideal_update(factors, weights),
            references.mean(factors, weights),
            update.factors[path],
        )
        expected = {
            "error_before": (ideal - mean.B @ mean.A).norm() / ideal.norm(),
            "error_after": (ideal - new.B @ new.A).norm() / ideal.norm(),
            "cosine_before": references.cosine(ideal.flatten(), (mean.B @ mean.A).flatten()),
            "cosine_after": references.cosine(ideal.flatten(), (new.B @ new.A).flatten()),
            "norm_ratio": new.B.norm() / mean.B.norm(),
            "correction_ratio": (new.B - mean.B).norm() / mean.B.norm(),
        }
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name][index], value, rtol=1e-9, atol=1e-12)


def test_metrics_count_what_is_folded_into_the_weights() -> None:
    factors, weights = references.random_clients()
    clients, mean = AdapterState({"layer": factors}, {}), references.mean(factors, weights)
    left, size, right = torch.linalg.svd(references.ideal_update(factors, weights) - mean.B @ mean.A)
    residual = LoRAFactors(A=size[:, None] * right, B=left[:, : len(size)])
    update = ServerUpdate(factors={"layer": mean}, folded={"layer": residual}, head={}, sent_lora_rank={})
    metrics = bias_metrics(clients, weights, update)
    assert metrics["error_after"] < 1e-7
    assert metrics["cosine_after"] == pytest.approx(1)
    assert metrics["error_before"] > 0.01


@pytest.mark.parametrize("seed", range(8))
def test_a_bias_that_is_nothing_but_rounding_is_reported_as_none(seed: int) -> None:
    """All clients share A, as in FFA-LoRA: squares that cancel may come out below zero."""
    factors, weights = references.random_clients(60, 50, 4, 5, seed=seed, dtype=torch.float32)
    shared = LoRAFactors(A=factors.A[:1].expand_as(factors.A).contiguous(), B=factors.B)
    clients = AdapterState({"layer": shared}, {})
    metrics = bias_metrics(clients, weights, aggregate(FedIT(), clients, weights))
    for name in ("error_before", "error_after"):
        assert 0 <= metrics[name] < 3e-4, name


@pytest.mark.parametrize("empty", ["B", "A", "B̄"])
def test_metrics_are_zero_where_there_is_nothing_to_divide_by(empty: str) -> None:
    factors, _ = references.random_clients(clients=2)
    if empty == "B̄":
        factors = LoRAFactors(A=factors.A, B=torch.stack([factors.B[0], -factors.B[0]]))
    else:
        factors = dataclasses.replace(factors, **{empty: torch.zeros_like(getattr(factors, empty))})
    clients, weights = AdapterState({"layer": factors}, {}), torch.tensor([0.5, 0.5])
    metrics = bias_metrics(clients, weights, aggregate(FedIT(), clients, weights))
    assert all(bool(value.isfinite().all()) for value in metrics.values())
    assert metrics["cosine_before"] == 0
    assert metrics["norm_ratio"] == (1 if empty == "A" else 0)
    assert metrics["error_before"] == (1 if empty == "B̄" else 0)

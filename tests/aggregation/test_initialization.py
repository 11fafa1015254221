"""Factors of the first round that are made of the frozen weight, and methods that go back to them.

Letters: R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorafair.aggregation.base import Aggregator, InitialLayer, LayerUpdate, try_out
from lorafair.aggregation.fedit import FedIT
from lorafair.aggregation.flora import FLoRA
from lorafair.aggregation.frlora import FRLoRA
from lorafair.aggregation.initialization import initial_update, is_drawn, orthonormal_factors, principal_factors
from lorafair.aggregation.registry import method_of
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, LorafairError
from lorafair.model.adapter import AdapterLayout, AdapterState, CoreShape, LoRAFactors
from lorafair.model.lora import ClientHead, add_lora
from lorafair.model.parameters import AdapterParameters
from lorafair.server.step import _fold_and_reset

Tiny = Callable[..., Config]
SCALING = 2.0  # alpha / rank


def weight_of(outputs: int, inputs: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).standard_normal((outputs, inputs))).float()


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(12, 7, 3), (7, 12, 3), (6, 6, 6)])
def test_pissa_is_the_truncated_svd_shared_out_to_both_factors(outputs: int, inputs: int, rank: int) -> None:
    weight = weight_of(outputs, inputs)
    U, values, Vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    factors = principal_factors(weight, rank, SCALING)
    best = torch.from_numpy((U[:, :rank] * values[:rank]) @ Vt[:rank])
    torch.testing.assert_close(SCALING * factors.B @ factors.A, best)
    squares = torch.diag(torch.from_numpy(values[:rank])) / SCALING
    torch.testing.assert_close(factors.A @ factors.A.mT, squares)
    torch.testing.assert_close(factors.B.mT @ factors.B, squares)


def test_pissa_of_a_weight_of_lower_rank_has_zeros_and_no_nan() -> None:
    factors = principal_factors(torch.ones(5, 4), 3, SCALING)
    torch.testing.assert_close(SCALING * factors.B @ factors.A, torch.ones(5, 4, dtype=torch.float64))


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(12, 7, 3), (7, 12, 3)])
def test_olora_is_the_beginning_of_the_qr_decomposition(outputs: int, inputs: int, rank: int) -> None:
    weight = weight_of(outputs, inputs)
    Q, upper = np.linalg.qr(weight.double().numpy())
    factors = orthonormal_factors(weight, rank, SCALING)
    torch.testing.assert_close(factors.B @ factors.A, torch.from_numpy(Q[:, :rank] @ upper[:rank]))
    torch.testing.assert_close(factors.B.mT @ factors.B, torch.eye(rank, dtype=torch.float64))


def adapted() -> tuple[nn.Sequential, AdapterParameters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 6), ClientHead(6, 4))
    add_lora(model, ["0", "2"], lora_rank=3, alpha=3 * SCALING, dropout=0.0, last_blocks=None)
    return model, AdapterParameters(model)


@pytest.mark.parametrize(("kind", "method"), [("pissa", FedIT()), ("olora", FedIT()), (None, FRLoRA())])
def test_the_model_is_as_it_was_before_training(kind: str | None, method: Aggregator) -> None:
    model, adapters = adapted()
    drawn = adapters.draw(0, 0)
    adapters.write(drawn)
    images = torch.randn(5, 7)
    before, frozen = model(images), {path: w.clone() for path, w in adapters.base_weights().items()}
    update = initial_update(
        method, kind, adapters.layout.unpack(drawn), adapters.base_weights(), scaling=SCALING, seed=0
    )
    adapters.fold_into_base(update.folded)
    adapters.write(adapters.layout.pack(AdapterState(update.factors, update.head)))
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-6)
    for path, weight in adapters.base_weights().items():
        product = update.factors[path].B @ update.factors[path].A
        assert product.norm() > 0.1
        torch.testing.assert_close(weight, frozen[path] - SCALING * product)


def test_frlora_folds_the_change_since_the_first_round_and_starts_there_again() -> None:
    _, adapters = adapted()
    layout, generator = adapters.layout, torch.Generator().manual_seed(1)
    initial, received = (torch.randn(layout.length, generator=generator) for _ in range(2))
    frozen = {path: w.double().clone() for path, w in adapters.base_weights().items()}
    state: Any = SimpleNamespace(
        adapter=received, initial_factors=layout.select(initial, ("A", "B")).clone(), folded=False
    )
    _fold_and_reset(adapters, state)
    for path, weight in adapters.base_weights().items():
        new, old = layout.unpack(received).factors[path], layout.unpack(initial).factors[path]
        change = new.B.double() @ new.A.double() - old.B.double() @ old.A.double()
        torch.testing.assert_close(weight.double(), frozen[path] + SCALING * change, rtol=1e-5, atol=1e-5)
    assert torch.equal(layout.select(state.adapter, ("A", "B")), layout.select(initial, ("A", "B")))
    assert torch.equal(layout.select(state.adapter, ("head",)), layout.select(received, ("head",)))
    assert state.folded


@dataclass(frozen=True)
class Halved(FedIT):
    """A method that makes its own initial factors."""

    def initialize(self, layer: InitialLayer) -> LayerUpdate:
        half = LoRAFactors(A=-layer.weight, B=torch.eye(9) / 2)
        return LayerUpdate(LoRAFactors(A=layer.weight[:3], B=layer.drawn.B + 1), folded=half)


def test_a_method_may_make_its_initial_factors_of_the_frozen_weight() -> None:
    assert is_drawn(FedIT(), None)
    assert is_drawn(FRLoRA(), "kaiming")
    assert not is_drawn(Halved(), None)
    drawn = AdapterState({"layer": LoRAFactors(A=torch.zeros(3, 7), B=torch.zeros(9, 3))}, {})
    weight = weight_of(9, 7)
    update = initial_update(Halved(), None, drawn, {"layer": weight}, scaling=SCALING, seed=0)
    assert torch.equal(update.factors["layer"].A, weight[:3])
    torch.testing.assert_close(update.folded["layer"].B @ update.folded["layer"].A, -weight / 2)
    with pytest.raises(LorafairError, match=r"method Halved: initialize of layer layer returned factors A \(3, 8\)"):
        initial_update(Halved(), None, drawn, {"layer": weight_of(9, 8)}, scaling=SCALING, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.name=flora", "model.lora.initialization=pissa"], "does not fit method.name=flora; possible: kaiming"),
        (["model.lora.initialization=olora", "federation.initialization=fresh"], "which draws factors every round"),
        (["model.lora.initialization=pissa", "model.lora.client_ranks=[4,2,1]"], "needs clients of the same LoRA rank"),
        (
            ["method.name=het_lora", "method.pruning=0.9", "model.lora.initialization=pissa"],
            r"leave method\.pruning out",
        ),
        (["method.name=florist", "model.lora.initialization=pissa"], r"does not fit method\.name=florist"),
        (["method.name=frlora", "model.lora.client_ranks=[4,2,1]"], "needs the same LoRA rank everywhere"),
        (
            ["method.name=frlora", "federation.initialization=local"],
            "does not fit method.name=frlora; possible: average",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tiny: Tiny, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of(tiny(*options))


def test_a_method_that_restarts_is_left_with_drawn_factors(tiny: Tiny) -> None:
    assert isinstance(method_of(tiny("method.name=flora", "model.lora.initialization=kaiming")), FLoRA)


def test_a_mistake_in_a_method_of_a_plug_in_is_named() -> None:
    @dataclass(frozen=True)
    class Broken(FedIT):
        core = CoreShape(heads=1)

        def initialize(self, layer: InitialLayer) -> LayerUpdate:
            raise KeyError("nothing")

        def combine_core(self, cores: Tensor, weights: Tensor) -> Tensor:
            return cores

    drawn = AdapterState({"layer": LoRAFactors(A=torch.zeros(3, 7), B=torch.zeros(9, 3))}, {})
    with pytest.raises(LorafairError, match="method Broken: initialize of layer layer failed: KeyError"):
        initial_update(Broken(), None, drawn, {"layer": weight_of(9, 7)}, scaling=SCALING, seed=0)
    layout = AdapterLayout.of({"layer": ((3, 7), (9, 3))}, {}, CoreShape(heads=1))
    with pytest.raises(LorafairError, match=r"method Broken: combine_core returned \(2, 1, 3, 3\); it must be"):
        try_out(Broken(), layout)

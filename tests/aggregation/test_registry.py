"""From options to methods: the shipped ones, those of plug-ins, and mistakes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import mean_factors
from lorafair.aggregation.fedit import FedIT
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.registry import build_aggregator, method_of, register_method
from lorafair.config.describe import describe_options
from lorafair.config.loading import load_config
from lorafair.config.options import option, when
from lorafair.errors import ConfigError
from lorafair.model.adapter import LoRAFactors
from lorafair.registry import METHODS
from tests import references


def test_options_become_the_fields_of_the_method() -> None:
    assert build_aggregator({"name": "fedit"}) == FedIT()
    options = {"name": "lora_fair", "residual": "both", "regularization": 1, "solver": "sgd", "sgd_steps": 5}
    expected = LoRAFair(residual="both", regularization=1.0, solver="sgd", sgd_steps=5, sgd_learning_rate=0.01)
    assert build_aggregator(options) == expected


@pytest.mark.parametrize("name", METHODS.names)
def test_every_method_is_built_from_its_name_and_explains_its_options(name: str) -> None:
    method = build_aggregator({"name": name})
    assert isinstance(method, METHODS[name])
    described = {about.key: about.help for about in describe_options(type(method))}
    assert described.keys() == {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    assert all(described.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method.name=None is unknown; methods: fedit, lora_fair"),
        ({"name": "lorafair"}, "method.name=lorafair is unknown; did you mean lora_fair?"),
        ({"name": "LoRA-FAIR"}, "method.name=LoRA-FAIR is unknown; did you mean lora_fair?"),
        ({"name": "fedavg"}, "method.name=fedavg is unknown; did you mean fedit?"),
        ({"name": ["fedit"]}, "is unknown"),
        (
            {"name": "lora_fair", "residul": "A"},
            "method.residul is no option of lora_fair; did you mean method.residual?",
        ),
        ({"name": "fedit", "residual": "A"}, "method.residual is no option of fedit; it belongs to lora_fair"),
        ({"name": "lora_fair", "residual": "C"}, "method.residual=C is not possible; possible: B, A, both"),
        ({"name": "lora_fair", "rescale": "often"}, "method.rescale=often must be true or false"),
        ({"name": "lora_fair", "regularization": "much"}, "method.regularization: Value 'much'"),
        (
            {"name": "lora_fair", "regularization": -1},
            "method.regularization=-1.0 is out of range: it must be at least 0",
        ),
        ({"name": "lora_fair", "regularization": float("nan")}, "method.regularization=nan is out of range"),
        ({"name": "lora_fair", "sgd_steps": 5}, "method.sgd_steps=5 has no effect: it needs method.solver=sgd"),
        ({"name": "lora_fair", "solver": "sgd", "sgd_steps": 0}, "method.sgd_steps=0 is out of range"),
        (
            {"name": "lora_fair", "solver": "sgd", "sgd_learning_rate": 0},
            "method.sgd_learning_rate=0.0 is out of range",
        ),
        ({"name": "fedex_lora", "residual_rank": 0}, "method.residual_rank=0 is out of range"),
        ({"name": "florist", "energy": 1.5}, "method.energy=1.5 is out of range"),
        ({"name": "fedrot_lora", "strength": -1}, "method.strength=-1.0 is out of range"),
        ({"name": "fedrpca", "amplification": -1}, "method.amplification=-1.0 is out of range"),
        ({"name": "fedrpca", "iterations": 0}, "method.iterations=0 is out of range"),
    ],
)
def test_wrong_options_are_named_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_aggregator(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Methods of plug-ins


@pytest.fixture(autouse=True)
def only_shipped_methods() -> Iterator[None]:
    """Take back what a test has registered."""
    before = set(METHODS.names)
    yield
    for name in set(METHODS.names) - before:
        METHODS.remove(name)


def define_shrunk(name: str = "shrunk") -> type[Aggregator]:
    """Define and register a method, as a cell of a notebook does each time it is run."""

    @register_method(name)
    @dataclass(frozen=True)
    class Shrunk(Aggregator):
        """The mean of the factors, with a smaller B."""

        factor: float = option(0.5, "What B̄ is multiplied with.", above=0, at_most=1)
        how: Literal["once", "repeated"] = option("once", "How B̄ is multiplied.")
        times: int | None = option(
            None, "How often.", at_least=2, requires=when("method.how", "repeated"), conditional_default=3
        )
        start: Literal["mean", "zero"] | None = option(None, "Where the rest of B comes from.")
        offset: float = 0.0

        def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
            mean = mean_factors(clients, weights)
            return LayerUpdate(LoRAFactors(A=mean.A, B=self.factor ** (self.times or 1) * mean.B + self.offset))

    return Shrunk


@pytest.mark.parametrize(
    ("options", "factor", "offset"),
    [
        ({}, 0.5, 0),
        ({"factor": 1, "offset": 2}, 1, 2),
        ({"how": "repeated"}, 0.125, 0),
        ({"how": "repeated", "times": 2}, 0.25, 0),
        ({"start": None}, 0.5, 0),
    ],
)
def test_a_registered_class_is_a_method_and_its_fields_are_its_options(
    options: dict[str, Any], factor: float, offset: float
) -> None:
    define_shrunk()
    method = build_aggregator({"name": "shrunk", **options})
    clients, weights = references.random_clients()
    expected = factor * references.mean(clients, weights).B + offset
    torch.testing.assert_close(method.combine(clients, weights).factors.B, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "method.factor=0.0 is out of range: it must be above 0 and at most 1"),
        ({"factor": 1.5}, "method.factor=1.5 is out of range"),
        ({"how": "twice"}, "method.how=twice is not possible; possible: once, repeated"),
        ({"times": 4}, "method.times=4 has no effect: it needs method.how=repeated"),
        ({"how": "repeated", "times": 1}, "method.times=1 is out of range: it must be at least 2"),
        ({"start": "one"}, "method.start=one is not possible; possible: mean, zero"),
        ({"how": None}, "method.how: "),
        (
            {"ofset": 1},
            "method.ofset is no option of shrunk; did you mean method.offset? options of shrunk: factor, how,",
        ),
        ({"residual": "A"}, "method.residual is no option of shrunk; it belongs to lora_fair"),
    ],
)
def test_wrong_options_of_a_registered_method_are_named(options: dict[str, Any], message: str) -> None:
    define_shrunk()
    with pytest.raises(ConfigError) as caught:
        build_aggregator({"name": "shrunk", **options})
    assert message in str(caught.value)


def test_a_registered_method_is_among_those_that_are_possible() -> None:
    define_shrunk()
    assert METHODS.is_from_plugin("shrunk")
    with pytest.raises(ConfigError, match=r"method\.name=shrnk is unknown; did you mean shrunk\? methods: .*, shrunk$"):
        build_aggregator({"name": "shrnk"})


def test_a_class_without_combine_is_no_method() -> None:
    @dataclass(frozen=True)
    class Lacking(Aggregator):
        strength: float = 1.0

    with pytest.raises(TypeError, match=r"abstract method '?combine"):
        Lacking()  # type: ignore[abstract]
    with pytest.raises(ConfigError, match=r"method lacking: .*Lacking.* must extend .*Aggregator and have `combine`"):
        register_method("lacking")(Lacking)
    with pytest.raises(ConfigError, match=r"method other: .* must extend .*Aggregator"):
        register_method("other")(dict)  # type: ignore[type-var]
    assert not {"lacking", "other"} & set(METHODS.names)


def test_a_class_that_is_no_dataclass_is_refused() -> None:
    class Plain(Aggregator):
        def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
            return LayerUpdate(mean_factors(clients, weights))

    with pytest.raises(ConfigError, match=r"method plain: Plain must be a dataclass: @dataclass\(frozen=True\)"):
        register_method("plain")(Plain)

    class Extended(FedIT):
        strength: float = 1.0  # no option, as @dataclass is missing

    with pytest.raises(ConfigError, match=r"method plain: Extended must be a dataclass: @dataclass\(frozen=True\)"):
        register_method("plain")(Extended)
    assert "plain" not in METHODS.names


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"there is a method fedit already, of lorafair; register yours under another"
    ):
        define_shrunk("fedit")
    first = define_shrunk()

    @dataclass(frozen=True)
    class Other(FedIT):
        pass

    with pytest.raises(ConfigError, match=r"there is a method shrunk already, .*Shrunk in .*test_registry\.py"):
        register_method("shrunk")(Other)
    assert METHODS["shrunk"] is first


def test_the_same_definition_may_come_again_and_the_last_one_counts() -> None:
    define_shrunk()
    again = define_shrunk()
    assert type(build_aggregator({"name": "shrunk"})) is again


@pytest.mark.parametrize("name", ["", "my method", "a.b"])
def test_a_name_that_could_not_be_typed_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a method: letters, digits, _ and -"):
        define_shrunk(name)


def test_a_method_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match=r"^method\.regularization=-1 is out of range: it must be at least 0$"):
        LoRAFair(regularization=-1)
    with pytest.raises(ConfigError, match=r"^method\.sgd_steps=5 has no effect: it needs method\.solver=sgd$"):
        LoRAFair(sgd_steps=5)


def test_a_descent_that_looks_at_all_layers_does_not_fit_a_sharded_server() -> None:
    pairs = ["method.solver=sgd", "method.sgd_patience=5", "fabric.server=sharded"]
    with pytest.raises(ConfigError, match=r"fabric\.server=sharded does not fit .*method\.sgd_patience.*rank0"):
        method_of(load_config(*pairs))
    assert method_of(load_config(*pairs[:2])).needs_all_layers


@pytest.mark.parametrize("pair", ["method.sgd_start=xavier", "method.sgd_patience=5"])
def test_options_of_the_descent_mean_nothing_to_the_exact_solver(pair: str) -> None:
    with pytest.raises(ConfigError, match=r"has no effect: it needs method\.solver=sgd"):
        method_of(load_config(pair))

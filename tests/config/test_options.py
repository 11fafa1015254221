"""What is declared about the options, once for each, and how it is shown."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

import pytest

from lorafair import registry
from lorafair.config.describe import describe_options, groups, options_text
from lorafair.config.loading import load_config
from lorafair.config.options import When, all_options, choices_of, option, option_of, types_of, when, when_not_given
from lorafair.config.schema import Config
from lorafair.errors import ConfigError

OPTIONS = dict(all_options(Config))
CONDITIONAL = {
    key: requires for key, declared in OPTIONS.items() if (requires := option_of(declared).requires) is not None
}


def choices(key: str) -> tuple[Any, ...]:
    """What an option may be: the values of its type, or the names of its registry."""
    if names := option_of(OPTIONS[key]).names:
        return tuple(registry.REGISTRIES[names].names)
    owner: Any = Config
    *parents, name = key.split(".")
    for parent in parents:
        owner = types_of(owner)[parent]
    return choices_of(owner, name)


def test_every_option_is_explained() -> None:
    described = {d.key: d for d in describe_options()}
    assert described.keys() == OPTIONS.keys()
    assert [d.key for d in described.values() if len(d.help) < 10 or not d.help.endswith(".")] == []
    assert [d.key for d in described.values() if not d.kind] == []


def test_every_value_that_is_declared_is_in_its_range() -> None:
    for key, declared in OPTIONS.items():
        assert option_of(declared).is_in_range(declared.default), key
        if not callable(option_of(declared).conditional_default):
            assert option_of(declared).is_in_range(option_of(declared).conditional_default), key


@pytest.mark.parametrize("key", CONDITIONAL)
def test_a_conditional_option_is_unset_and_needs_a_choice_that_there_is(key: str) -> None:
    needs = CONDITIONAL[key]
    assert OPTIONS[key].default is None, "without the choice it must stay unset"
    assert needs.key in OPTIONS
    assert set(needs.values) <= set(choices(needs.key))


def test_every_name_belongs_to_a_registry_and_every_other_spelling_to_a_value() -> None:
    spelled = set()
    for key, declared in OPTIONS.items():
        assert option_of(declared).names in ("", *registry.REGISTRIES)
        for meant in option_of(declared).spellings.values():
            assert meant is None or meant in choices(key)
            spelled.add(key)
    assert spelled == {"fabric.accelerator", "fabric.devices", "fabric.precision"}


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("accelerator=gpu", "cuda"),
        ("accelerator=cuda", "cuda"),
        ("devices=auto", None),
        ("devices=-1", None),
        ("devices=2", 2),
        ("precision=bf16", "bf16-mixed"),
        ("precision=bf16-true", "bf16-true"),
        ("precision=16", "16-mixed"),
        ("precision=32", "32-true"),
        ("precision='16'", "16-mixed"),
    ],
)
def test_the_spellings_of_lightning_are_understood(pair: str, value: object) -> None:
    assert getattr(load_config(f"fabric.{pair}").fabric, pair.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("declared", "text", "inside", "outside"),
    [
        ({"at_least": 1}, "at least 1", [1, 7], [0, -1]),
        ({"above": 0}, "above 0", [0.1], [0, float("inf"), float("nan")]),
        ({"at_most": 5, "reason": "a week"}, "at most 5 (a week)", [5, -1], [6]),
        ({"at_least": 2, "reason": "one is written"}, "at least 2 (one is written)", [2], [1]),
        ({"at_least": 0, "at_most": 1}, "from 0 to 1", [0, 1], [-0.1, 1.1]),
        ({"at_least": 0, "below": 1}, "from 0 up to but not including 1", [0, 0.9], [1]),
        ({"above": 0, "below": 1}, "between 0 and 1", [0.5], [0, 1]),
        ({"above": 0, "at_most": 9}, "above 0 and at most 9", [9], [0, 10]),
        ({}, "", [-1, float("nan")], []),
    ],
)
def test_a_range_is_checked_and_said(
    declared: dict[str, Any], text: str, inside: list[float], outside: list[float]
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Group:
        number: float | None = option(None, "A number.", **declared)

    found = option_of(dataclasses.fields(Group)[0])
    assert found.range_text == text
    assert all(found.is_in_range(value) for value in (*inside, None, "auto", True))
    assert not any(found.is_in_range(value) for value in outside)


@pytest.mark.parametrize(
    ("needs", "values", "holds", "text"),
    [
        (when("a", "x"), {"a": "x"}, True, "a=x"),
        (when("a", "x", "y", "z"), {"a": "w"}, False, "a=x, y or z"),
        (When("a"), {"a": 3}, True, "a"),
        (When("a"), {"a": None}, False, "a"),
        (when_not_given("a"), {"a": None}, True, "no a"),
        (when_not_given("a"), {"a": 3}, False, "no a"),
    ],
)
def test_a_condition_is_checked_and_said(needs: When, values: dict[str, Any], holds: bool, text: str) -> None:
    assert needs.holds(values.__getitem__) == holds
    assert str(needs) == text


def test_a_type_is_shown_as_a_user_thinks_of_it() -> None:
    kinds = {d.key: d.kind for d in describe_options()}
    assert kinds["rounds"] == "whole number"
    assert kinds["client.learning_rate"] == "number"
    assert kinds["client.scaffold"] == "true | false"
    assert kinds["client.cohort"] == "whole number | auto"
    assert kinds["client.optimizer"] == "sgd | adamw"
    assert kinds["data.root"] == "path"
    assert kinds["data.domains"] == "list of names"
    assert kinds["model.lora.client_ranks"] == "list of whole numbers"
    assert kinds["method"] == "group of options"
    assert kinds["partition.scheme"].startswith("domain | dirichlet | iid")


def test_choices_are_those_of_a_literal_alone() -> None:
    class Group:
        either: Literal["a", "b"]
        maybe: Literal["a", "b"] | None
        number: int | Literal["auto"]
        text: str

    found = {name: choices_of(Group, name) for name in typing.get_type_hints(Group)}
    assert found == {"either": ("a", "b"), "maybe": ("a", "b"), "number": (), "text": ()}


def test_a_group_is_shown_with_defaults_ranges_and_conditions() -> None:
    text = options_text("client")
    assert "  client.learning_rate  (number) = 0.01\n      Learning rate of LoRA factors and head. Above 0." in text
    assert "  client.momentum  (number) = 0.9 (with client.optimizer=sgd)\n" in text
    assert "From 0 up to but not including 1. Only with client.optimizer=sgd." in text
    assert "  client.steps  (whole number)\n" in text
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  client.")]
    assert shown == [key for key in OPTIONS if key.startswith("client.")]
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_smallest_group_is_one_option_and_the_largest_all() -> None:
    assert options_text("rounds").startswith("  rounds  (whole number) = 50\n")
    assert "  model.lora.rank  (" in options_text("model.lora")
    assert "model.name" not in options_text("model.lora")
    everything = options_text()
    assert [key for key in OPTIONS if f"  {key}  (" not in everything] == []


def test_a_group_that_there_is_not_is_an_error_that_names_those_there_are() -> None:
    assert list(groups())[:4] == ["data", "partition", "model", "model.lora"]
    assert groups()["client"] == "Local training. The optimiser is fresh for every client and round."
    with pytest.raises(ConfigError, match=r"no group of options clint; did you mean client\? groups: data, partition"):
        options_text("clint")
    with pytest.raises(ConfigError, match="the options of a method are its own; type: lorafair methods NAME"):
        options_text("method.solver")

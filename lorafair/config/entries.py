"""The entries of one place's values: other spellings replaced, and every key and choice checked."""

from __future__ import annotations

import copy
import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from lorafair.config.hints import unknown_option
from lorafair.config.options import all_options, choices_of, group_of, option_of, types_of
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, did_you_mean

FREE_GROUPS = (
    "method",
    "loggers",
    "data.options",
    "partition.options",
    "model.options",
    "privacy.clip_parts",
)  # of names that are not declared in schema/


def with_canonical_values(layer: DictConfig, origin: str) -> DictConfig:
    """The layer with other spellings of values, and lists or distributions of LoRA ranks, replaced by their values."""
    return _with_client_ranks(_with_canonical_spellings(layer), origin)


def _with_canonical_spellings(layer: DictConfig) -> DictConfig:
    changed: dict[str, Any] = {}
    for key, spellings in _spellings().items():
        group, _, name = key.rpartition(".")
        parent = value_at(layer, group)
        value = parent.get(name) if isinstance(parent, DictConfig) and name in parent else None
        if isinstance(value, str | int) and value in spellings:
            changed[key] = spellings[value]
    if changed:
        layer = copy.deepcopy(layer)
        for key, value in changed.items():
            OmegaConf.update(layer, key, value, merge=False)
    return layer


@functools.cache
def _spellings() -> dict[str, Mapping[Any, Any]]:
    return {key: option_of(f).spellings for key, f in all_options(Config) if option_of(f).spellings}


def _with_client_ranks(layer: DictConfig, origin: str) -> DictConfig:
    lora = value_at(layer, "model.lora")
    ranks = lora.get("rank") if isinstance(lora, DictConfig) else None
    if not isinstance(ranks, ListConfig | DictConfig) or not ranks:
        return layer
    assert isinstance(lora, DictConfig)
    shown = f"{origin}model.lora.rank={ranks}"
    if lora.get("client_ranks") is not None or lora.get("client_rank_probabilities") is not None:
        raise ConfigError(f"{shown} gives the ranks of clients already; leave model.lora.client_ranks out")
    levels = list(ranks)
    if not all(str(level).isdecimal() for level in levels):
        raise ConfigError(
            f"{shown} must be a whole number, a list of them, or a distribution such as {{4: 0.5, 16: 0.5}}, with a "
            "space after each colon"
        )
    probabilities = list(ranks.values()) if isinstance(ranks, DictConfig) else None
    if any(isinstance(p, bool) or not isinstance(p, int | float) for p in probabilities or ()):
        raise ConfigError(f"{shown}: the probability of each rank must be a number, as in {{4: 0.5, 16: 0.5}}")
    given = [int(level) for level in levels]
    values = {"rank": max(given), "client_ranks": given, "client_rank_probabilities": probabilities}
    layer = copy.deepcopy(layer)
    for name, value in values.items():
        OmegaConf.update(layer, f"model.lora.{name}", value, merge=False)
    return layer


def value_at(layer: DictConfig, key: str) -> Any:
    """A group of a layer whose values may be anything; None where a value is in its place."""
    node: Any = layer
    for part in key.split(".") if key else ():
        node = node.get(part) if isinstance(node, DictConfig) and not OmegaConf.is_missing(node, part) else None
    return node


def check_entries(values: DictConfig, origin: str) -> None:
    """Raise ConfigError for keys that are no options, and for values that the types of theirs do not list."""
    for key, value in _entries_of(cast(dict[str, Any], OmegaConf.to_container(values))):
        _check_entry(key, value, origin)


def _entries_of(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        yield key, value
        if key not in FREE_GROUPS and isinstance(value, dict):
            yield from _entries_of(value, f"{key}.")


def _check_entry(key: str, value: Any, origin: str) -> None:
    """Raise ConfigError for a key that is no option, and for a value that is none of those its type lists."""
    owner: Any = Config
    *groups, name = key.split(".")
    for part in groups:
        owner = _groups_in(owner).get(part) if owner is not None else None
    if owner is None or name not in types_of(owner):
        raise unknown_option(key, value, origin)
    if value == "???":
        raise ConfigError(f"{origin}{key}=??? has no value")
    _check_group(key, value, _groups_in(owner).get(name), origin)
    if value is None and type(None) not in typing.get_args(types_of(owner)[name]):
        raise ConfigError(f"{origin}{key}=null is not possible; leave it out for the default")
    if _is_list(types_of(owner)[name]) and not isinstance(value, list | None):
        raise ConfigError(f"{origin}{key}={value} must be a list: {key}=[{value}]")
    choices = choices_of(owner, name)
    if choices and value is not None and value not in choices and "${" not in str(value):
        hint = did_you_mean(value, choices)
        raise ConfigError(f"{origin}{key}={value} is not possible; {hint}possible: {', '.join(choices)}")


def _check_group(key: str, value: Any, group: type | None, origin: str) -> None:
    """Raise ConfigError for a single value where a group of options belongs."""
    if isinstance(value, dict):
        return
    if key == "method":
        name = "lora_fair" if value is None else value
        raise ConfigError(f"{origin}method={value}: method is a group of options; set method.name={name}")
    if key == "loggers" and value is not None:
        names = value if isinstance(value, list) else [value]
        meant = ", ".join(f"{name}: {{}}" for name in names)
        raise ConfigError(f"{origin}loggers={value} must be a group of options by logger: loggers={{{meant}}}")
    if key in FREE_GROUPS:
        raise ConfigError(f"{origin}{key}={value} must be a group of options: {key}={{NAME: VALUE}}")
    if group is not None:
        options = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(group))
        raise ConfigError(f"{origin}{key}={value}: {key} is a group of options; set {options}")


def _is_list(kind: Any) -> bool:
    return "tuple[str" in str(kind)


@functools.cache
def _groups_in(owner: type) -> dict[str, type]:
    """The fields of a group that are groups themselves."""
    found = {f.name: group_of(f) for f in dataclasses.fields(owner)}
    return {name: group for name, group in found.items() if group is not None}

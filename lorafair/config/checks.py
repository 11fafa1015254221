"""What can be wrong with a configuration as a whole, found from its values alone, before anything is imported."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lorafair import registry
from lorafair.config.identity import check_accepted
from lorafair.config.options import Option, all_options, option_of, types_of
from lorafair.config.profiles import check_profile_options
from lorafair.config.schema import SIGNALS, Config
from lorafair.errors import ConfigError, check_utf8


def settle_conditional_options(config: DictConfig) -> dict[str, Any]:
    """The values of options that belong to a choice which was made, and were not given, by key.

    Raises ConfigError for one that was given without its choice, or is missing.
    """
    settled: dict[str, Any] = {}
    for key, declared in all_options(Config):
        option, given = option_of(declared), OmegaConf.select(config, key)
        if option.requires is None or _of_plugin(config, option):
            continue
        if not option.requires.holds(lambda name: OmegaConf.select(config, name)):
            if given is not None:
                raise ConfigError(f"{key}={_shown(given)} has no effect: it needs {option.requires}")
        elif given is None and option.required:
            raise ConfigError(f"{key} is missing: {option.requires} needs it")
        elif given is None:
            default = option.conditional_default
            settled[key] = default(config) if callable(default) else default
    return {key: value for key, value in settled.items() if value is not None}


def check_choices(config: DictConfig) -> None:
    """Raise ConfigError for an unknown method, source or partition: what other options mean follows from them."""
    registry.METHODS.check(config.method.name)
    registry.SOURCES.check(config.data.source)
    registry.PARTITIONS.check(config.partition.scheme)
    if config.defence.name is not None:
        registry.DEFENCES.check(config.defence.name)
    for key in ("up", "down", "folded"):
        if config.compression[key] is not None:
            registry.COMPRESSIONS.check(config.compression[key], f"compression.{key}")


def check(config: DictConfig) -> None:
    """Raise ConfigError for values out of their range, unknown names, and values that contradict each other."""
    for key, declared in all_options(Config):
        option, value = option_of(declared), OmegaConf.select(config, key)
        if isinstance(value, str | Path):
            check_utf8([str(value)], f"{key}:")
        if not option.is_in_range(value):
            raise ConfigError(f"{key}={value} is out of range: it must be {option.range_text}")
    _check_lists(config)
    for name in config.loggers:
        registry.LOGGERS.check(name)
        if not isinstance(config.loggers[name], DictConfig | None):
            raise ConfigError(f"loggers.{name}={config.loggers[name]} must be a group of its options, or {{}}")
    _check_plugin_options(config)
    _check_client_ranks(config)
    check_profile_options(config)
    _check_privacy(config)
    if (mode := config.model.compile_mode) is not None and config.model.compile != "inductor":
        raise ConfigError(f"model.compile_mode={mode} is one of inductor; set model.compile=inductor, or no mode")
    check_accepted(config.accept)
    if unknown := [name for name in config.fabric.signals if name not in SIGNALS]:
        raise ConfigError(f"fabric.signals: {unknown[0]} is not possible; there are {', '.join(SIGNALS)}")
    if config.resume in ("true", "false", "yes", "no", "latest", "last", "True", "False"):
        meant = "auto" if config.resume.lower() in ("true", "yes", "latest", "last") else "never"
        raise ConfigError(
            f"resume={config.resume} is not possible; did you mean resume={meant}? possible: auto (the default: a run "
            "continues by itself), never, or the path of a checkpoint"
        )


def _of_plugin(config: DictConfig, option: Option) -> bool:
    """Whether the choice that an option belongs to is a plug-in's, which may use any option."""
    if option.requires is None:
        return False
    if option.requires.key == "compression.up" and option.requires.values:
        return any(map(registry.COMPRESSIONS.is_from_plugin, config.compression.values()))
    return option.requires.key in ("data.source", "partition.scheme") and any(
        registry.REGISTRIES[names].is_from_plugin(OmegaConf.select(config, key))
        for key, names in (("data.source", "SOURCES"), ("partition.scheme", "PARTITIONS"))
        if key == option.requires.key
    )


def _check_lists(config: DictConfig) -> None:
    for key, declared in all_options(Config):
        value: Any = OmegaConf.select(config, key) if "tuple[str" in _type_text(key) else None
        if value is None:
            continue
        names = list(value)
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{key}={names}: give names")
        if len(set(names)) < len(names):
            raise ConfigError(f"{key}={names}: name each one once, and at least one")
        if not names and declared.default != ():
            raise ConfigError(f"{key}={names}: name each one once, and at least one")
        if option_of(declared).names:
            for name in names:
                registry.REGISTRIES[option_of(declared).names].check(name, key)


@functools.cache
def _type_text(key: str) -> str:
    owner: Any = Config
    *groups, name = key.split(".")
    for group in groups:
        owner = next(f.default_factory for f in dataclasses.fields(owner) if f.name == group)
    return str(types_of(owner)[name])


def _check_plugin_options(config: DictConfig) -> None:
    """Only plug-ins read free options; elsewhere they are an error."""
    for group, chosen, names, what in (
        ("data", config.data.source, registry.SOURCES, "a data.source"),
        ("partition", config.partition.scheme, registry.PARTITIONS, "a partition.scheme"),
        ("model", config.model.name, registry.BACKBONES, "a model.name"),
    ):
        if config[group].options and not names.is_from_plugin(chosen):
            raise ConfigError(
                f"{group}.options={_shown(config[group].options)} has no effect: it needs {what} that a plug-in has "
                f"registered, and {chosen} is not"
            )


def _check_client_ranks(config: DictConfig) -> None:
    lora = config.model.lora
    if lora.client_ranks is None:
        return
    ranks, probabilities = list(lora.client_ranks), lora.client_rank_probabilities
    if not ranks or min(ranks) < 1 or max(ranks) > lora.rank:
        raise ConfigError(
            f"model.lora.client_ranks={ranks} is out of range: ranks go from 1 to model.lora.rank={lora.rank}"
        )
    if probabilities is not None and not _is_distribution(list(probabilities), len(ranks)):
        raise ConfigError(
            f"model.lora.client_rank_probabilities={list(probabilities)} must be one probability for each of the "
            f"{len(ranks)} model.lora.client_ranks, and sum to 1"
        )
    if lora.client_scaling == "own" and set(ranks) == {lora.rank}:
        raise ConfigError(
            f"model.lora.client_scaling=own has no effect: all model.lora.client_ranks are model.lora.rank={lora.rank}"
        )


def _check_privacy(config: DictConfig) -> None:
    privacy = config.privacy
    if privacy.unit == "none":
        return
    noise, epsilon = privacy.noise_multiplier, privacy.epsilon
    if (noise is None) == (epsilon is None):
        given = "both are given" if noise is not None else "neither is given"
        raise ConfigError(
            f"privacy.unit={privacy.unit} needs either privacy.noise_multiplier or privacy.epsilon, and {given}"
        )


def _is_distribution(probabilities: Sequence[float], count: int) -> bool:
    return len(probabilities) == count and min(probabilities) >= 0 and abs(sum(probabilities) - 1) <= 1e-6


def _shown(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

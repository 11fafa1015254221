"""Options that two places of a comparison set, where one would silently have no effect."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

from omegaconf import OmegaConf

from lorafair.comparison.draws import DESIGN_SEEDS, Draws
from lorafair.comparison.plan import SECTION, Options, Tuning
from lorafair.config.identity import leaves
from lorafair.config.layers import ConfigLayer
from lorafair.errors import ConfigError


def check_overlaps(
    methods: Mapping[str, Options],
    settings: Mapping[str, Options],
    tuning: Tuning | None,
    draws: Draws | None,
    layers: Sequence[ConfigLayer],
    file: str,
) -> None:
    """Raise ConfigError where two places set the same option: one would silently have no effect."""
    entries = [(f"{SECTION}.methods.{label}", options) for label, options in methods.items()]
    entries += [(f"{SECTION}.settings.{label}", options) for label, options in settings.items()]
    if tuning is not None:
        entries.append((f"{SECTION}.tune.options", tuning.options))
    for (one, first), (two, second) in itertools.combinations(entries, 2):
        if one.split(".")[1] == two.split(".")[1]:  # of two methods, or two settings, a run has one
            continue
        for key, other in itertools.product(first, second):
            if overlap(key, other):
                both = key if len(key) >= len(other) else other
                raise ConfigError(f"{one} and {two} both set {both}; keep one of them")
    varied = {"seed": f"{SECTION}.{'draws' if draws else 'seeds'}", "method": f"{SECTION}.methods"}
    if draws is not None and draws.is_design:
        varied |= dict.fromkeys(DESIGN_SEEDS, f"{SECTION}.draws")
        for (entry, options), key in itertools.product(entries, DESIGN_SEEDS):
            if key in options:
                raise ConfigError(f"{entry} sets {key}: the design of {SECTION}.draws sets it for all runs")
    if tuning is not None:
        varied["data.validation_fraction"] = f"{SECTION}.tune"
    always = set(varied)
    for entry, options in entries:
        varied |= {key: entry for key in options if key not in varied and not overlap(key, "method")}
    for layer in layers:
        _check_common(layer, varied, always, file)


def _check_common(layer: ConfigLayer, varied: Mapping[str, str], always: set[str], file: str) -> None:
    """Raise ConfigError for a common value that would be lost.

    A file may have a value that entries change (`varied`: option -> entry); a pair, or what every run changes, may not.
    """
    for key, value in leaves(cast(dict[str, Any], OmegaConf.to_container(layer.values))):
        if key == "resume" and value != "auto":
            raise ConfigError(
                f"{layer.origin}resume={value}: a comparison always continues; choose another run_dir instead"
            )
        for other, entry in varied.items():
            if overlap(key, other) and (not layer.origin or other in always):
                raise ConfigError(
                    f"{layer.origin}{key}={value}: {other} is what the comparison varies ({entry} in {file})"
                )


def overlap(key: str, other: str) -> bool:
    """Whether setting one of these keys touches the other: the same, or a group and a part of it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")

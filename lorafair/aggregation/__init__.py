"""The server step: one file a method. A new method is a frozen dataclass with `combine`, and a line in AGGREGATORS."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast

from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from lorafair.aggregation.averaging import FedIT
from lorafair.aggregation.base import (
    Aggregator,
    JointAggregator,
    LayerUpdate,
    ServerUpdate,
    aggregate,
    bias_metrics,
)
from lorafair.aggregation.fedex_lora import FedExLoRA
from lorafair.aggregation.fedrot_lora import FedRotLoRA
from lorafair.aggregation.fedrpca import FedRPCA
from lorafair.aggregation.fedsa_lora import FedSALoRA
from lorafair.aggregation.fedsvd import FedSVD
from lorafair.aggregation.ffa_lora import FFALoRA
from lorafair.aggregation.flex_lora import FlexLoRA
from lorafair.aggregation.flora import FLoRA
from lorafair.aggregation.florist import FLoRIST
from lorafair.aggregation.het_lora import HETLoRA
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.raflora import RaFLoRA
from lorafair.aggregation.rbla import RBLA
from lorafair.aggregation.references import Centralized, LocalOnly
from lorafair.aggregation.ro_lora import RoLoRA
from lorafair.config import Config, ConfigError

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "JointAggregator",
    "LayerUpdate",
    "ServerUpdate",
    "aggregate",
    "bias_metrics",
    "build_aggregator",
    "method_of",
]

AGGREGATORS: dict[str, type[Aggregator]] = {
    "fedit": FedIT,
    "lora_fair": LoRAFair,
    "fedex_lora": FedExLoRA,
    "fedrot_lora": FedRotLoRA,
    "fedrpca": FedRPCA,
    "fedsa_lora": FedSALoRA,
    "fedsvd": FedSVD,
    "ffa_lora": FFALoRA,
    "flex_lora": FlexLoRA,
    "flora": FLoRA,
    "florist": FLoRIST,
    "het_lora": HETLoRA,
    "raflora": RaFLoRA,
    "rbla": RBLA,
    "ro_lora": RoLoRA,
    "centralized": Centralized,
    "local_only": LocalOnly,
}


def build_aggregator(options: Mapping[str, Any]) -> Aggregator:
    """The method that `options["name"]` names, with the other options as its fields.

    Raises ConfigError with one line that names method.<option>, what was given and what is possible.
    """
    name = options.get("name")
    if not isinstance(name, str) or name not in AGGREGATORS:
        near = difflib.get_close_matches(str(name), AGGREGATORS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"method.name={name} is unknown; {hint}methods: {', '.join(AGGREGATORS)}")
    method = AGGREGATORS[name]
    given = {str(key): value for key, value in options.items() if key != "name"}
    for key in given:
        _check_option(key, name)
    defaults = OmegaConf.structured(method)
    for key, value in given.items():
        if isinstance(defaults[key], bool) and not isinstance(value, bool):
            raise ConfigError(f"method.{key}={value} must be true or false")
    try:
        # The dataclasses are frozen, and OmegaConf would not let values be merged into a read-only node.
        with flag_override(defaults, "readonly", False):
            defaults.merge_with(given)
    except OmegaConfBaseException as error:
        raise ConfigError(f"method.{error.full_key}: {str(error).splitlines()[0]}") from error
    return cast(Aggregator, OmegaConf.to_object(defaults))


def method_of(config: Config) -> Aggregator:
    """The method of a run, checked against the settings that it has to work with.

    Raises ConfigError that names the key to change.
    """
    method, name, local = build_aggregator(config.method), config.method["name"], config.client
    start = config.federation.initialization
    if start not in method.initializations:
        raise ConfigError(
            f"federation.initialization={start} does not fit method.name={name}; "
            f"possible: {', '.join(method.initializations)}"
        )
    if config.model.lora.client_ranks is not None and (method.pools_data or not method.mixed_ranks):
        able = [name for name, other in AGGREGATORS.items() if other.mixed_ranks and not other.pools_data]
        raise ConfigError(
            f"model.lora.client_ranks: method.name={name} needs the same rank everywhere; "
            f"methods for mixed ranks: {', '.join(able)}"
        )
    if local.scaffold and local.optimizer != "sgd":
        raise ConfigError(f"client.scaffold=true needs client.optimizer=sgd, not {local.optimizer}")
    if local.scaffold and config.model.lora.client_ranks is not None:
        raise ConfigError("client.scaffold=true needs clients of the same rank; leave model.lora.client_ranks out")
    if config.fabric.server == "sharded":
        for key, used in (
            (f"method.name={name}", bool(method.keeps)),
            ("federation.initialization=local", start == "local"),
            ("client.scaffold=true", local.scaffold),
        ):
            if used:
                raise ConfigError(
                    f"fabric.server=sharded does not fit {key}, for which every process holds all clients' rows; "
                    "possible: fabric.server=rank0"
                )
    for key, used, fits in (
        (f"server.optimizer={config.server.optimizer}", config.server.optimizer != "none", _goes_on),
        ("client.scaffold=true", local.scaffold, _is_shared),
    ):
        if used and start != "average":
            raise ConfigError(f"{key} needs federation.initialization=average, not {start}")
        if used and not fits(method):
            able = [name for name, other in AGGREGATORS.items() if fits(other)]
            raise ConfigError(f"{key} does not fit method.name={name}; possible: {', '.join(able)}")
    return method


def _goes_on(method: Aggregator | type[Aggregator]) -> bool:
    """Whether the factors the server returns can be compared with those it sent."""
    return not (method.decomposes or method.restarts or method.pools_data or set(method.keeps) >= {"A", "B"})


def _is_shared(method: Aggregator | type[Aggregator]) -> bool:
    """Whether, beyond that, all clients start from the same numbers, so that their gradients can be compared."""
    return _goes_on(method) and not method.keeps


def _check_option(key: str, name: str) -> None:
    known = _option_names(name)
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1)
    owners = [other for other in AGGREGATORS if key in _option_names(other)]
    hint = f"did you mean method.{near[0]}? " if near else ""
    hint = f"it belongs to {', '.join(owners)}; " if owners else hint
    raise ConfigError(f"method.{key} is no option of {name}; {hint}options of {name}: {', '.join(known) or 'none'}")


def _option_names(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, AGGREGATORS[name]))]

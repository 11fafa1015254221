"""From the group `method` of a configuration to a checked aggregation method."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from lorafair.aggregation.base import Aggregator, alternates
from lorafair.aggregation.client_privacy import check_client_privacy
from lorafair.aggregation.compression_fit import check_compression
from lorafair.config.options import choices_of, option_of, types_of
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, did_you_mean, first_line
from lorafair.registry import METHODS

Method = TypeVar("Method", bound=type[Aggregator])


def register_method(name: str) -> Callable[[Method], Method]:
    """Make a class a value of method.name.

    Args:
        name: The value to use for method.name.

    Returns:
        A decorator for a frozen dataclass that extends `Aggregator` and defines `combine`. Its fields are its options.

    Raises:
        ConfigError: The name is taken, or the class is not such a dataclass.

    Example:
        >>> @lorafair.register_method("mine")
        ... @dataclass(frozen=True)
        ... class Mine(lorafair.Aggregator):
        ...     def combine(self, clients, weights, start=None): ...
    """

    def register(method: Method) -> Method:
        if not (isinstance(method, type) and issubclass(method, Aggregator) and not inspect.isabstract(method)):
            raise ConfigError(f"method {name}: {method} must extend lorafair.Aggregator and have `combine`")
        if not dataclasses.is_dataclass(method) or _has_undeclared_fields(method):
            raise ConfigError(f"method {name}: {method.__name__} must be a dataclass: @dataclass(frozen=True)")
        METHODS.add(name, method)
        return method

    return register


def _has_undeclared_fields(method: type) -> bool:
    """Whether a class without @dataclass extends one and adds fields, which would not be options."""
    own = vars(method)
    return "__dataclass_fields__" not in own and bool(own.get("__annotations__"))


def build_aggregator(options: Mapping[str, Any]) -> Aggregator:
    """The method that `options["name"]` names, with the other options as its fields.

    Raises ConfigError with one line that names method.<option>, what was given and what is possible.
    """
    name = options.get("name")
    METHODS.check(name)
    assert isinstance(name, str)
    method: type[Aggregator] = METHODS[name]
    given = {str(key): value for key, value in options.items() if key != "name"}
    for key, value in given.items():
        _check_option(key, value, name)
    try:
        values = OmegaConf.structured(method)
        # The dataclasses are frozen, and OmegaConf would not let values be merged into a read-only node.
        with flag_override(values, "readonly", False):
            values.merge_with(given)
            values.merge_with(_conditional_options(method, values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"method.{error.full_key}: {first_line(error)}") from error
    return cast(Aggregator, OmegaConf.to_object(values))


def method_of(config: Config) -> Aggregator:
    """The method of a run, checked against the settings that it has to work with.

    Raises ConfigError that names the key to change.
    """
    method, name = build_aggregator(config.method), str(config.method["name"])
    start = config.federation.initialization
    if start not in method.initializations:
        raise ConfigError(
            f"federation.initialization={start} does not fit method.name={name}; "
            f"possible: {', '.join(method.initializations)}"
        )
    _check_client_ranks(config, method, name)
    _check_initialization(config, method, name)
    _check_core(config, method, name)
    _check_sharding(config, method, name)
    if config.federation.head_weighting == "class" and not _averages_the_head(method):
        raise ConfigError(
            f"federation.head_weighting=class has no effect with method.name={name}, which averages no heads; "
            f"possible: {', '.join(_methods_that(_averages_the_head))}"
        )
    _check_average(config, method, name)
    _check_robustness(config, method, name)
    _check_weighting(config, method, name)
    check_client_privacy(config, method, name, _methods_that)
    check_compression(config, method, name)
    if method.coding is not None and config.server.optimizer != "none":
        raise ConfigError(
            f"server.optimizer={config.server.optimizer} does not fit method.fold_bits of method.name={name}: it would "
            "move the factors after what they leave was coded; leave one of them out"
        )
    for key, used, fits in (
        (f"server.optimizer={config.server.optimizer}", config.server.optimizer != "none", _keeps_its_factors),
        ("client.scaffold=true", config.client.scaffold, _starts_all_clients_alike),
    ):
        if used and start != "average":
            raise ConfigError(f"{key} needs federation.initialization=average, not {start}")
        if used and not fits(method):
            raise ConfigError(f"{key} does not fit method.name={name}; possible: {', '.join(_methods_that(fits))}")
    return method


def _check_robustness(config: Config, method: Aggregator, name: str) -> None:
    """A defence may leave a client out: nothing of it may be needed afterwards."""
    if config.attack.name is not None and method.pools_data:
        raise ConfigError(f"attack.name={config.attack.name} needs clients; method.name={name} has none")
    if config.defence.name is None:
        return
    what = f"defence.name={config.defence.name}"
    if not _can_be_defended(method):
        raise ConfigError(
            f"{what} does not fit method.name={name}; possible: {', '.join(_methods_that(_can_be_defended))}"
        )
    if method.rank_pruning is not None:
        raise ConfigError(f"{what} does not fit method.pruning, by which LoRA ranks change; leave one of them out")
    if config.client.scaffold:
        raise ConfigError(f"{what} does not fit client.scaffold=true, whose control variates need every client")
    if config.federation.initialization == "local":
        raise ConfigError(f"{what} does not fit federation.initialization=local; take average or fresh")


def _can_be_defended(method: Aggregator | type[Aggregator]) -> bool:
    return not (method.personal_parts or method.pools_data)


def _check_client_ranks(config: Config, method: Aggregator, name: str) -> None:
    mixed = config.model.lora.client_ranks is not None
    if mixed and not _takes_mixed_lora_ranks(method):
        raise ConfigError(
            f"model.lora.rank: method.name={name} needs the same LoRA rank everywhere; "
            f"methods for mixed LoRA ranks: {', '.join(_methods_that(_takes_mixed_lora_ranks))}"
        )
    if method.selects_directions and config.model.lora.client_scaling == "own":
        raise ConfigError(
            f"model.lora.client_scaling=own does not fit method.name={name}, whose clients all hold the whole adapter; "
            "possible: common"
        )
    if method.rank_pruning is not None and (config.client.scaffold or config.federation.initialization != "average"):
        key = "client.scaffold=true" if config.client.scaffold else "federation.initialization"
        raise ConfigError(f"{key} does not fit method.name={name} with method.pruning, by which LoRA ranks change")
    if config.client.scaffold and config.client.optimizer != "sgd":
        raise ConfigError(f"client.scaffold=true needs client.optimizer=sgd, not {config.client.optimizer}")
    if config.client.scaffold and mixed:
        raise ConfigError("client.scaffold=true needs clients of the same LoRA rank; set one number as model.lora.rank")


def _check_initialization(config: Config, method: Aggregator, name: str) -> None:
    """What is made of the frozen weight is made once, and of one size."""
    given = config.model.lora.initialization
    possible = ("kaiming",) if method.restarts else method.lora_initializations
    if given is not None and given not in possible:
        raise ConfigError(
            f"model.lora.initialization={given} does not fit method.name={name}; possible: {', '.join(possible)}"
        )
    kind, key = given or possible[0], "model.lora.initialization"
    if kind != "kaiming" and type(method).initialize is not Aggregator.initialize:
        raise ConfigError(f"{key}={kind} has no effect: method.name={name} makes its own initial factors")
    if kind != "kaiming" and config.federation.initialization == "fresh":
        raise ConfigError(f"{key}={kind} does not fit federation.initialization=fresh, which draws factors every round")
    if kind != "kaiming" and (config.model.lora.client_ranks is not None or method.rank_pruning is not None):
        remedy = "set one number as model.lora.rank" if method.rank_pruning is None else "leave method.pruning out"
        raise ConfigError(f"{key}={kind} needs clients of the same LoRA rank; {remedy}")


def _check_core(config: Config, method: Aggregator, name: str) -> None:
    rank, mixed = config.model.lora.rank, config.model.lora.client_ranks is not None
    if method.core is None:
        return
    if mixed or config.federation.initialization != "average":
        key = "different LoRA ranks" if mixed else f"federation.initialization={config.federation.initialization}"
        raise ConfigError(f"{key} cannot go with method.name={name}, whose clients train a matrix between A and B")
    if rank % method.core.heads:
        raise ConfigError(
            f"model.lora.rank={rank} cannot be dealt out to the {method.core.heads} heads of method.name={name}; "
            "take a multiple of them"
        )


def _check_sharding(config: Config, method: Aggregator, name: str) -> None:
    if config.fabric.server != "sharded":
        return
    for key, used in (
        (f"method.name={name}", bool(method.personal_parts)),
        ("federation.initialization=local", config.federation.initialization == "local"),
        ("client.scaffold=true", config.client.scaffold),
    ):
        if used:
            raise ConfigError(
                f"fabric.server=sharded does not fit {key}, for which every process holds all clients' rows; "
                "possible: fabric.server=rank0"
            )
    if method.needs_all_layers:
        raise ConfigError(
            f"fabric.server=sharded does not fit method.name={name} with its options, for which one process has to see "
            "all layers (method.sgd_patience of lora_fair, method.pruning of het_lora); possible: fabric.server=rank0"
        )


def _check_average(config: Config, method: Aggregator, name: str) -> None:
    rounds, parts = config.evaluation.average_rounds, config.evaluation.average_parts
    if rounds is not None and method.personal_parts:
        raise ConfigError(
            f"evaluation.average_rounds={rounds} does not fit method.name={name}, whose clients are evaluated with a "
            "model each; leave it out"
        )
    changing = method.decomposes or method.restarts or method.resets or method.folds
    moving = changing or config.federation.initialization == "fresh"
    if parts == "all" and moving:
        raise ConfigError(
            f"evaluation.average_parts=all does not fit method.name={name} with these options: its factors of one "
            "round mean nothing beside the frozen weights or the decomposition of another; possible: head"
        )


def _check_weighting(config: Config, method: Aggregator, name: str) -> None:
    """Weights that follow from losses, and the way that the server of q-FedAvg goes."""
    federation, client = config.federation, config.client
    key = f"federation.weighting={federation.weighting}"
    if federation.weighting not in ("q", "afl"):
        return
    if not _averages_something(method):
        raise ConfigError(
            f"{key} has no effect with method.name={name}, which averages nothing; "
            f"possible: {', '.join(_methods_that(_averages_something))}"
        )
    if client.scaffold:
        raise ConfigError(f"{key} does not fit client.scaffold=true, whose control variates have weights that stay")
    if federation.weighting_step != "qfedavg":
        return
    for other, misfit in (
        (f"method.name={name}", method.folds or not _keeps_its_factors(method) or method.resets),
        (f"federation.initialization={federation.initialization}", federation.initialization != "average"),
        (f"server.optimizer={config.server.optimizer}", config.server.optimizer != "none"),
        (f"client.optimizer={client.optimizer}", client.optimizer != "sgd"),
        (f"client.b_learning_rate_ratio={client.b_learning_rate_ratio:g}", client.b_learning_rate_ratio != 1),
    ):
        if misfit:
            raise ConfigError(
                f"federation.weighting_step=qfedavg does not fit {other}: it scales the change of factors that are "
                "averaged, after SGD with one learning rate; set federation.weighting_step=full"
            )


def _methods_that(fit: Callable[[type[Aggregator]], bool]) -> list[str]:
    return [name for name in METHODS.names if fit(METHODS[name])]


def _takes_mixed_lora_ranks(method: Aggregator | type[Aggregator]) -> bool:
    return method.mixed_lora_ranks and not method.pools_data


def _averages_the_head(method: Aggregator | type[Aggregator]) -> bool:
    return "head" not in method.personal_parts and not method.pools_data


def _averages_something(method: Aggregator | type[Aggregator]) -> bool:
    return not method.pools_data and not set(method.personal_parts) >= {"A", "B", "head"}


def _keeps_its_factors(method: Aggregator | type[Aggregator]) -> bool:
    """Whether the factors the server returns can be compared with those it sent."""
    personal = set(method.personal_parts) >= {"A", "B"}
    return not (method.decomposes or method.restarts or method.pools_data or personal)


def _starts_all_clients_alike(method: Aggregator | type[Aggregator]) -> bool:
    """Whether, beyond that, all clients start from the same numbers and train all of them in every step.

    Their gradients can then be compared, and be told from how far a client has moved.
    """
    return _keeps_its_factors(method) and not method.personal_parts and not alternates(method)


def _conditional_options(method: type[Aggregator], values: Any) -> dict[str, Any]:
    """Defaults of options that are not given and belong to a choice which was made."""
    settled: dict[str, Any] = {}
    for declared in dataclasses.fields(cast(Any, method)):
        option = option_of(declared)
        made = option.requires and option.requires.holds(lambda key: values[key.removeprefix("method.")])
        if made and values[declared.name] is None:
            settled[declared.name] = option.conditional_default
    return settled


def _check_option(key: str, value: Any, name: str) -> None:
    """Raise ConfigError for a key that is no option of the method, and for a value that its type does not list."""
    known = _option_names(name)
    if key not in known:
        owners = [other for other in METHODS.names if key in _option_names(other)]
        hint = f"it belongs to {', '.join(owners)}; " if owners else did_you_mean(key, known, "method.")
        raise ConfigError(f"method.{key} is no option of {name}; {hint}options of {name}: {', '.join(known) or 'none'}")
    kind = types_of(METHODS[name])[key]
    if bool in (kind, *typing.get_args(kind)) and not (isinstance(value, bool) or (value is None and kind is not bool)):
        raise ConfigError(f"method.{key}={value} must be true or false")
    choices = choices_of(METHODS[name], key)
    if choices and value is not None and value not in choices:
        hint = did_you_mean(value, choices)
        raise ConfigError(f"method.{key}={value} is not possible; {hint}possible: {', '.join(choices)}")


def _option_names(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(METHODS[name])]

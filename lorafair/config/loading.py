"""From YAML files, key=value pairs and Python values to a checked configuration.

Nothing heavy is imported, unless a plug-in does. The options of the method are checked later, by
`aggregation.registry.build_aggregator`, because they are declared in the method's own file.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from lorafair import registry
from lorafair.config.checks import check, check_choices, settle_conditional_options
from lorafair.config.entries import FREE_GROUPS, check_entries, value_at, with_canonical_values
from lorafair.config.layers import ConfigLayer, flat_arguments, layer_of, name_of, plain, read_layers
from lorafair.config.options import all_options, option_of
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, first_line


def load_config(*arguments: str | Path | Sequence[str], **options: Any) -> Config:
    """Read and check a run's configuration.

    Later files override earlier ones, the pairs override the files, and `options` override the pairs. A source that
    selects another method drops the options of the former one.

    Args:
        arguments: YAML files and `key=value` pairs, one by one or as a list. A file that does not exist is searched for
            among the shipped ones ("synthetic.yaml", "paper/domainnet_vit").
        options: further values, by key: `rounds=3`, `client={"steps": 5}`, `**{"method.name": "fedit"}`.

    Returns:
        The complete configuration: every option that has an effect has a value.

    Raises:
        ConfigError: one line that names the key, what was given and what is possible.

    Example:
        >>> load_config("conf/synthetic.yaml", "rounds=3").rounds
        3
    """
    given = flat_arguments(arguments)
    layers = read_layers(given)
    if options:
        layers.append(layer_of(options))
    _check_moved(layers)
    return config_of(layers, Path("runs", name_of(given)))


def load_config_of_run(run_dir: Path) -> Config:
    """The configuration of the run in this directory, wherever it was begun. Raises ConfigError."""
    return load_config(str(run_dir / "config.yaml"), run_dir=str(run_dir))


def _check_moved(layers: Sequence[ConfigLayer]) -> None:
    """Raise ConfigError where run_dir is that of a config.yaml whose run was moved or copied to where it lies."""
    written = [(layer, cast(dict[str, Any], OmegaConf.to_container(layer.values)).get("run_dir")) for layer in layers]
    last, there = next(((layer, value) for layer, value in reversed(written) if value is not None), (None, ""))
    if last is None or (here := last.run_folder) is None:
        return
    if Path(str(there)).expanduser().resolve() != here.resolve():
        raise ConfigError(
            f"{last.origin}run_dir is {there}, and the run in {here} was moved or copied from there, or begun in "
            f"another working directory; say which one is meant: run_dir={here} or run_dir={there}"
        )


def settle(config: Config) -> Config:
    """A configuration made in Python, checked and completed like one from YAML; one that is complete stays as it is.

    Raises ConfigError.
    """
    return config_of([layer_of(dataclasses.asdict(config))], Path("runs", "default"))


def merge_layers(layers: Sequence[ConfigLayer], base: DictConfig | None = None) -> DictConfig:
    """The values of these layers, later ones winning, on top of `base` (the defaults). Raises ConfigError."""
    config = base if base is not None else OmegaConf.structured(Config)
    plugins = [OmegaConf.select(layer.values, "plugins") for layer in layers]
    given = next((names for names in reversed(plugins) if names is not None), config.plugins)
    if isinstance(given, ListConfig):  # anything else is an error below
        registry.load_plugins([str(name) for name in given])
    for layer in layers:
        config = _merge(config, layer.values, layer.origin) if layer.values else config
    return with_values(config, _expanded_paths(config))


def config_of(layers: Sequence[ConfigLayer], folder: Path, base: DictConfig | None = None) -> Config:
    """The checked configuration that these layers give; the run goes below `folder` unless run_dir is set.

    `base` is what `merge_layers` returned for layers before these. Raises ConfigError with one line that names the key.
    """
    config = merge_layers(layers, base)
    name = config.method.get("name")
    if not isinstance(name, str):
        problem = "method.name is missing" if name is None else f"method.name={name} is no name"
        raise ConfigError(f"{problem}; for example method.name=lora_fair")
    check_choices(config)
    run_dir = {"run_dir": folder / f"{name}-seed{config.seed}"} if config.run_dir is None else {}
    config = with_values(config, run_dir | settle_conditional_options(config))
    check(config)
    return cast(Config, OmegaConf.to_object(config))


def to_yaml(config: Config) -> str:
    """The configuration as plain YAML, which any reader takes, and from which `load_config` makes the same again."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, width=120)


def _merge(base: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    """Merge after a check of the keys: OmegaConf names an unknown key, but suggests none."""
    layer = with_canonical_values(layer, origin)
    check_entries(layer, origin)
    given = OmegaConf.select(layer, "model.lora") or {}
    former = base.model.lora.client_ranks
    if "rank" in given and "client_ranks" not in given and former is not None:
        raise ConfigError(
            f"{origin}model.lora.rank={given['rank']} would leave model.lora.client_ranks={list(former)} as it was; "
            "give both, or for clients of one rank set it and model.lora.client_rank_probabilities to null"
        )
    if OmegaConf.select(layer, "method.name") not in (None, base.method.get("name")):
        base = with_values(base, {"method": OmegaConf.create({"name": None})}, replace=True)
    for key in FREE_GROUPS[1:]:  # an empty group takes back what earlier files have put into it
        given = value_at(layer, key)
        if isinstance(given, DictConfig) and not given:
            base = with_values(base, {key: {}}, replace=True)
    try:
        merged = cast(DictConfig, OmegaConf.merge(base, layer))
        OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}{error.full_key}: {first_line(error)}") from error
    return merged


def _expanded_paths(config: DictConfig) -> dict[str, str]:
    """The paths that begin with ~, in full. Raises ConfigError for a variable that nothing has expanded."""
    changed: dict[str, str] = {}
    for key, declared in all_options(Config):
        value = OmegaConf.select(config, key) if option_of(declared).is_path else None
        if value is None:
            continue
        if variable := re.search(r"\$(\w+)", str(value)):
            raise ConfigError(
                f"{key}={value}: ${variable[1]} is not expanded here; the shell does it outside of single quotes, and "
                f"in YAML write ${{oc.env:{variable[1]}}}"
            )
        if str(value).startswith("~"):
            try:
                changed[key] = str(Path(value).expanduser())
            except RuntimeError as error:
                raise ConfigError(f"{key}={value}: {error}") from error
    return changed


def with_values(config: DictConfig, values: Mapping[str, Any], *, replace: bool = False) -> DictConfig:
    """A copy with some values changed; the configuration itself is read-only, as its dataclasses are frozen."""
    if not values:
        return config
    changed = copy.deepcopy(config)
    with flag_override(changed, "readonly", False):
        for key, value in values.items():
            parent = OmegaConf.select(changed, key.rpartition(".")[0]) if "." in key else changed
            with flag_override(parent, "readonly", False):
                OmegaConf.update(changed, key, value, merge=not replace)
    return changed

"""From YAML files, key=value pairs and Python values to a checked configuration.

Nothing heavy is imported, unless a plug-in does. The options of the method are checked later, by
`aggregation.registry.build_aggregator`, because they are declared in the method's own file.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from lorafair import registry
from lorafair.config.checks import check, check_choices, settle_conditional_options
from lorafair.config.hints import unknown_option
from lorafair.config.options import all_options, choices_of, former_keys, group_of, option_of, types_of
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, did_you_mean, first_line, one_line
from lorafair.files.shipped import find_configuration, shipped_configurations

VERSION_LINE = "# lorafair "  # so begins config.yaml in the directory of a run; the version follows
_FREE_GROUPS = (
    "method",
    "loggers",
    "data.options",
    "partition.options",
    "model.options",
)  # of names that are not declared in schema.py


@dataclass(frozen=True)
class ConfigLayer:
    """Values given in one place."""

    origin: str  # what the message about a mistake in it begins with, e.g. "conf/demo.yaml: "
    values: DictConfig


def load_config(*arguments: str | Path | Sequence[str], **options: Any) -> Config:
    """Read and check a run's configuration.

    Later files win over earlier ones, the pairs over the files, and `options` over the pairs. A place that selects
    another method drops the options of the former one.

    Args:
        arguments: YAML files and `key=value` pairs, one by one or as a list. A file that does not exist is looked for
            among the shipped ones ("synthetic.yaml", "paper/domainnet_vit").
        options: further values, by key: `rounds=3`, `client={"steps": 5}`, `**{"method.name": "fedit"}`.

    Returns:
        The configuration, complete: every option that means something has a value.

    Raises:
        ConfigError: one line that names the key, what was given and what is possible.

    Example:
        >>> load_config("conf/synthetic.yaml", "rounds=3").rounds
        3
    """
    given = flat_arguments(arguments)
    layers = read_layers(given)
    if options:
        layers.append(ConfigLayer("", _tree_of(options)))
    return config_of(layers, Path("runs", name_of(given)))


def settle(config: Config) -> Config:
    """A configuration made in Python, checked and completed like one from YAML; one that is complete stays as it is.

    Raises ConfigError.
    """
    return config_of([ConfigLayer("", _tree_of(dataclasses.asdict(config)))], Path("runs", "default"))


def flat_arguments(arguments: Sequence[str | Path | Sequence[str]]) -> list[str]:
    """Arguments of `load_config` as one list of texts. Raises ConfigError for anything else."""
    flat: list[str] = []
    for argument in arguments:
        if not isinstance(argument, str | Path | list | tuple):
            kind = type(argument).__name__
            raise ConfigError(
                f"{one_line(argument)[:80]} ({kind}) is neither a YAML file, nor a key=value pair, nor a list of them; "
                "values by key are keyword arguments: rounds=3, **{'method.name': 'fedit'}"
            )
        flat += [str(argument)] if isinstance(argument, str | Path) else [str(part) for part in argument]
    return flat


def is_pair(argument: str) -> bool:
    """Whether an argument is a key=value pair; a file that is there is a file even with `=` in its name."""
    return "=" in argument and not Path(argument).is_file()


def name_of(arguments: Sequence[str]) -> str:
    """What the folder of runs is called: the stem of the first file."""
    return next((Path(argument).stem for argument in arguments if not is_pair(argument)), "default")


def read_layers(arguments: Sequence[str]) -> list[ConfigLayer]:
    """The YAML files, then the key=value pairs, unmerged; of their keys only those of the pairs are checked."""
    files = [_read_yaml(argument) for argument in arguments if not is_pair(argument)]
    return [*files, _read_pairs([argument for argument in arguments if is_pair(argument)])]


def merge_layers(layers: Sequence[ConfigLayer], base: DictConfig | None = None) -> DictConfig:
    """The values of these layers, later ones winning, on top of `base` (the defaults). Raises ConfigError."""
    config = base if base is not None else OmegaConf.structured(Config)
    plugins = [OmegaConf.select(layer.values, "plugins") for layer in layers]
    given = next((names for names in reversed(plugins) if names is not None), config.plugins)
    if isinstance(given, ListConfig):  # anything else is an error below
        registry.load_plugins([str(name) for name in given])
    for layer in layers:
        config = _merge(config, layer.values, layer.origin) if layer.values else config
    return config


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
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # a number, or an array of them
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def _read_yaml(argument: str) -> ConfigLayer:
    file = find_configuration(argument)
    if file is None and Path(argument).is_dir():
        raise ConfigError(f"{argument} is a folder; name a YAML file")
    if file is None:
        hint = did_you_mean(argument.removeprefix("conf/"), shipped_configurations())
        raise ConfigError(
            f"{argument} is neither a YAML file that exists nor a key=value pair; {hint}"
            f"shipped: {', '.join(shipped_configurations())}"
        )
    try:
        content = OmegaConf.load(file)
        of_run = file.read_text(encoding="utf-8").startswith(VERSION_LINE)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{argument} is not readable YAML: {one_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{argument} must hold keys and values, not a {type(content).__name__}")
    if of_run:
        _rename_options(content)
    return ConfigLayer(f"{argument}: ", _with_absolute_paths(content, file.parent))


def _rename_options(written: DictConfig) -> None:
    """Give options in a run's own config.yaml, which an older version may have written, the names they have now."""
    for former, key in former_keys(Config).items():
        group, _, name = former.rpartition(".")
        parent = OmegaConf.select(written, group)
        if isinstance(parent, DictConfig) and name in parent:
            parent[key.rpartition(".")[2]] = parent.pop(name)


def _read_pairs(pairs: Sequence[str]) -> ConfigLayer:
    for pair in pairs:  # one by one: of data=3 and data.source=folder together, the first would vanish
        try:
            alone = OmegaConf.to_container(_with_canonical_values(OmegaConf.from_dotlist([pair]), ""))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{pair}: {one_line(error)}") from error
        for key, value in _entries_of(cast(dict[str, Any], alone)):
            _check_entry(key, value, "")
    values = OmegaConf.from_dotlist(list(pairs))
    return ConfigLayer("", _with_absolute_paths(values, Path.cwd()))


def _tree_of(options: Mapping[str, Any]) -> DictConfig:
    """Values by dotted key as a layer."""
    values = OmegaConf.create({})
    for key, value in options.items():
        given = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        try:
            OmegaConf.update(values, key, _plain(given), merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={one_line(value)}: {first_line(error)}") from error
    return _with_absolute_paths(values, Path.cwd())


def _with_absolute_paths(values: DictConfig, folder: Path) -> DictConfig:
    """Files among the plug-ins by their absolute path, so that the run's own config.yaml finds them from anywhere."""
    plugins = values.get("plugins") if not OmegaConf.is_missing(values, "plugins") else None
    if isinstance(plugins, ListConfig):
        values = copy.deepcopy(values)
        values.plugins = [registry.resolve_plugin(name, folder) if isinstance(name, str) else name for name in plugins]
    return values


def _merge(base: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    """Merge after a check of the keys: OmegaConf names an unknown key, but suggests none."""
    layer = _with_canonical_values(layer, origin)
    for key, value in _entries_of(cast(dict[str, Any], OmegaConf.to_container(layer))):
        _check_entry(key, value, origin)
    given = OmegaConf.select(layer, "model.lora") or {}
    former = base.model.lora.client_ranks
    if "rank" in given and "client_ranks" not in given and former is not None:
        raise ConfigError(
            f"{origin}model.lora.rank={given['rank']} would leave model.lora.client_ranks={list(former)} as it was; "
            "give both, or for clients of one rank set it and model.lora.client_rank_probabilities to null"
        )
    if OmegaConf.select(layer, "method.name") not in (None, base.method.get("name")):
        base = with_values(base, {"method": OmegaConf.create({"name": None})}, replace=True)
    for key in _FREE_GROUPS[1:]:  # an empty group takes back what earlier files have put into it
        given = _select(layer, key)
        if isinstance(given, DictConfig) and not given:
            base = with_values(base, {key: {}}, replace=True)
    try:
        merged = cast(DictConfig, OmegaConf.merge(base, layer))
        OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}{error.full_key}: {first_line(error)}") from error
    return merged


def _with_canonical_values(layer: DictConfig, origin: str) -> DictConfig:
    """The layer with other spellings of values, and lists or distributions of LoRA ranks, replaced by their values."""
    return _with_client_ranks(_with_canonical_spellings(layer), origin)


def _with_canonical_spellings(layer: DictConfig) -> DictConfig:
    changed: dict[str, Any] = {}
    for key, spellings in _spellings().items():
        group, _, name = key.rpartition(".")
        parent = _select(layer, group)
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
    lora = _select(layer, "model.lora")
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


def _select(layer: DictConfig, key: str) -> Any:
    """A group of a layer whose values may be anything; None where a value is in its place."""
    node: Any = layer
    for part in key.split(".") if key else ():
        node = node.get(part) if isinstance(node, DictConfig) and not OmegaConf.is_missing(node, part) else None
    return node


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


def _entries_of(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        yield key, value
        if key not in _FREE_GROUPS and isinstance(value, dict):
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
    if key in _FREE_GROUPS:
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

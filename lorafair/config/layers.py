"""What is given to `load_config`: YAML files, key=value pairs and values from Python, each a layer of values."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorafair import registry
from lorafair.config.entries import FREE_GROUPS, check_entries, with_canonical_values
from lorafair.config.options import former_keys
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, did_you_mean, first_line, one_line
from lorafair.files.shipped import find_configuration, shipped_configurations

_OF_RUN = ("checkpoints", "metrics.csv")  # beside the config.yaml of a run that has begun
VERSION_LINE = "# lorafair "  # so begins config.yaml in the directory of a run; the version follows


@dataclass(frozen=True)
class ConfigLayer:
    """Values given in one place."""

    origin: str  # what the message about a mistake in it begins with, e.g. "conf/demo.yaml: "
    values: DictConfig
    run_folder: Path | None = None  # of the run whose config.yaml this is, where more of the run is there


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


def plain(value: Any) -> Any:
    """The value as YAML has it: paths as texts, tuples as lists, numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # a number, or an array of them
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def _read_yaml(argument: str) -> ConfigLayer:
    file = find_configuration(argument)
    if file is None and Path(argument).is_dir():
        example = f", such as {Path(argument, 'config.yaml')}" if Path(argument, "config.yaml").is_file() else ""
        raise ConfigError(f"{argument} is a folder; name a YAML file{example}")
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
    content = OmegaConf.create(_nested(cast(dict[str, Any], OmegaConf.to_container(content)), f"{argument}: "))
    if of_run:
        _rename_options(content)
    is_beside_run = of_run and any((file.parent / name).exists() for name in _OF_RUN)
    values = _with_absolute_paths(content, file.parent)
    return ConfigLayer(f"{argument}: ", values, file.parent if is_beside_run else None)


def _nested(group: Mapping[Any, Any], origin: str, prefix: str = "") -> dict[Any, Any]:
    """Keys with dots, as they are typed in the command, as groups in groups. Raises ConfigError for one given twice."""
    nested: dict[Any, Any] = {}
    for key, value in group.items():
        name, dot, rest = key.partition(".") if isinstance(key, str) else (key, "", "")
        inner = {rest: value} if dot else value
        where = f"{prefix}{name}"
        if isinstance(inner, dict) and where not in (*FREE_GROUPS, "compare"):
            inner = _nested(inner, origin, f"{where}.")
        _join(nested, {name: inner}, origin, prefix)
    return nested


def _join(group: dict[Any, Any], more: Mapping[Any, Any], origin: str, prefix: str) -> None:
    """Put more entries into a group. Raises ConfigError for one that it has."""
    for name, value in more.items():
        if name not in group:
            group[name] = value
        elif isinstance(value, dict) and isinstance(group[name], dict):
            _join(group[name], value, origin, f"{prefix}{name}.")
        else:
            raise ConfigError(f"{origin}{prefix}{name} is given twice")


def _rename_options(written: DictConfig) -> None:
    """Give options in a run's own config.yaml, which an older version may have written, the names they have now."""
    for former, key in former_keys(Config).items():
        group, _, name = former.rpartition(".")
        parent = OmegaConf.select(written, group)
        if isinstance(parent, DictConfig) and name in parent:
            parent[key.rpartition(".")[2]] = parent.pop(name)


def _literal(pair: str) -> str:
    """The pair with a text as it was typed: YAML would cut a path at ` #`, and take `a: b` for a group."""
    key, _, text = pair.partition("=")
    if text.startswith(("{", "[", '"', "'")):
        return pair
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        parsed = text
    return f"{key}={json.dumps(text)}" if isinstance(parsed, str | dict) and text != parsed else pair


def _read_pairs(given: Sequence[str]) -> ConfigLayer:
    for pair in given:
        key, _, text = pair.partition("=")
        if key and not text.strip():
            raise ConfigError(
                f"{key}= has no value: a variable of the shell may not be set; give one, {key}=null for none, or leave "
                "it out for the default"
            )
    pairs = [_literal(pair) for pair in given]
    for pair in pairs:  # one by one: of data=3 and data.source=folder together, the first would vanish
        try:
            alone = with_canonical_values(OmegaConf.from_dotlist([pair]), "")
            check_entries(alone, "")
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{pair}: {one_line(error)}") from error
    values = OmegaConf.from_dotlist(list(pairs))
    return ConfigLayer("", _with_absolute_paths(values, Path.cwd()))


def layer_of(options: Mapping[str, Any]) -> ConfigLayer:
    """Values by dotted key, from Python."""
    values = OmegaConf.create({})
    for key, value in options.items():
        given = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        try:
            OmegaConf.update(values, key, plain(given), merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={one_line(value)}: {first_line(error)}") from error
    return ConfigLayer("", _with_absolute_paths(values, Path.cwd()))


def _with_absolute_paths(values: DictConfig, folder: Path) -> DictConfig:
    """Files among the plug-ins by their absolute path, so that the run's own config.yaml finds them from anywhere."""
    plugins = values.get("plugins") if not OmegaConf.is_missing(values, "plugins") else None
    if isinstance(plugins, ListConfig):
        values = copy.deepcopy(values)
        values.plugins = [registry.resolve_plugin(name, folder) if isinstance(name, str) else name for name in plugins]
    return values

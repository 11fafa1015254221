"""From a `compare:` section to the comparison it asks for.

    compare:
      methods: {fedit: {}, fair_sgd: {method: {name: lora_fair, solver: sgd}}}    # label: options on top of the common
      settings: {feature: {}, label_skew: {partition: {scheme: dirichlet}}}       # optional; the same for all methods
      seeds: [0, 1, 2]                                                            # or draws: see draws.py
      baseline: fedit                                                             # optional: the first method
      share_training: true                                                        # optional: of runs that begin alike
      tune:                                                                       # optional
        options: {client.learning_rate: [0.001, 0.002]}                           # tried for each method and setting
        seed: 1000                                                                # the first of seeds
        fraction: 0.2                                                             # of the training images, held out
        rounds: 5                                                                 # as many as the runs
      profile: [hospital, phones_4g]                                              # optional: see pricing.py
      target: 60                                                                  # accuracy in %; else what all reach

Nothing heavy is imported, unless a plug-in does.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorafair.comparison.draws import KEYS, Draws, read_draws
from lorafair.comparison.listing import options_text, short_names
from lorafair.comparison.overlaps import check_overlaps, overlap
from lorafair.comparison.plan import REPORT, SECTION, Comparison, Options, Run, Tuning
from lorafair.config.identity import leaves
from lorafair.config.layers import ConfigLayer, flat_arguments, is_pair, read_layers
from lorafair.config.loading import config_of, merge_layers
from lorafair.config.profiles import check_target, read_profile
from lorafair.config.schema import Config
from lorafair.console import format_value
from lorafair.errors import ConfigError, did_you_mean, first_line

_KEYS = ("methods", "settings", "seeds", *KEYS, "baseline", "tune", "share_training", "profile", "target")
_TUNE_KEYS = ("options", "seed", "fraction", "rounds")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
# What no entry may set, and why; a key stands for the group below it, too.
_NOT_IN_ENTRIES = {
    "seed": "the seeds of all runs are compare.seeds",
    "run_dir": "every run gets its own folder in the run_dir of the whole comparison",
    "resume": "a comparison always continues",
    "fabric": "all runs share the processes; set it for all of them, outside compare",
    "plugins": "plug-ins are imported for all runs; name them outside compare",
    "data.validation_fraction": "compare.tune.fraction sets it for the tuning runs",
    SECTION: "comparisons do not nest",
}


def load_comparison(*arguments: str | Path | Sequence[str]) -> Comparison | None:
    """The comparison that one of the YAML files declares; None if none does.

    The configuration of every run is built and checked, except for what `aggregation.registry.build_aggregator` checks.
    Raises ConfigError with one line that names the key.
    """
    given = flat_arguments(arguments)
    of_section = [argument for argument in given if is_pair(argument) and _is_of_section(argument.partition("=")[0])]
    layers = read_layers([argument for argument in given if argument not in of_section])
    files = [argument for argument in given if not is_pair(argument)]
    sections = {}
    for file, layer in zip(files, layers, strict=False):  # the pairs come last and have no section
        if SECTION in layer.values:
            sections[file] = _take_section(layer, file)
    if not sections:
        return None
    if of_section:
        raise ConfigError(f"{of_section[0]}: what is compared stands in the YAML file ({next(iter(sections))})")
    if len(sections) > 1:
        raise ConfigError(f"{' and '.join(sections)} both have a {SECTION}: section; give one of them")
    file, section = next(iter(sections.items()))
    try:
        return dataclasses.replace(_comparison_of(section, layers, file), arguments=tuple(map(str, given)))
    except ConfigError as error:
        if str(error).startswith(SECTION):
            raise ConfigError(f"{file}: {error}") from error
        raise


def has_section(*arguments: str | Path | Sequence[str]) -> bool:
    """Whether one of the YAML files declares a comparison, be it a right one or not. Raises ConfigError."""
    files = [argument for argument in flat_arguments(arguments) if not is_pair(argument)]
    return any(SECTION in layer.values for layer in read_layers(files))


def _take_section(layer: ConfigLayer, file: str) -> Any:
    """The section as plain values, out of the layer."""
    try:
        section = layer.values[SECTION]
        content = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {error.full_key}: {first_line(error)}") from error
    layer.values.pop(SECTION)
    return content


def _comparison_of(section: Any, layers: Sequence[ConfigLayer], file: str) -> Comparison:
    if not isinstance(section, dict):
        raise ConfigError(f"{SECTION}={section} must be a group with {', '.join(_KEYS)}")
    for key in section:
        _check_name(str(key), _KEYS, SECTION)
    methods, settings, draws = _methods(section), _settings(section), read_draws(section, SECTION)
    seeds = tuple(range(draws.number)) if draws else _seeds(section)
    tuning = _tuning(section["tune"], seeds[0]) if section.get("tune") is not None else None
    check_overlaps(methods, settings, tuning, draws, layers, file)
    common = merge_layers(layers)
    folder = common.run_dir if common.run_dir is not None else Path("runs", Path(file).stem)
    return Comparison(
        folder=folder,
        methods=methods,
        settings=settings,
        seeds=seeds,
        baseline=_baseline(section, methods),
        tuning=tuning,
        configs=_configs(methods, settings, tuning, common, folder),
        runs=_runs(folder, tuple(settings), tuple(methods), seeds, tuning, draws),
        draws=draws,
        share_training=_share_training(section),
        profiles=_profiles(section),
        targets=_targets(section),
    )


def _share_training(section: Mapping[str, Any]) -> bool:
    given = section.get("share_training", True)
    if not isinstance(given, bool):
        raise ConfigError(f"{SECTION}.share_training={given} must be true or false")
    return given


def _profiles(section: Mapping[str, Any]) -> tuple[str, ...]:
    """The profiles of the report, files with their whole path. Raises ConfigError for one that cannot be used."""
    given = section.get("profile")
    names = given if isinstance(given, list) else [] if given is None else [given]
    for name in names:
        try:
            read_profile(str(name))
        except ConfigError as error:
            raise ConfigError(f"{SECTION}.profile: {error}") from error
    return tuple(str(Path(str(name)).resolve()) if Path(str(name)).is_file() else str(name) for name in names)


def _targets(section: Mapping[str, Any]) -> tuple[float, ...]:
    given = section.get("target")
    targets = given if isinstance(given, list) else [] if given is None else [given]
    if targets and not section.get("profile"):
        raise ConfigError(f"{SECTION}.target={given} has no effect: it needs {SECTION}.profile")
    return tuple(check_target(target, f"{SECTION}.target") for target in targets)


def _methods(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    methods = _entries(section, "methods", required=True)
    for label, options in methods.items():
        options.setdefault("method.name", label)
    return methods


def _settings(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    settings = _entries(section, "settings", required=False) or {"default": {}}
    for label, options in settings.items():
        if label == REPORT:
            raise ConfigError(f"{SECTION}.settings.{label}: this name is taken by the report's folder; choose another")
        if misplaced := [key for key in options if key.partition(".")[0] == "method"]:
            raise ConfigError(f"{SECTION}.settings.{label} sets {misplaced[0]}, which belongs in {SECTION}.methods")
    return settings


def _baseline(section: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    baseline = str(section.get("baseline", next(iter(methods))))
    if baseline not in methods:
        raise ConfigError(
            f"{SECTION}.baseline={baseline} is none of {SECTION}.methods; {did_you_mean(baseline, methods)}"
            f"methods: {', '.join(methods)}"
        )
    return baseline


def _configs(
    methods: Mapping[str, Options],
    settings: Mapping[str, Options],
    tuning: Tuning | None,
    common: DictConfig,
    folder: Path,
) -> dict[tuple[str, str, int], Config]:
    """The configuration of every method in every setting with every candidate; an error says where it was made."""
    configs: dict[tuple[str, str, int], Config] = {}
    candidates = list(enumerate(tuning.candidates if tuning else ({},)))
    for setting, method, (number, candidate) in itertools.product(settings, methods, candidates):
        layers = [
            _layer(settings[setting], f"{SECTION}.settings.{setting}: "),
            _layer(methods[method], f"{SECTION}.methods.{method}: "),
            _layer(candidate, f"{SECTION}.tune.options: "),
        ]
        try:
            configs[setting, method, number] = config_of(layers, folder, common)
        except ConfigError as error:
            if str(error).startswith(SECTION):
                raise
            where = f"{SECTION}.methods.{method}"
            where += f" with {SECTION}.settings.{setting}" if settings[setting] else ""
            where += f" and {SECTION}.tune.options ({options_text(candidate)})" if candidate else ""
            raise ConfigError(f"{where}: {error}") from error
    return configs


def _runs(
    folder: Path,
    settings: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    tuning: Tuning | None,
    draws: Draws | None,
) -> tuple[Run, ...]:
    runs: list[Run] = []
    for setting, method in itertools.product(settings, methods) if tuning else ():
        assert tuning is not None
        for number, name in enumerate(_folder_names(tuning.candidates)):
            run_dir = folder / setting / "tuning" / f"{method}-{name}"
            runs.append(Run(len(runs), setting, method, tuning.seed, run_dir, number))
    if draws:  # draw by draw, so that what is done is paired at any time
        for draw, setting, method in itertools.product(seeds, settings, methods):
            run_dir = folder / setting / draws.folder_name(method, draw)
            runs.append(Run(len(runs), setting, method, draw, run_dir, None))
        return tuple(runs)
    for setting, method, seed in itertools.product(settings, methods, seeds):
        runs.append(Run(len(runs), setting, method, seed, folder / setting / f"{method}-seed{seed}", None))
    return tuple(runs)


def _folder_names(candidates: Sequence[Options]) -> list[str]:
    """A short file name for each candidate, e.g. learning_rate0.002-steps20."""
    short = short_names(candidates[0])
    names = ["-".join(f"{short[key]}{format_value(value)}" for key, value in c.items()) for c in candidates]
    names = [re.sub(r"[^A-Za-z0-9._+=-]+", "_", name) for name in names]
    alike = {name for name in names if names.count(name) > 1}
    return [f"{name}-{number}" if name in alike else name for number, name in enumerate(names)]


def _entries(section: Mapping[str, Any], key: str, *, required: bool) -> dict[str, dict[str, Any]]:
    """label -> dotted options, of methods or settings."""
    where, given = f"{SECTION}.{key}", section.get(key)
    if given is None and not required:
        return {}
    if given is None or (isinstance(given, dict | list) and not given):
        raise ConfigError(f"{where} {'is empty' if key in section else 'is missing'}; name at least one of the {key}")
    if isinstance(given, list) and key == "methods":
        if repeated := [name for name in given if given.count(name) > 1]:
            raise ConfigError(f"{where}: {repeated[0]} is named twice; give the entries labels of their own")
        given = dict.fromkeys(map(_label_of, given))
    if not isinstance(given, dict):
        kinds = "a list of names or a group" if key == "methods" else "a group"
        raise ConfigError(f"{where}={given} must be {kinds} of labels with their options")
    entries: dict[str, dict[str, Any]] = {}
    for name, options in given.items():
        label = str(name)
        if not _LABEL.fullmatch(label):
            raise ConfigError(f"{where}: {label!r} is no label; it names a folder: letters, digits and . _ + = -")
        if options is not None and not isinstance(options, dict):
            raise ConfigError(f"{where}.{label}={options} must be a group of options, for example {{rounds: 5}}")
        entries[label] = _flat(options or {}, f"{where}.{label}")
    if len({label.lower() for label in entries}) < len(entries):
        raise ConfigError(f"{where}: {', '.join(entries)}: two labels differ only in upper and lower case")
    return entries


def _label_of(name: Any) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"{SECTION}.methods: {name} is no name; in a list give names, options need a group")
    return name


def _flat(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options with dotted keys, from nested or dotted ones; ConfigError for what an entry may not set."""
    flat: dict[str, Any] = {}
    for key, value in leaves(options):
        if key in flat:
            raise ConfigError(f"{where} sets {key} twice")
        flat[key] = value
    for key, (forbidden, reason) in itertools.product(flat, _NOT_IN_ENTRIES.items()):
        if overlap(key, forbidden):
            raise ConfigError(f"{where} sets {key}: {reason}")
    return flat


def _layer(options: Options, origin: str) -> ConfigLayer:
    tree: dict[str, Any] = {}
    for key, value in options.items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            below = node.setdefault(group, {})
            if not isinstance(below, dict):
                raise ConfigError(f"{origin}{group}={below}: {key} is set, too, so {group} is a group of options")
            node = below
        if isinstance(node.get(name), dict):
            raise ConfigError(f"{origin}{key}={value}: {key} is a group of options")
        node[name] = value
    return ConfigLayer(origin, OmegaConf.create(tree))


def _seeds(section: Mapping[str, Any]) -> tuple[int, ...]:
    seeds, where = section.get("seeds"), f"{SECTION}.seeds"
    if seeds is None:
        raise ConfigError(f"{where} is missing; for example seeds: [0, 1, 2], or draws: 200")
    if not isinstance(seeds, list) or not seeds or not all(_is_seed(seed) for seed in seeds):
        raise ConfigError(f"{where}={seeds} must be a list of at least one whole number, 0 or more")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}={seeds}: name each seed once")
    return tuple(seeds)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tuning(section: Any, first_seed: int) -> Tuning:
    where = f"{SECTION}.tune"
    if not isinstance(section, dict):
        raise ConfigError(f"{where}={section} must be a group with {', '.join(_TUNE_KEYS)}")
    for key in section:
        _check_name(str(key), _TUNE_KEYS, where)
    seed, fraction, rounds = section.get("seed", first_seed), section.get("fraction", 0.2), section.get("rounds")
    if not _is_seed(seed):
        raise ConfigError(f"{where}.seed={seed} must be a whole number, 0 or more")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(f"{where}.fraction={fraction} must be between 0 and 1")
    if rounds is not None and (not _is_seed(rounds) or rounds < 1):
        raise ConfigError(f"{where}.rounds={rounds} must be a whole number, at least 1")
    return Tuning(_grid(section.get("options"), f"{where}.options"), seed, float(fraction), rounds)


def _grid(given: Any, where: str) -> dict[str, tuple[Any, ...]]:
    """The values to try of each option."""
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{where}={given} must name options with the values to try, each as a list")
    options = _flat(given, where)
    for key, values in options.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {key}={values} must be a list of the values to try")
        if any(values.count(value) > 1 for value in values):
            raise ConfigError(f"{where}: {key}={values}: name each value once")
        if overlap(key, "method.name") or overlap(key, "rounds"):
            raise ConfigError(f"{where}: {key} cannot be tuned")
    return {key: tuple(values) for key, values in options.items()}


def _check_name(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        raise ConfigError(f"there is no {where}.{name}; {did_you_mean(name, known)}possible: {', '.join(known)}")


def _is_of_section(key: str) -> bool:
    return key.partition(".")[0] == SECTION

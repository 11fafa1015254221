"""A comparison: which runs a `compare:` section asks for, which of them are done, and what tuning has chosen.

    compare:
      methods: {fedit: {}, fair_sgd: {method: {name: lora_fair, solver: sgd}}}    # label: options on top of the common
      settings: {feature: {}, label_skew: {partition: {scheme: dirichlet}}}       # optional; the same for all methods
      seeds: [0, 1, 2]
      baseline: fedit                                                             # optional: the first method
      tune:                                                                       # optional
        options: {client.learning_rate: [0.001, 0.002]}                           # tried for each method and setting
        seed: 1000                                                                # the first of seeds
        fraction: 0.2                                                             # of the training images, held out
        rounds: 5                                                                 # as many as the runs

Nothing heavy is imported. Whether a run is done is read from its folder and nowhere else, so that any number of jobs
can work on a comparison.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorafair import __version__
from lorafair.config import (
    Config,
    ConfigError,
    Layer,
    config_of,
    load_config,
    merge_layers,
    numeric_settings,
    read_layers,
)
from lorafair.tables import table

State = Literal["done", "unfinished", "failed", "waiting for tuning"]
Options = Mapping[str, Any]  # dotted key -> value

SECTION = "compare"
FAILED = "failed.txt"
REPORT = "report"  # the folder of the report's TensorBoard events
_KEYS = ("methods", "settings", "seeds", "baseline", "tune")
_TUNE_KEYS = ("options", "seed", "fraction", "rounds")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
# What no entry may set, and why; a key stands for the group below it, too.
_NOT_IN_ENTRIES = {
    "seed": "the seeds of all runs are compare.seeds",
    "run_dir": "every run gets its own folder in the run_dir of the whole comparison",
    "resume": "a comparison always continues",
    "fabric": "all runs share the processes; set it for all of them, outside compare",
    "data.validation_fraction": "compare.tune.fraction sets it for the tuning runs",
    SECTION: "comparisons do not nest",
}


@dataclass(frozen=True)
class Tuning:
    """A grid that is tried alike for each method and setting, on held-out training images."""

    options: Mapping[str, tuple[Any, ...]]
    seed: int
    fraction: float
    rounds: int | None

    @property
    def candidates(self) -> tuple[dict[str, Any], ...]:
        """Every combination of the options' values, the last option changing fastest."""
        return tuple(
            dict(zip(self.options, values, strict=True)) for values in itertools.product(*self.options.values())
        )


@dataclass(frozen=True)
class Run:
    """One run of a comparison. Which options a final run has may depend on tuning: `Comparison.config`."""

    index: int
    setting: str
    method: str
    seed: int
    folder: Path
    candidate: int | None  # of a tuning run, the number of its combination of options; None: a final run

    @property
    def name(self) -> str:
        """For lines on the console."""
        kind = "" if self.candidate is None else " (tuning)"
        return f"{self.setting} / {self.folder.name}{kind}"


@dataclass(frozen=True)
class Choice:
    """What tuning says about one method in one setting, all runs of its grid being done or failed."""

    best: int | None  # the candidate; None: all failed
    accuracies: tuple[float | None, ...]  # mean accuracy of each candidate on the held-out images; None: failed
    failures: tuple[str, ...]  # one line for each failed candidate


@dataclass(frozen=True)
class Comparison:
    """The runs to compare."""

    folder: Path
    methods: Mapping[str, Options]
    settings: Mapping[str, Options]
    seeds: tuple[int, ...]
    baseline: str
    tuning: Tuning | None
    configs: Mapping[tuple[str, str, int], Config] = field(repr=False)  # (setting, method, candidate), first seed
    runs: tuple[Run, ...] = field(repr=False)  # tuning runs first

    @property
    def candidates(self) -> tuple[dict[str, Any], ...]:
        """The combinations of tuned options; a single empty one without tuning."""
        return self.tuning.candidates if self.tuning else ({},)

    @property
    def final_runs(self) -> tuple[Run, ...]:
        """The runs that are reported."""
        return tuple(run for run in self.runs if run.candidate is None)

    def tuning_runs(self, setting: str, method: str) -> tuple[Run, ...]:
        """The runs of a grid, in the order of `candidates`; none without tuning."""
        return tuple(r for r in self.runs if r.candidate is not None and (r.setting, r.method) == (setting, method))

    def config(self, run: Run, candidate: int | None = None) -> Config:
        """The run's configuration; of a final run, with the options of this candidate (the first)."""
        number = run.candidate if run.candidate is not None else candidate or 0
        config = self.configs[run.setting, run.method, number]
        config = dataclasses.replace(config, seed=run.seed, run_dir=run.folder)
        if run.candidate is None or self.tuning is None:
            return config
        data = dataclasses.replace(config.data, validation_fraction=self.tuning.fraction)
        return dataclasses.replace(config, data=data, rounds=self.tuning.rounds or config.rounds)

    def choice(self, setting: str, method: str) -> Choice | None:
        """What tuning has chosen, ties going to the candidate that comes first; None while some of its runs are left.

        Raises ConfigError as `state_of` does.
        """
        if self.tuning is None:
            return Choice(best=0, accuracies=(None,), failures=())
        accuracies: list[float | None] = []
        failures = []
        for run in self.tuning_runs(setting, method):
            state = state_of(run, self.config(run))
            if state == "unfinished":
                return None
            if state == "failed":
                failures.append(f"{run.folder.name}: {failure_of(run)}")
            accuracies.append(None if state == "failed" else float(read_result(run.folder)["mean_accuracy"]))
        finished = [(-accuracy, number) for number, accuracy in enumerate(accuracies) if accuracy is not None]
        return Choice(min(finished)[1] if finished else None, tuple(accuracies), tuple(failures))

    def state(self, run: Run) -> tuple[State, Config | None]:
        """How far a run is, and its configuration where tuning does not stand in between. Raises as `state_of`."""
        if run.candidate is not None:
            return state_of(run, self.config(run)), self.config(run)
        choice = self.choice(run.setting, run.method)
        if choice is None:
            return "waiting for tuning", None
        if choice.best is None:
            return "failed", None
        config = self.config(run, choice.best)
        return state_of(run, config), config

    def waits_for(self, run: Run) -> list[int]:
        """Indices of the tuning runs that are left to do before a final run."""
        if run.candidate is not None:
            return []
        grid = self.tuning_runs(run.setting, run.method)
        return [r.index for r in grid if state_of(r, self.config(r)) == "unfinished"]


def load_comparison(arguments: Sequence[str]) -> Comparison | None:
    """The comparison that one of the YAML files declares; None if none does.

    The configuration of every run is built and checked, except for what `aggregation.build_aggregator` checks. Raises
    ConfigError with one line that names the key.
    """
    layers = read_layers([argument for argument in arguments if not _is_pair_of_section(argument)])
    files = [argument for argument in arguments if "=" not in argument]
    sections = {}
    for file, layer in zip(files, layers, strict=False):  # the pairs come last and have no section
        if SECTION in layer.values:
            try:
                section = layer.values[SECTION]
                is_node = OmegaConf.is_config(section)
                sections[file] = OmegaConf.to_container(section, resolve=True) if is_node else section
            except OmegaConfBaseException as error:
                raise ConfigError(f"{file}: {error.full_key}: {str(error).splitlines()[0]}") from error
            layer.values.pop(SECTION)
    if not sections:
        return None
    if given := [argument for argument in arguments if _is_pair_of_section(argument)]:
        raise ConfigError(f"{given[0]}: what is compared stands in the YAML file ({next(iter(sections))})")
    if len(sections) > 1:
        raise ConfigError(f"{' and '.join(sections)} both have a {SECTION}: section; give one of them")
    file, section = next(iter(sections.items()))
    try:
        return _plan(section, layers, file)
    except ConfigError as error:
        if str(error).startswith(f"{SECTION}"):
            raise ConfigError(f"{file}: {error}") from error
        raise


def check_folders(comparison: Comparison) -> None:
    """Raise ConfigError if a folder holds a run that is not the one this comparison would put there."""
    for run in comparison.runs:
        comparison.state(run)


def state_of(run: Run, config: Config) -> State:
    """How far the run in this folder is.

    Raises ConfigError, which names the folder and the difference, if the folder holds a run with other settings, of
    another version of lorafair, or with more rounds.
    """
    folder = run.folder
    result = read_result(folder) if (folder / "result.json").exists() else None
    _check_version(folder, result)
    if result is not None:
        _check_settings(folder, result.get("config", {}), config)
        if result["rounds"] > config.rounds:
            raise ConfigError(
                f"{folder} holds a run of {result['rounds']} rounds, more than the {config.rounds} of this comparison; "
                "set more rounds, or another run_dir for the comparison"
            )
        if result["rounds"] == config.rounds:
            return "done"
    elif (folder / "config.yaml").exists():
        try:
            begun = load_config([str(folder / "config.yaml")])
        except ConfigError as error:
            raise ConfigError(f"{folder} holds something else than a run of this comparison: {error}") from error
        _check_settings(folder, numeric_settings(begun), config)
    return "failed" if (folder / FAILED).exists() else "unfinished"


def read_result(folder: Path) -> dict[str, Any]:
    """The run's result.json; ConfigError if it cannot be read."""
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text())
        if not isinstance(result, dict) or not {"rounds", "mean_accuracy", "versions"} <= result.keys():
            raise ValueError("it is not the result of a run")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove {folder} to repeat the run") from error
    return result


def failure_of(run: Run) -> str:
    """Why a run failed, as its folder says; empty if it does not."""
    file = run.folder / FAILED
    return file.read_text().strip() if file.exists() else ""


def settings_that_differ(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """`key is x there and y here` for each setting that differs; both as `numeric_settings` gives them."""
    there, here = (dict(_leaves(json.loads(json.dumps(tree, default=str)))) for tree in (theirs, mine))
    return [
        f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def options_text(options: Options) -> str:
    """Options in one line, e.g. `learning_rate=0.002`: the last part of each key, unless two share it."""
    names = _short_names(options)
    return ", ".join(f"{names[key]}={_plain(value)}" for key, value in options.items())


def list_runs(comparison: Comparison) -> str:
    """The table of all runs with their indices and states, and below it what stands in the way of any."""
    rows, problems = [], []
    for run in comparison.runs:
        state: str
        try:
            state, _ = comparison.state(run)
        except ConfigError as error:
            state = "conflict"
            problems.append(f"{run.index}: {error}")
        rows.append([str(run.index), run.setting, run.method, str(run.seed), state, _options_of(comparison, run)])
        if state == "failed" and (message := failure_of(run)):
            problems.append(f"{run.index}: {message}")
    lines = [table(["index", "setting", "method", "seed", "state", "options"], rows, left=6), *problems]
    lines += [f"setting {label}: {_keys_text(options)}" for label, options in comparison.settings.items() if options]
    count = len(comparison.runs)
    return "\n".join([*lines, f"{count} runs (--index 0 to {count - 1}) in {comparison.folder}"])


def _options_of(comparison: Comparison, run: Run) -> str:
    """What sets a run apart from the others of its setting and seed, beyond its label."""
    own = {k: v for k, v in comparison.methods[run.method].items() if (k, v) != ("method.name", run.method)}
    text = [_keys_text(own)] if own else []
    if comparison.tuning is not None:
        options = [options_text(c) for c in comparison.candidates]
        choice = comparison.choice(run.setting, run.method) if run.candidate is None else None
        if run.candidate is not None:
            text.append(f"tuning {options[run.candidate]}")
        elif choice is not None and choice.best is not None:
            text.append(f"tuned {options[choice.best]}")
    return "; ".join(text) or "-"


def _keys_text(options: Options) -> str:
    return ", ".join(f"{key}={_plain(value)}" for key, value in options.items())


# From the section to the plan


def _plan(section: Any, layers: Sequence[Layer], file: str) -> Comparison:
    if not isinstance(section, dict):
        raise ConfigError(f"{SECTION}={section} must be a group with {', '.join(_KEYS)}")
    for key in section:
        _check_name(str(key), _KEYS, SECTION)
    methods = _entries(section, "methods", required=True)
    for label, options in methods.items():
        options.setdefault("method.name", label)
    settings = _entries(section, "settings", required=False) or {"default": {}}
    for label, options in settings.items():
        if label == REPORT:
            raise ConfigError(f"{SECTION}.settings.{label}: this name is taken by the report's folder; choose another")
        if misplaced := [key for key in options if key.partition(".")[0] == "method"]:
            raise ConfigError(f"{SECTION}.settings.{label} sets {misplaced[0]}, which belongs in {SECTION}.methods")
    seeds = _seeds(section)
    baseline = str(section.get("baseline", next(iter(methods))))
    if baseline not in methods:
        raise ConfigError(
            f"{SECTION}.baseline={baseline} is none of {SECTION}.methods; {_near(baseline, methods)}"
            f"methods: {', '.join(methods)}"
        )
    tuning = _tuning(section["tune"], seeds[0]) if section.get("tune") is not None else None
    _check_overlaps(methods, settings, tuning, layers, file)
    common = merge_layers(layers)
    folder = common.run_dir if common.run_dir is not None else Path("runs", Path(file).stem)
    configs = {}
    candidates = tuning.candidates if tuning else ({},)
    for (setting, of_setting), (method, of_method) in itertools.product(settings.items(), methods.items()):
        for number, candidate in enumerate(candidates):
            # The origin says where a mistake was made, not only in which key.
            entries = [
                _layer(of_setting, f"{SECTION}.settings.{setting}: "),
                _layer(of_method, f"{SECTION}.methods.{method}: "),
                _layer(candidate, f"{SECTION}.tune.options: "),
            ]
            try:
                configs[setting, method, number] = config_of(entries, folder, common)
            except ConfigError as error:
                if str(error).startswith(SECTION):
                    raise
                where = f"{SECTION}.methods.{method}" + (f" with {SECTION}.settings.{setting}" if of_setting else "")
                where += f" and {SECTION}.tune.options ({options_text(candidate)})" if candidate else ""
                raise ConfigError(f"{where}: {error}") from error
    return Comparison(
        folder=folder,
        methods=methods,
        settings=settings,
        seeds=seeds,
        baseline=baseline,
        tuning=tuning,
        configs=configs,
        runs=_runs(folder, tuple(settings), tuple(methods), seeds, tuning),
    )


def _runs(
    folder: Path, settings: Sequence[str], methods: Sequence[str], seeds: Sequence[int], tuning: Tuning | None
) -> tuple[Run, ...]:
    runs: list[Run] = []
    for setting, method in itertools.product(settings, methods) if tuning else ():
        assert tuning is not None
        for number, name in enumerate(_folder_names(tuning.candidates)):
            place = folder / setting / "tuning" / f"{method}-{name}"
            runs.append(Run(len(runs), setting, method, tuning.seed, place, number))
    for setting, method, seed in itertools.product(settings, methods, seeds):
        runs.append(Run(len(runs), setting, method, seed, folder / setting / f"{method}-seed{seed}", None))
    return tuple(runs)


def _folder_names(candidates: Sequence[Options]) -> list[str]:
    """A short file name for each candidate, e.g. learning_rate0.002-steps20."""
    short = _short_names(candidates[0])
    names = ["-".join(f"{short[key]}{_plain(value)}" for key, value in c.items()) for c in candidates]
    names = [re.sub(r"[^A-Za-z0-9._+=-]+", "_", name) for name in names]
    alike = {name for name in names if names.count(name) > 1}
    return [f"{name}-{number}" if name in alike else name for number, name in enumerate(names)]


def _short_names(options: Options) -> dict[str, str]:
    last = [key.rpartition(".")[2] for key in options]
    return {key: short if last.count(short) == 1 else key for key, short in zip(options, last, strict=True)}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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
    for key, value in _leaves(options):
        if key in flat:
            raise ConfigError(f"{where} sets {key} twice")
        flat[key] = value
    for key in flat:
        for forbidden, reason in _NOT_IN_ENTRIES.items():
            if _overlap(key, forbidden):
                raise ConfigError(f"{where} sets {key}: {reason}")
    return flat


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _layer(options: Options, origin: str) -> Layer:
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
    return Layer(origin, OmegaConf.create(tree))


def _seeds(section: Mapping[str, Any]) -> tuple[int, ...]:
    seeds, where = section.get("seeds"), f"{SECTION}.seeds"
    if seeds is None:
        raise ConfigError(f"{where} is missing; for example seeds: [0, 1, 2]")
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
    given = section.get("options")
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{where}.options={given} must name options with the values to try, each as a list")
    options = _flat(given, f"{where}.options")
    for key, values in options.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.options: {key}={values} must be a list of the values to try")
        if any(values.count(value) > 1 for value in values):
            raise ConfigError(f"{where}.options: {key}={values}: name each value once")
        if _overlap(key, "method.name") or _overlap(key, "rounds"):
            raise ConfigError(f"{where}.options: {key} cannot be tuned")
    seed, fraction, rounds = section.get("seed", first_seed), section.get("fraction", 0.2), section.get("rounds")
    if not _is_seed(seed):
        raise ConfigError(f"{where}.seed={seed} must be a whole number, 0 or more")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(f"{where}.fraction={fraction} must be between 0 and 1")
    if rounds is not None and (not _is_seed(rounds) or rounds < 1):
        raise ConfigError(f"{where}.rounds={rounds} must be a whole number, at least 1")
    return Tuning({key: tuple(values) for key, values in options.items()}, seed, float(fraction), rounds)


def _check_overlaps(
    methods: Mapping[str, Options],
    settings: Mapping[str, Options],
    tuning: Tuning | None,
    layers: Sequence[Layer],
    file: str,
) -> None:
    """Two places that set the same option: one would silently have no effect."""
    varied: dict[str, str] = {"seed": f"{SECTION}.seeds", "method": f"{SECTION}.methods"}
    places = [(f"{SECTION}.methods.{label}", options) for label, options in methods.items()]
    places += [(f"{SECTION}.settings.{label}", options) for label, options in settings.items()]
    if tuning is not None:
        varied["data.validation_fraction"] = f"{SECTION}.tune"
        places.append((f"{SECTION}.tune.options", tuning.options))
    for place, options in places:
        for key in options:
            if not _overlap(key, "method"):
                varied.setdefault(key, place)
    for layer in layers:
        given = cast(dict[str, Any], OmegaConf.to_container(layer.values))
        for key, value in _leaves(given):
            origin = layer.origin or ""
            if key == "resume" and value != "auto":
                raise ConfigError(
                    f"{origin}resume={value}: a comparison always continues; choose another run_dir instead"
                )
            # A file may have a value that entries change; a pair, or one that every run changes, would be lost.
            always = {"seed", "method", "data.validation_fraction"}
            for other, place in varied.items():
                if _overlap(key, other) and (not origin or other in always):
                    raise ConfigError(
                        f"{origin}{key}={value}: {other} is what the comparison varies ({place} in {file})"
                    )
    for (one, first), (two, second) in itertools.combinations(places, 2):
        if one.split(".")[1] == two.split(".")[1]:
            continue
        for key, other in itertools.product(first, second):
            if _overlap(key, other):
                raise ConfigError(
                    f"{one} and {two} both set {key if len(key) >= len(other) else other}; keep one of them"
                )


def _overlap(key: str, other: str) -> bool:
    """Whether setting one of these keys touches the other: the same, or a group and a part of it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _check_name(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        raise ConfigError(f"there is no {where}.{name}; {_near(name, known)}possible: {', '.join(known)}")


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def _is_pair_of_section(argument: str) -> bool:
    key = argument.partition("=")[0]
    return "=" in argument and key.partition(".")[0] == SECTION


# What is in a folder


def _check_version(folder: Path, result: Mapping[str, Any] | None) -> None:
    versions = []
    if (folder / "config.yaml").exists():
        first = (folder / "config.yaml").read_text().partition("\n")[0]
        versions.append(first.removeprefix("# lorafair ") if first.startswith("# lorafair ") else "an unknown version")
    if result is not None:
        versions.append(str(result["versions"].get("lorafair", "an unknown version")))
    for version in versions:
        if version != __version__:
            raise ConfigError(
                f"{folder} was made by lorafair {version}, this is {__version__}, and a comparison does not mix "
                "versions: choose another run_dir for the comparison, or remove that folder to repeat the run"
            )


def _check_settings(folder: Path, theirs: Mapping[str, Any], config: Config) -> None:
    differences = settings_that_differ(theirs, numeric_settings(config))
    if differences:
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ConfigError(
            f"{folder} holds a run with other settings: {shown}. Choose another run_dir for the comparison, or remove "
            "that folder to repeat the run"
        )

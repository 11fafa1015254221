"""Profiles: how fast the clients and the server of a federation compute, and the networks between them.

A profile is a YAML file; docs/concepts/virtual_time.md describes its keys. Nothing heavy is imported.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorafair.errors import ConfigError, did_you_mean, first_line, one_line
from lorafair.files.shipped import shipped_folder

FOLDER = "profiles"  # of those that come with the package
COMPUTE = ("gflops", "images_per_second")  # a client has one of the two


@dataclass(frozen=True)
class Quantity:
    """A key of a profile: its range, and its value where it is not given."""

    low: float = 0.0
    high: float = math.inf
    zero: bool = False  # may be zero
    default: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value is in the range."""
        return math.isfinite(value) and (value > self.low or (self.zero and value == self.low)) and value <= self.high

    @property
    def text(self) -> str:
        """The range."""
        beginning = f"at least {self.low:g}" if self.zero else f"above {self.low:g}"
        return beginning + ("" if math.isinf(self.high) else f", at most {self.high:g}")


OF_CLIENTS: Mapping[str, Quantity] = {
    "gflops": Quantity(),
    "images_per_second": Quantity(),
    "down_mbps": Quantity(),
    "up_mbps": Quantity(),
    "latency_ms": Quantity(zero=True, default=0.0),
    "availability": Quantity(high=1.0, default=1.0),
    "retry_seconds": Quantity(default=600.0),
    "compute_watts": Quantity(zero=True, default=0.0),
    "network_watts": Quantity(zero=True, default=0.0),
    "idle_watts": Quantity(zero=True, default=0.0),
}
OF_THE_SERVER: Mapping[str, Quantity] = {
    "speed": Quantity(default=1.0),
    "seconds": Quantity(zero=True),
    "watts": Quantity(zero=True, default=0.0),
    "idle_watts": Quantity(zero=True, default=0.0),
}
OF_COSTS: Mapping[str, Quantity] = {
    "per_kwh": Quantity(zero=True, default=0.0),
    "per_gb": Quantity(zero=True, default=0.0),
}
_TOP = ("about", "clients", "kinds", "server", "costs")
_DISTRIBUTIONS = ("lognormal", "uniform", "choice", "trace")
_DRAWN_FOR = ("client", "round")
# What decides who is late. Watts, costs and the server do not.
_DECIDES = ("gflops", "images_per_second", "down_mbps", "up_mbps", "latency_ms", "availability")


@dataclass(frozen=True)
class Value:
    """A number, or the distribution that one is drawn from for each client, or for each client and round."""

    kind: str  # constant, or one of the distributions
    numbers: tuple[float, ...]  # the constant; median and sigma; the ends; the choices; the rows of a trace
    probabilities: tuple[float, ...] = ()  # of choices
    per_round: bool = False
    trace: str = ""  # the file of a trace, as the profile names it

    def at(self, u: float, round_index: int) -> float:
        """The value at the quantile `u` of 0 to 1; of a trace by round, in this round (from 0)."""
        if self.kind == "lognormal":
            median, sigma = self.numbers
            return median * math.exp(sigma * statistics.NormalDist().inv_cdf(min(max(u, 2**-53), 1 - 2**-53)))
        if self.kind == "uniform":
            low, high = self.numbers
            return low + u * (high - low)
        if self.kind == "choice":
            return self.numbers[place_of(u, self.probabilities)]
        row = int(u * len(self.numbers)) + (round_index if self.per_round else 0)
        return self.numbers[row % len(self.numbers)]


@dataclass(frozen=True)
class Profile:
    """The devices and networks of a federation."""

    name: str
    about: str
    kinds: Mapping[str, Mapping[str, Value]]  # of clients: name -> key -> value; one kind without a name, or several
    probabilities: tuple[float, ...]  # of the kinds
    server: Mapping[str, float]
    costs: Mapping[str, float]
    currency: str

    @property
    def needs_flop(self) -> bool:
        """Whether the speed of some client is given in operations, and not in images."""
        return any("gflops" in kind for kind in self.kinds.values())

    @property
    def always_available(self) -> bool:
        """Whether every client takes part whenever it is asked."""
        return all(kind["availability"] == _constant(1.0) for kind in self.kinds.values())

    @property
    def fingerprint(self) -> str:
        """A checksum of all that decides which clients are late or away."""
        decisive = {
            name: {key: vars(value) for key, value in kind.items() if key in _DECIDES}
            for name, kind in self.kinds.items()
        }
        content = json.dumps([decisive, self.probabilities], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def place_of(u: float, probabilities: Sequence[float]) -> int:
    """Which of several choices is at the quantile `u`."""
    reached = 0.0
    for place, probability in enumerate(probabilities):
        reached += probability
        if u < reached:
            return place
    return max(place for place, probability in enumerate(probabilities) if probability > 0)  # rounding


def shipped_profiles() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    return {file.stem: file for file in sorted(shipped_folder(FOLDER).glob("*.yaml"))}


def read_profile(name: str | Path) -> Profile:
    """The profile of this file, or the shipped one of this name. Raises ConfigError with one line."""
    file, shipped = Path(name), shipped_profiles()
    if not file.is_file():
        known = shipped.get(str(name).removesuffix(".yaml"))
        if known is None:
            raise ConfigError(
                f"there is no profile {name}; {did_you_mean(name, shipped)}give a YAML file or one of "
                f"{', '.join(shipped)}"
            )
        file = known
    return _read(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)  # a comparison checks its hundreds of configurations
def _read(file: Path, changed: int) -> Profile:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"the profile {file} cannot be read: {first_line(error)}") from error
    except Exception as error:  # of the YAML reader, in several lines
        raise ConfigError(f"the profile {file} cannot be read: {one_line(error)}") from error
    try:
        return _profile_of(content, file)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _profile_of(content: Any, file: Path) -> Profile:
    if not isinstance(content, dict) or not content.get("clients"):
        raise ConfigError(
            "a profile is a group of keys, and clients is one of them, for example clients: {gflops: 500}"
        )
    _check_keys(content, _TOP, "")
    kinds, probabilities = _kinds(content)
    costs = dict(_group(content, "costs")) if "costs" in content else {}
    currency = str(costs.pop("currency", "EUR"))
    server = _group(content, "server") if "server" in content else {}
    if "speed" in server and "seconds" in server:
        raise ConfigError("server.speed and server.seconds exclude each other: keep one of them")
    return Profile(
        name=file.stem,
        about=one_line(content.get("about") or ""),
        kinds={name: _client_of(kind, f"kinds.{name}." if name else "clients.", file) for name, kind in kinds.items()},
        probabilities=probabilities,
        server=_numbers(server, OF_THE_SERVER, "server."),
        costs=_numbers(costs, OF_COSTS, "costs."),
        currency=currency,
    )


def _kinds(content: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], tuple[float, ...]]:
    """The keys of each kind of clients, on top of those of all clients, and its probability."""
    common = dict(_group(content, "clients"))
    if content.get("kinds") is None:
        return {"": common}, (1.0,)
    given = {str(name): dict(_group(content["kinds"], name, "kinds.")) for name in _group(content, "kinds")}
    weights = [kind.pop("probability", None) for kind in given.values()]
    if not all(_is_number(w) and w >= 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(f"kinds: each kind needs a probability, and all of them sum to 1; they are {weights}")
    kinds = {}
    for name, kind in given.items():
        replaced = COMPUTE if any(key in kind for key in COMPUTE) else ()
        kinds[name] = {key: value for key, value in common.items() if key not in replaced} | kind
    return kinds, tuple(map(float, weights))


def _client_of(given: Mapping[str, Any], where: str, file: Path) -> dict[str, Value]:
    _check_keys(given, tuple(OF_CLIENTS), where)
    if sum(key in given for key in COMPUTE) != 1:
        raise ConfigError(f"{where.rstrip('.')} needs exactly one of {' and '.join(COMPUTE)}")
    values: dict[str, Value] = {}
    for key, quantity in OF_CLIENTS.items():
        if key in given:
            values[key] = _value_of(given[key], quantity, f"{where}{key}", file)
        elif quantity.default is not None:
            values[key] = _constant(quantity.default)
        elif key not in COMPUTE:
            raise ConfigError(f"{where}{key} is missing")
    return values


def _value_of(given: Any, quantity: Quantity, key: str, file: Path) -> Value:
    """A number, or {distribution: ..., per: client or round}."""
    if _is_number(given):
        value = _constant(float(given))
    elif isinstance(given, dict):
        per = given.get("per", "client")
        named = [name for name in given if name != "per"]
        if len(named) != 1 or named[0] not in _DISTRIBUTIONS:
            hint = did_you_mean(named[0], _DISTRIBUTIONS) if named else ""
            raise ConfigError(f"{key}={given}: {hint}give a number or one of {', '.join(_DISTRIBUTIONS)}")
        if per not in _DRAWN_FOR:
            raise ConfigError(f"{key}: per={per} is not possible; it is client or round")
        value = _distribution(named[0], given[named[0]], key, file, per_round=per == "round")
    else:
        raise ConfigError(f"{key}={given}: give a number or one of {', '.join(_DISTRIBUTIONS)}")
    if value.kind == "lognormal" and math.isfinite(quantity.high):
        raise ConfigError(f"{key}: a lognormal has no upper end, and the value must be {quantity.text}")
    checked = value.numbers[:1] if value.kind == "lognormal" else value.numbers
    for number in checked:
        if not quantity.holds(number):
            raise ConfigError(f"{key}={number:g} is out of range: it must be {quantity.text}")
    return value


def _distribution(name: str, given: Any, key: str, file: Path, *, per_round: bool) -> Value:
    if name == "lognormal":
        median, sigma = _two(given, ("median", "sigma"), f"{key}.lognormal")
        if sigma < 0:
            raise ConfigError(f"{key}.lognormal.sigma={sigma:g} must be at least 0: it is that of the logarithm")
        return Value(name, (median, sigma), per_round=per_round)
    if name == "uniform":
        low, high = _two(given, ("low", "high"), f"{key}.uniform")
        if low > high:
            raise ConfigError(f"{key}.uniform: low={low:g} is above high={high:g}")
        return Value(name, (low, high), per_round=per_round)
    if name == "choice":
        if not isinstance(given, dict) or not given or not all(map(_is_number, given.values())):
            raise ConfigError(f"{key}.choice={given} must be a group of values with their probabilities: {{10: 0.7}}")
        try:
            values, probabilities = tuple(map(float, given)), tuple(map(float, given.values()))
        except ValueError as error:
            raise ConfigError(f"{key}.choice: {error}") from error
        if min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
            raise ConfigError(f"{key}.choice: the probabilities {list(probabilities)} must sum to 1")
        return Value(name, values, probabilities, per_round)
    return _trace(given, key, file, per_round=per_round)


def _trace(given: Any, key: str, file: Path, *, per_round: bool) -> Value:
    """One column of a CSV file beside the profile."""
    if not isinstance(given, dict) or set(given) != {"file", "column"}:
        raise ConfigError(f"{key}.trace={given} must have a file (CSV, beside the profile) and a column")
    path, column = file.parent / str(given["file"]), str(given["column"])
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        numbers = tuple(float(row[column]) for row in rows)
    except KeyError as error:
        raise ConfigError(f"{key}.trace: {path} has no column {column}; it has {', '.join(rows[0])}") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ConfigError(f"{key}.trace: {path} cannot be read: {first_line(error)}") from error
    if not numbers:
        raise ConfigError(f"{key}.trace: {path} has no rows")
    return Value("trace", numbers, per_round=per_round, trace=str(given["file"]))


def _two(given: Any, names: tuple[str, str], key: str) -> tuple[float, float]:
    if not isinstance(given, dict) or set(given) != set(names) or not all(map(_is_number, given.values())):
        raise ConfigError(f"{key}={given} must have two numbers, {' and '.join(names)}")
    return float(given[names[0]]), float(given[names[1]])


def _numbers(given: Mapping[str, Any], known: Mapping[str, Quantity], where: str) -> dict[str, float]:
    _check_keys(given, tuple(known), where)
    for key, value in given.items():
        if not _is_number(value) or not known[key].holds(value):
            raise ConfigError(f"{where}{key}={value} must be a number {known[key].text}")
    defaults = {key: quantity.default for key, quantity in known.items() if quantity.default is not None}
    return defaults | {key: float(value) for key, value in given.items()}


def _group(content: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    group = content[key]
    if not isinstance(group, dict):
        raise ConfigError(f"{where}{key}={group} must be a group of keys")
    return group


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known, where)
            raise ConfigError(f"there is no key {where}{key}; {hint}keys: {', '.join(known)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _constant(value: float) -> Value:
    return Value("constant", (value,))


def check_target(given: Any, name: str) -> float:
    """An accuracy in percent to be reached. Raises ConfigError."""
    if not _is_number(given) or not 1 < given <= 100:
        raise ConfigError(f"{name}={given} must be an accuracy in percent, above 1 and at most 100, such as 60")
    return float(given)


def check_profile_options(config: DictConfig) -> None:
    """Raise ConfigError for a profile that cannot be used, and for options about late clients without effect."""
    federation = config.federation
    if federation.profile is None:
        return
    profile = read_profile(federation.profile)
    if federation.over_selection is not None and federation.clients_per_round is None:
        raise ConfigError(
            f"federation.over_selection={federation.over_selection:g} has no effect: all clients take part in every "
            "round; set federation.clients_per_round"
        )
    if federation.over_selection is None and federation.deadline_seconds is None and profile.always_available:
        raise ConfigError(
            f"federation.profile={federation.profile} has no effect: set federation.over_selection or "
            "federation.deadline_seconds, or take a profile with availability (a finished run is priced by lorafair "
            "timeline RUN --profile)"
        )

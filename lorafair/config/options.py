"""How an option is declared: once, with its default, range, condition, meaning and part in a run's identity."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")
_KEY = "option"  # in the metadata of a dataclass field


@dataclass(frozen=True)
class When:
    """The choice that an option belongs to: another option has one of these values, is given, or is not given."""

    key: str  # from the top of the configuration, or of a method's options
    values: tuple[str | bool, ...] = ()  # empty: any value
    given: bool = True

    def holds(self, select: Callable[[str], Any]) -> bool:
        """Whether the choice was made; `select` gives the value of a key."""
        value = select(self.key)
        if self.values:
            return value in self.values
        return (value is not None) == self.given

    def __str__(self) -> str:
        if not self.values:
            return self.key if self.given else f"no {self.key}"
        *others, last = (str(value).lower() if isinstance(value, bool) else value for value in self.values)
        return f"{self.key}={', '.join(others)} or {last}" if others else f"{self.key}={last}"


@dataclass(frozen=True)
class WhenAny(When):
    """One of several options has one of these values, or is given."""

    others: tuple[str, ...] = ()

    def holds(self, select: Callable[[str], Any]) -> bool:
        """Whether one of the choices was made."""
        return any(When(key, self.values).holds(select) for key in (self.key, *self.others))

    def __str__(self) -> str:
        *keys, last = (str(When(key, self.values)) for key in (self.key, *self.others))
        return f"{', '.join(keys)} or {last}"


def when_any(keys: tuple[str, ...], *values: str) -> When:
    """For an option that means something only where one of the options `keys` has one of these values, or is given."""
    return WhenAny(keys[0], values, others=keys[1:])


def when(key: str, *values: str | bool) -> When:
    """For an option that means something only where the option `key` has one of these values."""
    return When(key, values)


def when_given(key: str) -> When:
    """For an option that means something only where the option `key` is given."""
    return When(key)


def when_not_given(key: str) -> When:
    """For an option that means something only where the option `key` is not given."""
    return When(key, given=False)


@dataclass(frozen=True)
class Option:
    """What is declared about an option beside its name, type and default."""

    help: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    reason: str = ""  # explains the range, in the help and in errors
    requires: When | None = None
    conditional_default: Any = None  # its value where `requires` holds and it is not set; may be a function of Config
    conditional_default_text: str = ""  # what such a function gives, for the help
    required: bool = False  # where `requires` holds
    identity: bool = True  # a run and its continuation must agree in it
    is_path: bool = False  # a file or folder, or the path of one beside other values
    formerly: str = ""  # the name that it had before
    names: str = ""  # the registry that knows its values, by name
    spellings: Mapping[Any, Any] = field(default_factory=dict)  # other spellings of its values

    def is_in_range(self, value: Any) -> bool:
        """Whether a number is one of those that are allowed; what is no number is not looked at."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.range_text:
            return True
        low = (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        high = (self.at_most is None or value <= self.at_most) and (self.below is None or value < self.below)
        return low and high and math.isfinite(value)

    @property
    def range_text(self) -> str:
        """What numbers are allowed, e.g. `at least 1`; empty where all are."""
        low, high = self._low, self._high
        if low and high and self.above is not None and self.below is not None:
            return f"between {self.above:g} and {self.below:g}"
        if self.at_least is not None and high:
            return f"from {self.at_least:g} {high}"
        return f"{low} and {high}" if low and high else low or high

    @property
    def _low(self) -> str:
        if self.above is not None:
            return f"above {self.above:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}{self.reason and f' ({self.reason})'}"

    @property
    def _high(self) -> str:
        if self.below is not None:
            return f"up to but not including {self.below:g}"
        if self.at_most is None:
            return ""
        bound = f"{self.at_most:g}{self.reason and f' ({self.reason})'}"
        return f"to {bound}" if self.at_least is not None else f"at most {bound}"


def option(default: T, help: str, **declared: Any) -> T:
    """Declare an option: a field of a configuration dataclass, or of an aggregation method.

    A default of None means "not set". If the condition `requires` does not hold, the option must stay unset, because
    a setting without effect is an error. If it holds and the option is not set, it gets `conditional_default`.

    Args:
        default: The default value.
        help: Its description, for `lorafair options` and `lorafair methods`.
        declared: The other fields of `Option`. For numbers: `at_least`, `above`, `at_most`, `below`, and `reason`,
            which explains the range. `requires`: the condition, made by `when`, `when_given` or `when_not_given`; with
            it `conditional_default`, or `required=True`. `identity=False`: a continued run may change the option.

    Returns:
        What `dataclasses.field` returns, typed as the default.

    Example:
        >>> @dataclass(frozen=True)
        ... class Damped(lorafair.Aggregator):
        ...     damping: float = lorafair.option(0.9, "What B is multiplied by.", above=0, at_most=1)
    """
    metadata = {_KEY: Option(help=" ".join(help.split()), **declared)}
    if isinstance(default, dict | list):
        return cast(T, field(default_factory=lambda: type(default)(default), metadata=metadata))
    return field(default=default, metadata=metadata)


def option_of(declared: dataclasses.Field[Any]) -> Option:
    """What is declared about a field; an empty declaration for a plain one."""
    return cast(Option, declared.metadata.get(_KEY, Option()))


def group_of(declared: dataclasses.Field[Any]) -> type | None:
    """The dataclass of a field that is a group of options; None for an option."""
    factory: Any = declared.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def all_options(owner: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(key, field) of every option of a dataclass and of the groups in it, in the order of declaration."""
    for declared in dataclasses.fields(owner):
        group = group_of(declared)
        if group is None:
            yield f"{prefix}{declared.name}", declared
        else:
            yield from all_options(group, f"{prefix}{declared.name}.")


@functools.cache
def former_keys(owner: type) -> dict[str, str]:
    """The key of each option that had another name, by the key that it had."""
    found = ((key.removesuffix(declared.name), key, option_of(declared)) for key, declared in all_options(owner))
    return {f"{group}{declared.formerly}": key for group, key, declared in found if declared.formerly}


def choices_of(owner: type, name: str) -> tuple[Any, ...]:
    """The values of a field whose type lists them; empty for any other. `auto` beside a number is no such list."""
    kind = types_of(owner)[name]
    members = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    literal = [member for member in members if typing.get_origin(member) is Literal]
    others = [member for member in members if member not in (*literal, type(None))]
    return typing.get_args(literal[0]) if literal and not others else ()


@functools.cache  # a comparison reads hundreds of configurations
def types_of(owner: type) -> dict[str, Any]:
    """The types of a dataclass' fields by name."""
    return typing.get_type_hints(owner)

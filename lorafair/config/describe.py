"""The options as text: types, choices, defaults and meanings, from their declarations."""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafair import registry
from lorafair.config.options import group_of, option_of, types_of
from lorafair.config.schema import Config
from lorafair.console import format_value
from lorafair.errors import ConfigError, did_you_mean

_WIDTH = 110


@dataclass(frozen=True)
class Description:
    """One option."""

    key: str
    kind: str  # its type, or the values it may have
    default: str
    help: str


def describe_options(owner: type = Config, prefix: str = "") -> Iterator[Description]:
    """Every option of a dataclass and of the groups in it, in the order of declaration."""
    for declared in dataclasses.fields(owner):
        group = group_of(declared)
        if group is not None:
            yield from describe_options(group, f"{prefix}{declared.name}.")
            continue
        option = option_of(declared)
        parts = [option.help, option.range_text and f"{option.range_text[0].upper()}{option.range_text[1:]}."]
        if option.requires is not None:
            parts.append(f"Only with {option.requires}.")
        yield Description(
            key=f"{prefix}{declared.name}",
            kind=_names_text(option.names, declared) or _type_text(types_of(owner)[declared.name]),
            default=_default_text(declared),
            help=" ".join(part for part in parts if part),
        )


def groups() -> dict[str, str]:
    """The groups of options with their meaning, in the order of declaration, `model.lora` as a group of its own."""

    def below(owner: type, prefix: str) -> Iterator[tuple[str, str]]:
        for declared in dataclasses.fields(owner):
            group = group_of(declared)
            if group is not None:
                yield f"{prefix}{declared.name}", (group.__doc__ or "").strip().splitlines()[0]
                yield from below(group, f"{prefix}{declared.name}.")

    return dict(below(Config, ""))


def options_text(group: str = "") -> str:
    """The options of a group as text; of all without one. ConfigError for a group that there is not."""
    known = groups()
    if group.partition(".")[0] in ("method", "methods"):
        raise ConfigError("the options of a method are its own; type: lorafair methods NAME")
    found = [d for d in describe_options() if not group or d.key == group or d.key.startswith(f"{group}.")]
    if not found:
        hint = did_you_mean(group, [*known, *(d.key for d in describe_options())])
        raise ConfigError(f"there is no group of options {group}; {hint}groups: {', '.join(known)}")
    return descriptions_text(found)


def descriptions_text(descriptions: Sequence[Description]) -> str:
    """Options one below the other: key, type and default in one line, the meaning below it."""
    lines: list[str] = []
    for described in descriptions:
        default = f" = {described.default}" if described.default else ""
        lines.append(f"  {described.key}  ({described.kind}){default}")
        lines.append(textwrap.fill(described.help, _WIDTH, initial_indent="      ", subsequent_indent="      "))
        lines.append("")
    return "\n".join(lines).rstrip()


def _names_text(names: str, declared: dataclasses.Field[Any]) -> str:
    if not names or not registry.REGISTRIES[names].names:
        return ""
    listed = " | ".join(registry.REGISTRIES[names].names)
    return f"list of {listed}" if declared.default == () else listed


def _default_text(declared: dataclasses.Field[Any]) -> str:
    option = option_of(declared)
    value = declared.default if declared.default_factory is dataclasses.MISSING else declared.default_factory()
    if value is None and option.requires is not None and not option.required:
        default = option.conditional_default
        text = option.conditional_default_text or ("" if default is None else _value_text(default))
        return text and f"{text} (with {option.requires})"
    return "" if value is None or value is dataclasses.MISSING else _value_text(value)


def _value_text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {entry}" for key, entry in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else format_value(value)


def _type_text(kind: Any) -> str:
    """A type in words: `whole number`, `number`, `list of names`, `sgd | adamw`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " | ".join(_type_text(part) for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return "list of names" if element is str else f"list of {_type_text(element)}s"
    if typing.get_origin(kind) is dict:
        return "group of options"
    names = {int: "whole number", float: "number", bool: "true | false", str: "text", Path: "path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))

"""What makes two runs the same run: the settings that change numbers, and where they differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lorafair import registry
from lorafair.config.options import all_options, former_keys, group_of, option_of
from lorafair.config.profiles import read_profile
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, did_you_mean

_PLUGINS = "plugins"  # the group with a sum of each file of a plug-in that defines something of the run
_CORRECTED = "mixed_lora_ranks"  # the version that corrected what the method does with clients of different LoRA ranks
_PROFILE = "profile"  # a sum of what federation.profile says about the clients, where it is set
NOISE = "noise_multiplier"  # that privacy.epsilon needs: it follows from the rounds, clients and steps
_NOT_SET = "not set"
_SHOWN = 40  # characters of a value
_FOLLOWS = ("images", "classes", "frozen_weights")  # follow from settings, whose differences are listed first


def identity_settings(config: Any) -> dict[str, Any]:
    """The settings that change numbers, group by group: what a run and its continuation must agree in."""
    settings: dict[str, Any] = {}
    for declared in dataclasses.fields(config):
        value = getattr(config, declared.name)
        if group_of(declared) is not None:
            if within := identity_settings(value):
                settings[declared.name] = within
        elif option_of(declared).identity:
            settings[declared.name] = dict(value) if isinstance(value, Mapping) else value
    return settings


def run_identity(config: Config) -> dict[str, Any]:
    """`identity_settings`, the sum of each file of a plug-in that defines something of the run, and corrections."""
    named = (
        (registry.METHODS, str(config.method["name"])),
        (registry.SOURCES, config.data.source),
        (registry.PARTITIONS, config.partition.scheme),
        (registry.BACKBONES, config.model.name),
        *((registry.COMPRESSIONS, name) for name in config.compression.names),
    )
    plugins = {f"{names.kind} {name}": names.source_sha256(name) for names, name in named if names.is_from_plugin(name)}
    corrected = {_CORRECTED: _correction_of(config)} if _correction_of(config) else {}
    given = config.federation.profile
    profile = {} if given is None else {_PROFILE: read_profile(given).fingerprint}
    return identity_settings(config) | ({_PLUGINS: plugins} if plugins else {}) | corrected | profile


def _correction_of(config: Config) -> str:
    """The version that gave the method of this run another meaning than an earlier run may have; else empty.

    For clients of different LoRA ranks: FedSVD decomposed with a mean of A that counted padding, LoRA-FAIR did not
    rescale, and its alignment turned factors out of the directions that clients have.
    """
    name, given = str(config.method["name"]), config.method
    changed = name == "fedsvd" or (name == "lora_fair" and (given.get("rescale") is None or bool(given.get("align"))))
    return "0.2" if changed and config.model.lora.client_ranks is not None else ""


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], accept: Collection[str] = ()) -> str:
    """`key is x there and y here` for the settings that differ, three of them in full; empty if none does.

    Both as `run_identity` gives them, theirs perhaps read from a file of an older version: an option that was not there
    yet counts as its default, and one that had another name is the same option. Keys in `accept`, and those of groups
    in it, may differ.
    """
    found = [_difference(key, there, here) for key, (there, here) in _differing(theirs, mine, accept).items()]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def differing_keys(theirs: Mapping[str, Any], mine: Mapping[str, Any], accept: Collection[str] = ()) -> list[str]:
    """The keys of all `differences`."""
    return list(_differing(theirs, mine, accept))


def _differing(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], accept: Collection[str]
) -> dict[str, tuple[object, object]]:
    """key -> its values there and here."""
    # Through JSON, as theirs went: paths are texts there and tuples are lists. An empty group counts as none.
    both = (flatten(json.loads(json.dumps(tree, default=str))) for tree in (theirs, mine))
    there, here = ({key: value for key, value in flat.items() if value != {}} for flat in both)
    renamed = former_keys(Config)
    there = {renamed.get(key, key): value for key, value in there.items()}
    defaults = _defaults()
    return {
        key: (there.get(key, _NOT_SET), here.get(key, _NOT_SET))
        for key in sorted(there.keys() | here.keys(), key=lambda key: (key in _FOLLOWS, key))
        if not _is_in(key, accept) and there.get(key, defaults.get(key)) != here.get(key, defaults.get(key))
    }


def _is_in(key: str, names: Collection[str]) -> bool:
    """Whether a key is one of these names, or in a group that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _difference(key: str, there: object, here: object) -> str:
    if key.startswith(f"{_PLUGINS}.") and _NOT_SET not in (there, here):
        return f"the file that defines {key.removeprefix(f'{_PLUGINS}.')} has changed"
    if key == _PROFILE:
        if _NOT_SET in (there, here):
            return f"federation.profile is set {'here' if there == _NOT_SET else 'there'} alone"
        return "federation.profile gives the clients other speeds, networks or availability"
    if key == _CORRECTED:
        version = here if there == _NOT_SET else there
        return f"what the method does where clients differ in LoRA rank was corrected in lorafair {version}"
    if key == NOISE:
        return (
            f"the noise that privacy.epsilon needs over all rounds is σ={_short(there)} there and {_short(here)} here"
        )
    return f"{key} is {_short(there)} there and {_short(here)} here"


def check_accepted(keys: Collection[str]) -> None:
    """Raise ConfigError for a key in which two runs cannot differ."""
    options = [key for key, declared in all_options(Config) if option_of(declared).identity]
    known = [*_FOLLOWS, _PLUGINS, _CORRECTED, _PROFILE, *options]
    for key in keys:
        if not _is_in(key, known):
            hint = did_you_mean(key, known)
            raise ConfigError(
                f"accept: {key} is not possible; {hint}it takes {', '.join(_FOLLOWS)} and options that change numbers, "
                "as the error of a difference names them"
            )


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested groups as one, with dotted keys."""
    return dict(leaves(tree))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested groups that is no group, or an empty one."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _defaults() -> dict[str, Any]:
    plain = {key: declared.default for key, declared in all_options(Config)}
    return {key: value for key, value in plain.items() if value is not dataclasses.MISSING}


def _short(value: object) -> str:
    return text if len(text := str(value)) <= _SHOWN else f"{text[:_SHOWN]}…"

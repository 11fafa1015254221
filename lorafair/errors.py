"""The errors a user can mend: one line that says what was given, what is possible and the key to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorafairError(Exception):
    """Bad input (configuration, data, weights, checkpoint, cluster); the command prints it as one line and exits 2."""


class ConfigError(LorafairError):
    """The configuration is wrong; the message names the key, what was given and what is possible."""


def did_you_mean(given: object, known: Iterable[str], before: str = "") -> str:
    """`did you mean <before><name>? ` for the known name next to what was given; empty if none is close."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"did you mean {before}{near[0]}? " if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def one_line(text: object) -> str:
    """Any text in one line."""
    return " ".join(str(text).split())

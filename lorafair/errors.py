"""Errors that a user can fix: one line that says what was given, what is possible and the key to change."""

from __future__ import annotations

import difflib
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


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


def check_utf8(names: Iterable[str], what: str = "the argument") -> None:
    """Raise ConfigError for the first name that cannot be written into files as UTF-8, as file names may be any bytes.

    Python then has a lone surrogate in it for each byte that is no text.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            remedy, encoding = "rename the file or folder, or name a symbolic link to it", sys.getfilesystemencoding()
            if encoding != "utf-8":
                remedy = f"Python takes names for {encoding} here; set PYTHONUTF8=1"
            shown = name.encode(errors="backslashreplace").decode()
            raise ConfigError(f"{what} {shown} is not UTF-8; {remedy}") from None


def one_line(text: object) -> str:
    """Any text in one line."""
    return " ".join(str(text).split())


@contextmanager
def of_plugin(what: str) -> Iterator[None]:
    """In the block the code of a plug-in runs: an error is raised as a LorafairError that names it and its line."""
    try:
        yield
    except LorafairError:
        raise
    except Exception as error:
        raise LorafairError(f"{what} failed: {type(error).__name__}: {one_line(error)}{_place_of(error)}") from error


def _place_of(error: BaseException) -> str:
    """` (file, line)` of the last call in a file that is no part of Python, of lorafair or of an installed package."""
    others = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parent), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""

"""What list files and folders of images have in common: rows, their names, and the collection made of them."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorafair.config.schema import DataConfig
from lorafair.console import some
from lorafair.data.files import ImageFiles
from lorafair.data.images import DataError, ImageCollection

SPLITS = ("train", "test")

# What other systems leave in folders, beside names that begin with a dot: macOS, Windows, disks on a network, Linux.
_OF_SYSTEMS = {
    "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found", "__pycache__",
}  # fmt: skip

# An image: path below the root, class, index of its domain, whether it is for the test.
Row = tuple[str, str, int, bool]


def existing_root(config: DataConfig) -> Path:
    """data.root. Raises DataError where it is no folder that can be read."""
    root = config.root
    assert root is not None
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder that exists; data.source={config.source} reads images there")
    return root


def is_of_system(name: str) -> bool:
    """Whether a file or folder belongs to another system's file manager and holds nothing of the user."""
    return name.startswith(".") or name.casefold() in _OF_SYSTEMS


def check_spelling(what: str, places: Mapping[str, Iterable[str]], label_of: Mapping[str, int] | None = None) -> None:
    """Raise DataError for names that are one by meaning and two by spelling: in case, Unicode form or blanks around.

    Args:
        what: The names are names of this: classes or domains.
        places: The names in each place. Two names that differ in case are two where one place has both: letters.
        label_of: The labels of the names, where these make the classes: names of one label are one class.
    """
    spellings: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for place, names in places.items():
        for name in names:
            spellings[_plain(name).casefold()][name].add(place)
    for of_name in spellings.values():
        for first, other in itertools.combinations(sorted(of_name), 2):
            if label_of is not None and label_of[first] == label_of[other]:
                continue
            if _plain(first) == _plain(other) or not of_name[first] & of_name[other]:
                raise DataError(
                    f"{what} {_seen(first)} ({some(sorted(of_name[first]))}) and {_seen(other)} "
                    f"({some(sorted(of_name[other]))}) of data.root have names that differ only in case, blanks or "
                    "Unicode form, and would be two; give them one name"
                )


def collection(
    root: Path, rows: Sequence[Row], domains: tuple[str, ...], label_of: Mapping[str, int], description: str
) -> ImageCollection:
    """`label_of` gives every class its label; labels may leave gaps, which are closed here."""
    class_of: dict[int, str] = {}
    for name, label in label_of.items():
        class_of.setdefault(label, name)  # of two spellings, the first
    known = sorted(class_of)
    return ImageCollection(
        domains=tuple(map(_readable, domains)),
        classes=tuple(_readable(class_of[label]) for label in known),
        images=ImageFiles(root, np.array([os.fsencode(entry) for entry, _, _, _ in rows], np.bytes_)),
        labels=np.searchsorted(known, [label_of[name] for _, name, _, _ in rows]).astype(np.int64),
        domain_of=np.array([domain for _, _, domain, _ in rows], np.int64),
        held_out=np.array([held_out for _, _, _, held_out in rows], bool),
        description=description,
    )


def _readable(name: str) -> str:
    """A name that can be written into every file: bytes that are not UTF-8 as \\x.., with which they stay different."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _seen(name: str) -> str:
    """A name so that its spelling can be seen: two Unicode forms look alike."""
    return repr(name) if name.isascii() else ascii(name)

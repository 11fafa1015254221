"""Image folders with list files, as DomainNet and NICO++ are distributed."""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafair.config.schema import DataConfig
from lorafair.console import format_count, log, some
from lorafair.data.images import DataError, ImageCollection, Source
from lorafair.data.listing import SPLITS, Row, check_spelling, collection, existing_root, is_of_system

_LIST_FOLDERS = ("", "NICO_DG_official", "splits")  # where the list files lie, below the root
_IMAGE_FOLDER = "NICO_DG"  # where entries may begin, below the root
_PROBED = 20  # entries of a list that are looked for to find out where they begin
_DIGITS = 9  # of a label

Entry = tuple[str, str]  # path as it is written in a list, and class


def load_lists(config: DataConfig, seed: int) -> ImageCollection:
    """The images named in <domain>_train.txt and <domain>_test.txt.

    The lists lie in the root, in root/NICO_DG_official or in root/splits. A line is a path and a label; the path begins
    at the root, at the lists' folder or at root/NICO_DG, perhaps with folders of another machine before that, and its
    last folder is the class. Labels order the classes and may leave gaps. Raises DataError naming the file and line of
    an entry that is malformed or contradicts another.
    """
    root = existing_root(config)
    lists, domains = _find_lists(root, config.domains or ())
    used = set(config.domains or domains)
    rows: list[Row] = []
    label_of: dict[str, int] = {}
    classes_in: dict[str, set[str]] = {}
    shortened: list[str] = []
    for (d, domain), split in itertools.product(enumerate(domains), SPLITS):
        file = lists / f"{domain}_{split}.txt"
        entries = list(_read_list(file, label_of))
        if domain in used:
            classes_in[file.name] = {name for _, name in entries}
        way = _where_entries_are(root, lists, entries)
        shortened += [f"{way(entries[0][0])} for {entries[0][0]}"] if way.dropped else []
        rows += [(way(entry), name, d, split == "test") for entry, name in entries]
    if shortened:
        log.info(f"lists: paths are read without their first folders: {shortened[0]}")
    check_spelling("classes", classes_in, label_of)
    _warn_of_shared_labels(label_of)
    _check_repeated([row for row in rows if domains[row[2]] in used], root, lists)
    return collection(root, rows, domains, label_of, f"{config.source}: real images of data.root, split by its lists")


LISTED = Source(load_lists)


def _find_lists(root: Path, wanted: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The folder with the lists, and the domains that have both."""
    halved: dict[str, Path] = {}  # the missing list of a domain that has the other one
    for below in _LIST_FOLDERS:
        lists = root / below
        train, test = (_with_list(lists, split) for split in SPLITS)
        halved |= {name: lists / f"{name}_{'test' if name in train else 'train'}.txt" for name in sorted(train ^ test)}
        missing = [halved[name] for name in wanted or sorted(train ^ test) if name in train ^ test]
        if train & test and not missing:
            return lists, tuple(sorted(train & test))
    if halved:
        file = next((halved[name] for name in wanted if name in halved), next(iter(halved.values())))
        raise DataError(f"{file} is missing; name the domains to use in data.domains, or another data.root")
    raise DataError(
        f"data.root={root} has no lists named <domain>_train.txt and <domain>_test.txt, neither itself nor in "
        f"{' or '.join(_LIST_FOLDERS[1:])}; it holds {', '.join(sorted(os.listdir(root))[:8]) or 'nothing'}"
    )


def _with_list(lists: Path, split: str) -> set[str]:
    """The domains that have a list of this split."""
    files = (file.name for file in lists.glob(f"*_{split}.txt") if not is_of_system(file.name))
    return {name.removesuffix(f"_{split}.txt") for name in files}


def _read_list(file: Path, label_of: dict[str, int]) -> Iterator[Entry]:
    """(path, class) of every line; a class gets its label in `label_of` from the first line that names it."""
    for number, line in enumerate(map(str.strip, _lines(file)), start=1):
        if not line:
            continue
        entry, label = [*line.rsplit(None, 1), ""][:2]
        if "/" not in entry:
            entry = entry.replace("\\", "/")  # a list made on Windows
        name = os.path.basename(os.path.dirname(entry))
        if not (name and label.isdecimal() and len(label) <= _DIGITS):
            raise DataError(f"{file}:{number}: '{line}' is not a path with a class folder, a blank and a label")
        if label_of.setdefault(name, int(label)) != int(label):
            raise DataError(f"{file}:{number}: class {name} has label {label} here, but {label_of[name]} before")
        yield entry, name


def _lines(file: Path) -> list[str]:
    """Of a text in UTF-8 or UTF-16; bytes that are neither stay what they are, since names of files may be any."""
    try:
        content = file.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as PowerShell writes
            text = content.decode("utf-16")
        else:
            text = content.decode("utf-8-sig", errors="surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); it is one of the lists of data.root") from error
    if "\0" in text:
        raise DataError(f"{file} is no text in UTF-8, nor one in UTF-16 that begins as such; save it as UTF-8")
    return re.split(r"\r\n|\r|\n", text)  # splitlines would also split at characters that names may hold


@dataclass(frozen=True)
class _Way:
    """From an entry of a list to a path below the root."""

    root: Path
    dropped: int = 0  # first folders of the entry that are left out
    start: str = ""  # what comes before
    has_other_forms: bool = False  # names beyond ASCII may have another of Unicode's forms on the disk

    def __call__(self, entry: str) -> str:
        """The path of an entry."""
        path = self.start + "/".join(entry.split("/")[self.dropped :])
        if not self.has_other_forms or path.isascii():
            return path
        forms = (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
        return next((form for form in forms if (self.root / form).is_file()), path)


def _where_entries_are(root: Path, lists: Path, entries: Sequence[Entry]) -> _Way:
    """The first way that finds some of a list's images: entries as they are, and then without their first folders."""
    of_lists = "" if lists == root else f"{lists.name}/"
    probed = [entry for entry, _ in entries[:_PROBED]]
    accented = [entry for entry, _ in entries if not entry.isascii()][:_PROBED]
    most = max((entry.count("/") for entry in probed), default=0)
    for dropped, start in itertools.product(range(most), ("", of_lists, f"{_IMAGE_FOLDER}/")):
        way = _Way(root, dropped, start)
        other = _Way(root, dropped, start, has_other_forms=True)
        if any((root / other(entry)).is_file() for entry in probed if entry.count("/") > dropped):
            return way if all((root / way(entry)).is_file() for entry in accented) else other
    return _Way(root)


def _warn_of_shared_labels(label_of: dict[str, int]) -> None:
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, label in label_of.items():
        names_of[label].append(name)
    shared = {label: names for label, names in names_of.items() if len(names) > 1}
    if shared:
        label, names = next(iter(shared.items()))
        log.warning(
            f"{format_count(len(shared), 'label')} of the lists with folders of several names, which are one class: "
            f"label {label} of {some(names)}"
        )


def _check_repeated(rows: Sequence[Row], root: Path, lists: Path) -> None:
    """Raise DataError for images in a training and a test list; warn of those that are listed twice in one.

    An image is the same however its path is written: absolute, with dots in it or through a link to a folder.
    """
    real_folder = functools.cache(os.path.realpath)
    listed: dict[str, list[tuple[str, bool]]] = {}
    for entry, _, _, held_out in rows:
        folder, _, name = posixpath.join(root, entry).rpartition("/")
        listed.setdefault(f"{real_folder(folder)}/{name}", []).append((posixpath.normpath(entry), held_out))
    repeated = [lines[0][0] for lines in listed.values() if len(lines) > 1]
    leaked = [lines[0][0] for lines in listed.values() if len({held_out for _, held_out in lines}) > 1]
    if leaked:
        raise DataError(
            f"in {lists}: {format_count(len(leaked), 'image')} both in a training and in a test list, such as "
            f"{leaked[0]}: results would be too good; take them out of one of the two"
        )
    if repeated:
        log.warning(f"in {lists}: {format_count(len(repeated), 'image')} listed more than once, such as {repeated[0]}")

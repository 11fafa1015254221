"""Image folders: DomainNet and NICO++ with their list files, and any root/domain/class/*.jpg."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorafair.config.schema import DataConfig
from lorafair.console import format_count, log
from lorafair.data.files import ImageFiles
from lorafair.data.images import DataError, ImageCollection, Source
from lorafair.seeding import seeded_numpy

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SPLITS = ("train", "test")
_LIST_FOLDERS = ("", "NICO_DG_official", "splits")  # where the list files lie, below the root
_IMAGE_FOLDER = "NICO_DG"  # where entries may begin, below the root
_PROBED = 20  # entries of a list that are looked for to find out where they begin

# What other systems leave in folders, beside names that begin with a dot.
_OF_SYSTEMS = ("__MACOSX", "Thumbs.db", "desktop.ini")

# An image: path below the root, class, index of its domain, whether it is for the test.
Row = tuple[str, str, int, bool]


def load_lists(config: DataConfig, seed: int) -> ImageCollection:
    """The images named in <domain>_train.txt and <domain>_test.txt, as DomainNet and NICO++ are distributed.

    The lists lie in the root, in root/NICO_DG_official or in root/splits. A line is a path and a label; the path begins
    at the root, at the lists' folder or at root/NICO_DG, and its last folder is the class. Labels order the classes and
    may leave gaps. Raises DataError naming the file and line of an entry that is malformed or contradicts another.
    """
    root = _existing_root(config)
    lists, domains = _find_lists(root, config.domains or ())
    rows: list[Row] = []
    label_of: dict[str, int] = {}
    for (d, domain), split in itertools.product(enumerate(domains), _SPLITS):
        lines = list(_read_list(lists / f"{domain}_{split}.txt", label_of))
        start = _where_entries_begin(root, lists, lines)
        rows += [(f"{start}{entry}", name, d, split == "test") for entry, name in lines]
    _check_repeated([row for row in rows if domains[row[2]] in (config.domains or domains)], lists)
    return _collection(root, rows, domains, label_of, f"{config.source}: real images of data.root, split by its lists")


def load_folder(config: DataConfig, seed: int) -> ImageCollection:
    """The images in root/domain/class, or in root/train/domain/class and root/test/domain/class where both exist.

    Without a given split, the seed draws data.test_fraction of every domain's class for the test: at least one image
    where there are two, and never all. Raises DataError where no image is found.
    """
    root = _existing_root(config)
    has_split = all((root / split).is_dir() for split in _SPLITS)
    bases = _SPLITS if has_split else ("",)
    domains = tuple(sorted({domain for base in bases for domain in _subfolders(root / base)}))
    rows: list[Row] = []
    foreign: list[Path] = []
    for base, (d, domain) in itertools.product(bases, enumerate(domains)):
        for name, files in _classes_in(root / base / domain, foreign):
            held_out = [base == "test"] * len(files)
            if not has_split:
                held_out = _hold_out(len(files), config, seed, domain, name)
            rows += [(str(Path(base, domain, name, file)), name, d, h) for file, h in zip(files, held_out, strict=True)]
    if foreign:
        log.warning(f"{format_count(len(foreign), 'file')} of other systems left out, such as {foreign[0]}")
    if not rows:
        raise DataError(
            f"data.root={root} holds no images as domain/class/image, nor below train and test; "
            f"files end in {', '.join(_SUFFIXES)}"
        )
    label_of = {name: label for label, name in enumerate(sorted({row[1] for row in rows}))}
    split = "split as in its folders" if has_split else f"{config.test_fraction:.0%} of each class held out"
    return _collection(root, rows, domains, label_of, f"folder: the images of data.root, {split}")


LISTED, FOLDER = Source(load_lists), Source(load_folder)


def _collection(
    root: Path, rows: Sequence[Row], domains: tuple[str, ...], label_of: Mapping[str, int], description: str
) -> ImageCollection:
    """`label_of` gives every class its label; labels may leave gaps, which are closed here."""
    class_of: dict[int, str] = {}
    for name, label in label_of.items():
        class_of.setdefault(label, name)  # of two spellings, the first
    known = sorted(class_of)
    return ImageCollection(
        domains=domains,
        classes=tuple(class_of[label] for label in known),
        images=ImageFiles(root, np.array([os.fsencode(entry) for entry, _, _, _ in rows], np.bytes_)),
        labels=np.searchsorted(known, [label_of[name] for _, name, _, _ in rows]).astype(np.int64),
        domain_of=np.array([domain for _, _, domain, _ in rows], np.int64),
        held_out=np.array([held_out for _, _, _, held_out in rows], bool),
        description=description,
    )


def _existing_root(config: DataConfig) -> Path:
    assert config.root is not None
    if not config.root.is_dir():
        raise DataError(
            f"data.root={config.root} is not a folder that exists; data.source={config.source} reads images there"
        )
    return config.root


def _find_lists(root: Path, wanted: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The folder with the lists, and the domains that have both."""
    halved: dict[str, Path] = {}  # the missing list of a domain that has the other one
    for below in _LIST_FOLDERS:
        lists = root / below
        train, test = ({file.name.removesuffix(f"_{s}.txt") for file in lists.glob(f"*_{s}.txt")} for s in _SPLITS)
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


def _read_list(file: Path, label_of: dict[str, int]) -> Iterator[tuple[str, str]]:
    """(path, class) of every line; a class gets its label in `label_of` from the first line that names it."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); it is one of the lists of data.root") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        entry, _, label = line.rpartition(" ")
        entry = entry.rstrip()
        name = os.path.basename(os.path.dirname(entry))
        if not (name and label.isdecimal()):
            raise DataError(f"{file}:{number}: '{line}' is not a path with a class folder, a blank and a label")
        if label_of.setdefault(name, int(label)) != int(label):
            raise DataError(f"{file}:{number}: class {name} has label {label} here, but {label_of[name]} before")
        yield entry, name


def _where_entries_begin(root: Path, lists: Path, lines: Sequence[tuple[str, str]]) -> str:
    """What to put before the paths of a list to get paths below the root: the first folder that has some of them."""
    of_lists = "" if lists == root else f"{lists.name}/"
    for start in ("", of_lists, f"{_IMAGE_FOLDER}/"):
        if any((root / f"{start}{entry}").is_file() for entry, _ in lines[:_PROBED]):
            return start
    return ""


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_of_system(entry.name))


def _is_of_system(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _check_repeated(rows: Sequence[Row], lists: Path) -> None:
    """Raise DataError for images in a training and a test list; warn of those that are listed twice in one."""
    splits_of: dict[str, list[bool]] = {}
    for entry, _, _, held_out in rows:
        splits_of.setdefault(entry, []).append(held_out)
    repeated = [entry for entry, splits in splits_of.items() if len(splits) > 1]
    leaked = [entry for entry in repeated if len(set(splits_of[entry])) > 1]
    if leaked:
        raise DataError(
            f"in {lists}: {format_count(len(leaked), 'image')} both in a training and in a test list, such as "
            f"{leaked[0]}: results would be too good; take them out of one of the two"
        )
    if repeated:
        log.warning(f"in {lists}: {format_count(len(repeated), 'image')} listed more than once, such as {repeated[0]}")


def _classes_in(domain: Path, foreign: list[Path]) -> Iterator[tuple[str, list[str]]]:
    """(class, sorted file names) for every class folder of a domain; files of other systems go to `foreign`."""
    for name in _subfolders(domain) if domain.is_dir() else ():
        files = sorted(file for file in os.listdir(domain / name) if file.lower().endswith(_SUFFIXES))
        foreign += [domain / name / file for file in files if _is_of_system(file)]
        yield name, [file for file in files if not _is_of_system(file)]


def _hold_out(images: int, config: DataConfig, seed: int, domain: str, class_: str) -> list[bool]:
    """Which images of a domain's class are for the test."""
    assert config.test_fraction is not None
    tests = min(max(round(config.test_fraction * images), 1), images - 1)
    chosen = set(seeded_numpy(seed, "hold out", domain, class_).permutation(images)[:tests].tolist())
    return [i in chosen for i in range(images)]

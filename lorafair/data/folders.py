"""Image folders without lists: any root/domain/class/*.jpg."""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafair.config.schema import DataConfig
from lorafair.console import format_count, log, some
from lorafair.data.images import DataError, ImageCollection, Source
from lorafair.data.listing import SPLITS, Row, check_spelling, collection, existing_root, is_of_system
from lorafair.errors import first_line
from lorafair.seeding import seeded_numpy

# What Pillow decodes without help of other programs. Other endings are counted and named.
_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif"),
)
# Folders of this name are a split of the images, and no domain unless data.domains says so.
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


@dataclass
class _LeftOut:
    """What lies in the folders and is not used."""

    of_systems: list[Path] = field(default_factory=list)
    with_other_endings: list[Path] = field(default_factory=list)
    too_deep: list[Path] = field(default_factory=list)  # folders below those of classes, with images
    unsorted: list[Path] = field(default_factory=list)  # images beside the folders of domains
    too_high: list[Path] = field(default_factory=list)  # images beside class folders

    def warn(self) -> None:
        """Count and name each kind."""
        if self.of_systems:
            of_kind = Counter("folder" if path.is_dir() else "file" for path in self.of_systems)
            counts = " and ".join(format_count(count, kind) for kind, count in of_kind.items())
            log.warning(f"{counts} of other systems left out, such as {self.of_systems[0]}")
        if self.with_other_endings:
            endings = Counter(file.suffix or "no ending" for file in self.with_other_endings)
            kinds = [f"{count:,} {ending}" for ending, count in endings.most_common()]
            log.warning(
                f"{format_count(len(self.with_other_endings), 'file')} left out, whose endings are not read "
                f"({some(kinds)}): {some(self.with_other_endings)}"
            )
        if self.too_deep:
            count = format_count(len(self.too_deep), "folder")
            log.warning(f"{count} of images left out, which lie deeper than domain/class: {some(self.too_deep)}")
        if higher := [*self.unsorted, *self.too_high]:
            log.warning(f"{format_count(len(higher), 'image')} left out, in no folder of a class: {some(higher)}")


def load_folder(config: DataConfig, seed: int) -> ImageCollection:
    """The images in root/domain/class, or in root/train/domain/class and root/test/domain/class where both exist.

    Without a given split, the seed draws data.test_fraction of every domain's class for the test: at least one image
    where there are two, and never all. Raises DataError where no image is found, or where folders of another layout
    would be taken for domains or classes.
    """
    root = existing_root(config)
    try:
        return _load(root, config, seed)
    except OSError as error:
        raise DataError(f"a folder of data.root={root} cannot be read: {first_line(error)}") from error


FOLDER = Source(load_folder)


def _load(root: Path, config: DataConfig, seed: int) -> ImageCollection:
    has_split = all((root / split).is_dir() for split in SPLITS)
    bases = SPLITS if has_split else ("",)
    domains_in = {base or "data.root": _subfolders(root / base) for base in bases}
    domains = tuple(sorted({domain for names in domains_in.values() for domain in names}))
    _check_domains(root, domains, config.domains or (), has_split)
    used = set(config.domains or domains)
    check_spelling("domains", {place: used.intersection(names) for place, names in domains_in.items()})
    rows: list[Row] = []
    found: list[Path] = []
    above = [root / base for base in sorted({"", *bases})]
    left_out = _LeftOut(unsorted=[file for folder in above for file in _images_beside(folder)])
    left_out.of_systems += [path for folder in above for path in _of_systems_in(folder)]
    classes_in: dict[str, set[str]] = defaultdict(set)
    for base, (d, domain) in itertools.product(bases, enumerate(domains)):
        for name, files in _classes_in(root / base / domain, left_out):
            classes_in[domain] |= {name} if files else set()
            found += [root / base / domain / name] if files and domain in used else []
            held_out = [base == "test"] * len(files)
            if not has_split:
                held_out = _hold_out(len(files), config, seed, domain, name)
            rows += [(str(Path(base, domain, name, file)), name, d, h) for file, h in zip(files, held_out, strict=True)]
    if not rows:
        raise DataError(
            f"data.root={root} holds no images as domain/class/image, also not below train and test; "
            f"{_what_it_holds(root, left_out)}"
        )
    left_out.warn()
    _check_links(found)
    check_spelling("classes", {domain: names for domain, names in classes_in.items() if domain in used})
    _check_classes({row[1] for row in rows}, root)
    label_of = {name: label for label, name in enumerate(sorted({row[1] for row in rows}))}
    split = "split as in its folders" if has_split else f"{config.test_fraction:.0%} of each class held out"
    return collection(root, rows, domains, label_of, f"folder: the images of data.root, {split}")


def _check_domains(root: Path, domains: Sequence[str], wanted: Sequence[str], has_split: bool) -> None:
    """Raise DataError for folders of a split that would be domains; warn of what lies beside train and test."""
    if has_split:
        others = [name for name in _subfolders(root) if name not in SPLITS]
        if others:
            log.warning(f"data.root={root}: train and test are used, and left out beside them {some(others)}")
    splits = [name for name in domains if name.casefold() in _SPLIT_NAMES and not wanted]
    if splits:
        raise DataError(
            f"data.root={root}: the folders {some(splits)} are named like a split and would be taken for domains; a "
            "split is root/train/domain/class and root/test/domain/class, both; if they are domains, name all in "
            "data.domains"
        )


def _check_links(folders: Sequence[Path]) -> None:
    """Raise DataError for folders of classes that are one: by a link of theirs, or of the domain's or split's."""
    first_of: dict[tuple[int, int], Path] = {}
    for folder in folders:
        status = folder.stat()
        first = first_of.setdefault((status.st_dev, status.st_ino), folder)
        if first is not folder:
            raise DataError(
                f"{first} and {folder} are one folder by a link, whose images would count twice; remove the link, or "
                "name the domains to use in data.domains"
            )


def _check_classes(classes: set[str], root: Path) -> None:
    if all(name.casefold() in _SPLIT_NAMES for name in classes):
        raise DataError(
            f"the classes of data.root={root} would be {some(sorted(classes))}, the names of a split; images are "
            "expected as domain/class/image, or as train/domain/class/image and test/domain/class/image"
        )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_of_system(entry.name))


def _of_systems_in(folder: Path) -> list[Path]:
    """Folders of other systems with images in them, such as pictures made smaller or thrown away."""
    found = (path for path in folder.iterdir() if is_of_system(path.name) and not path.name.startswith("."))
    return sorted(path for path in found if path.is_dir() and _has_images(path))


def _images_beside(folder: Path) -> list[Path]:
    """Images beside the folders of `folder`, where no image is expected."""
    return sorted(
        path for path in folder.iterdir() if _is_image(path.name) and not is_of_system(path.name) and not path.is_dir()
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _classes_in(domain: Path, left_out: _LeftOut) -> Iterator[tuple[str, list[str]]]:
    """(class, sorted file names) for every class folder of a domain; what is not used goes to `left_out`."""
    if not domain.is_dir():
        return
    left_out.too_high += _images_beside(domain)
    left_out.of_systems += _of_systems_in(domain)
    for name in _subfolders(domain):
        yield name, _images_in(domain / name, left_out)


def _images_in(folder: Path, left_out: _LeftOut) -> list[str]:
    files: list[str] = []
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            path = folder / entry.name
            if is_of_system(entry.name):
                left_out.of_systems += [path] if _is_image(entry.name) else []
            elif entry.is_dir():
                left_out.too_deep += [path] if _has_images(path) else []
            elif _is_image(entry.name):
                files.append(entry.name)
            else:
                left_out.with_other_endings.append(path)
    return files


def _has_images(folder: Path) -> bool:
    return any(_is_image(name) and not is_of_system(name) for _, _, names in os.walk(folder) for name in names)


def _what_it_holds(root: Path, left_out: _LeftOut) -> str:
    """Where the images are, for who has given the wrong folder."""
    if left_out.too_deep:
        return (
            f"there are some deeper, in {some(left_out.too_deep)}: give the folder whose folders are the domains, or "
            "move the folders of classes right into those of their domains"
        )
    if left_out.too_high:
        image = left_out.too_high[0]
        return (
            f"there are some higher, such as {image}: put the folders of classes into one of a domain, such as "
            f"{image.parent.with_name('all') / image.parent.name}"
        )
    if left_out.unsorted:
        return (
            f"there are some in no folder of a class, such as {left_out.unsorted[0]}: put each into the folder of its "
            "class, and that into one of a domain, such as all"
        )
    if left_out.with_other_endings:
        return f"there are other files, such as {left_out.with_other_endings[0]}; images end in {' '.join(_SUFFIXES)}"
    return f"it holds {', '.join(sorted(os.listdir(root))[:8]) or 'nothing'}; images end in {' '.join(_SUFFIXES)}"


def _hold_out(images: int, config: DataConfig, seed: int, domain: str, class_: str) -> list[bool]:
    """Which images of a domain's class are for the test."""
    assert config.test_fraction is not None
    tests = min(max(round(config.test_fraction * images), 1), images - 1)
    chosen = set(seeded_numpy(seed, "hold out", domain, class_).permutation(images)[:tests].tolist())
    return [i in chosen for i in range(images)]

"""The image files that a run began with, so that it goes on after a damaged one was repaired or left out.

A damaged file that is complete at both ends is found when it is decoded, which may be in any round. The reader notes
its name beside the run's checkpoints. When the run continues, such a file may have changed or be gone: training images,
test images and clients are those the run began with, without what is gone. Any other change, of images or of the
options that choose them, is one of the run's identity.

Letters: N training images, M test images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from lorafair.config.identity import differences, identity_settings
from lorafair.config.schema import DataConfig
from lorafair.console import format_count, log, some
from lorafair.data.files import ImageFiles, inspect_files
from lorafair.data.images import DataError, ImageData, ImageReader, Split, Subset
from lorafair.data.partition import Client
from lorafair.data.resizing import WithoutAntialias
from lorafair.errors import first_line

RECORD, DAMAGED = "images.npz", "damaged_images.txt"
_NAMES = ("name", "domains", "classes", "description", "fingerprint")  # of ImageData, kept in the record
_SETTINGS = "settings"  # that chose the images, kept there, too
_OF_BATCHES = ("data.augmentation",)  # chooses no images


@dataclass(frozen=True, eq=False)
class Begun:
    """The images a run began with, and which of them are still there."""

    data: ImageData  # all of them, so that they are dealt out to clients as before
    train_there: np.ndarray  # (N,) bool
    test_there: np.ndarray  # (M,) bool
    now: str  # changes with the damaged files: names what is computed from the images

    def without_gone(self, clients: Sequence[Client]) -> tuple[ImageData, tuple[Client, ...]]:
        """Images and clients without the images that are gone. DataError for a client or domain that has none left."""
        position = np.cumsum(self.train_there) - 1
        kept = tuple(
            dataclasses.replace(client, indices=position[client.indices[self.train_there[client.indices]]])
            for client in clients
        )
        train, test = (
            split.select(np.flatnonzero(there))
            for split, there in ((self.data.train, self.train_there), (self.data.test, self.test_there))
        )
        empty = [client.name for client in kept if not len(client.indices)]
        tested = set(test.domains.tolist())
        empty += [f"{name} (test)" for d, name in enumerate(self.data.domains) if d not in tested]
        if empty:
            raise DataError(f"without the damaged images there is none left for {some(empty)}; repair them")
        return dataclasses.replace(self.data, train=train, test=test, fingerprint=self.now), kept


def noting_damage(data: ImageData, folder: Path) -> ImageData:
    """The same images, whose files are noted in `folder` where they cannot be decoded."""

    def of(split: Split) -> Split:
        found = _files_of(split)
        if found is None:
            return split
        files, indices, antialias = found
        noting = dataclasses.replace(files, note=folder / DAMAGED)
        return dataclasses.replace(split, images=Subset(_resized(noting, antialias=antialias), indices))

    return dataclasses.replace(data, train=of(data.train), test=of(data.test))


def _files_of(split: Split) -> tuple[ImageFiles, np.ndarray, bool] | None:
    """The files, which of them are the split's, and whether they are resized with a filter; None for other images."""
    if not isinstance(split.images, Subset):
        return None
    images = split.images.images
    antialias = not isinstance(images, WithoutAntialias)
    files = images.images if isinstance(images, WithoutAntialias) else images
    return (files, split.images.indices, antialias) if isinstance(files, ImageFiles) else None


def _resized(files: ImageFiles, *, antialias: bool) -> ImageReader:
    return files if antialias else WithoutAntialias(files)


def record_images(
    folder: Path, data: ImageData, fingerprint: str, config: DataConfig, seed: int, *, origin: Path | None
) -> None:
    """Write what the run began with into `folder`, where that is not there yet.

    Args:
        folder: Where the checkpoints of the run are.
        data: The images of the run.
        fingerprint: Of the images that it began with.
        config: Chose the images, with the seed.
        seed: Of the run.
        origin: The same of the run it continues, which may be another one; None where it begins.
    """
    record, noted = folder / RECORD, folder / DAMAGED
    splits = {"train": data.train, "test": data.test}
    try:
        if origin is None:
            noted.unlink(missing_ok=True)
        elif origin != folder:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (RECORD, DAMAGED):
                with contextlib.suppress(FileNotFoundError):  # where no image is damaged
                    shutil.copyfile(origin / name, folder / name)
        if (known := _read(record)) and known["fingerprint"] == fingerprint and _chosen_by(known, config, seed):
            return
        arrays = {f"{name}_{what}": array for name, split in splits.items() for what, array in _arrays(split).items()}
        if arrays:
            folder.mkdir(parents=True, exist_ok=True)
            names = {key: getattr(data, key) for key in _NAMES} | {_SETTINGS: _settings(config, seed)}
            arrays["names"] = np.array(json.dumps(names, default=str))
            partial = record.with_suffix(".partial.npz")
            np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
            os.replace(partial, record)
        else:  # no image is read from a file of its own
            record.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{record} cannot be written: {first_line(error)}") from error


def _read(record: Path) -> dict[str, Any] | None:
    """The arrays of a record and the values of its names; None where there is none that can be read."""
    try:
        with np.load(record) as opened:
            arrays: dict[str, Any] = {name: opened[name] for name in opened.files}
        names: dict[str, Any] = json.loads(str(arrays["names"]))
        return arrays | names
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        log.warning(f"{record} is not used, because it cannot be read: {first_line(error)}")
        return None


def _settings(config: DataConfig, seed: int) -> dict[str, Any]:
    """What chooses the images. Without data.root: a folder may move."""
    return {"data": identity_settings(config), "seed": seed}


def _chosen_by(record: Mapping[str, Any], config: DataConfig, seed: int) -> bool:
    return not differences(record.get(_SETTINGS, {}), _settings(config, seed), accept=_OF_BATCHES)


def _arrays(split: Split) -> dict[str, np.ndarray]:
    """Of a split that is read from files; none for another one."""
    found = _files_of(split)
    if found is None:
        return {}
    files, indices, _ = found
    return {
        "entries": files.entries[indices],
        "known": files.known[indices],
        "labels": split.labels,
        "domains": split.domains,
    }


def images_begun_with(folder: Path, config: DataConfig, seed: int) -> Begun | None:
    """The images of the run that is continued.

    None where none was damaged, where others have changed, too, or where the options or the seed choose others.
    """
    noted = _noted(folder)
    if not noted or config.root is None:
        return None
    record = _read(folder / RECORD)
    if record is None or not _chosen_by(record, config, seed):
        return None
    names: dict[str, Any] = {key: tuple(v) if isinstance(v := record[key], list) else v for key in _NAMES}
    entries = np.concatenate([record["train_entries"], record["test_entries"]])
    known = np.concatenate([record["train_known"], record["test_known"]])
    files = ImageFiles(config.root, entries, known=known)
    damaged = np.isin(entries, np.array(sorted(noted), np.bytes_))
    there = ~damaged
    there[damaged] = [files.path(int(i)).is_file() for i in np.flatnonzero(damaged)]
    found = inspect_files([files.path(int(i)) for i in np.flatnonzero(there)])
    now = np.zeros_like(known)
    now[there] = [file.known for file in found]
    if not np.array_equal(now[~damaged], known[~damaged]):
        return None
    _say_what_changed(entries[damaged], there[damaged], now[damaged] != known[damaged])
    count = len(record["train_entries"])
    images = _resized(files, antialias=config.antialias)
    train, test = (
        Split(Subset(images, indices), record[f"{split}_labels"], record[f"{split}_domains"])
        for split, indices in (("train", np.arange(count)), ("test", np.arange(count, len(entries))))
    )
    return Begun(
        data=ImageData(train=train, test=test, **names),
        train_there=there[:count],
        test_there=there[count:],
        now=hashlib.sha256(names["fingerprint"].encode() + files.version(np.flatnonzero(there))).hexdigest(),
    )


def _noted(folder: Path) -> set[bytes]:
    try:
        return set(filter(None, (folder / DAMAGED).read_bytes().split(b"\n")))
    except FileNotFoundError:
        return set()


def _say_what_changed(entries: np.ndarray, there: np.ndarray, changed: np.ndarray) -> None:
    names = [os.fsdecode(entry) for entry in entries]
    gone = [name for name, is_there in zip(names, there, strict=True) if not is_there]
    other = [name for name, is_there, is_other in zip(names, there, changed, strict=True) if is_there and is_other]
    if gone:
        log.warning(f"the run goes on without {format_count(len(gone), 'damaged image')}, left out: {some(gone)}")
    if other:
        log.warning(f"the run goes on with {format_count(len(other), 'image')} as repaired: {some(other)}")

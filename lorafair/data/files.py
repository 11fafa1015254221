"""Image files: reading them, and finding out beforehand which ones cannot be read."""

from __future__ import annotations

import hashlib
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from lorafair.data.images import DataError, resize

T = TypeVar("T")
_THREADS = 16  # waiting for a network file system, not computing
_PART = 256  # files a thread inspects at a time
_NAMED = 3  # unusable files of one kind that a message names
# What Pillow raises for damaged files.
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files below a folder."""

    root: Path
    # Bytes (N,), relative to root. One array, because worker processes would copy the pages of N strings by counting
    # references to them.
    entries: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / os.fsdecode(self.entries[index])

    def read(self, index: int, size: int) -> np.ndarray:
        """As `ImageReader.read`."""
        return self._decoded(index, lambda image: resize(image, size))

    def picture(self, index: int) -> Image.Image:
        """As `PictureReader.picture`."""
        return self._decoded(index, lambda image: image.convert("RGB"))

    def _decoded(self, index: int, use: Callable[[Image.Image], T]) -> T:
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return use(image)
        except _UNDECODABLE as error:
            raise DataError(f"{path} cannot be decoded ({error}); repair it or leave it out of data.root") from error

    def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
        """As `ImageReader.read_many`."""
        return np.stack([self.read(int(i), size) for i in indices])

    def digest(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.digest`, from the relative paths and the sizes of the files."""
        sizes = check_files([self.path(i) for i in indices])
        digest = hashlib.sha256()
        for index, size in zip(indices, sizes, strict=True):
            digest.update(b"%s\0%d\0" % (self.entries[index], size))
        return digest.digest()

    def version(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.version`, from the paths, the sizes and the times of the last change of the files."""
        digest = hashlib.sha256(os.fsencode(self.root.resolve()))
        with ThreadPoolExecutor(_THREADS) as pool:
            for index, status in zip(indices, pool.map(lambda i: self.path(i).stat(), indices), strict=True):
                digest.update(b"%s\0%d\0%d\0" % (self.entries[index], status.st_size, status.st_mtime_ns))
        return digest.digest()


def check_files(paths: Sequence[Path]) -> list[int]:
    """The sizes of the files in bytes, if every one is there and is a complete image.

    Reads the beginning and the end of each file, and decodes only those whose end does not tell that they are complete.
    Raises DataError that counts the unusable files by kind and names the first few.
    """
    parts = [paths[i : i + _PART] for i in range(0, len(paths), _PART)]
    with ThreadPoolExecutor(_THREADS) as pool:
        inspected = [result for results in pool.map(_inspect_all, parts) for result in results]
    faults: dict[str, list[Path]] = defaultdict(list)
    for path, (fault, _) in zip(paths, inspected, strict=True):
        if fault:
            faults[fault].append(path)
    if faults:
        raise DataError(_report(faults, len(paths)))
    return [size for _, size in inspected]


def _report(faults: dict[str, list[Path]], total: int) -> str:
    kinds = [
        f"{len(files)} {fault} ({', '.join(map(str, files[:_NAMED]))}{', …' if len(files) > _NAMED else ''})"
        for fault, files in faults.items()
    ]
    return (
        f"{sum(map(len, faults.values()))} of {total} image files cannot be used: {'; '.join(kinds)}; "
        "repair or remove them, or change data.root"
    )


def _inspect_all(paths: Sequence[Path]) -> list[tuple[str, int]]:
    return [_inspect(path) for path in paths]


def _inspect(path: Path) -> tuple[str, int]:
    """(what is wrong with the file or "", its size in bytes)."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 32))
            tail = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return "missing", 0
    except OSError:
        return "unreadable", 0
    if size == 0:
        return "empty", 0
    return ("" if _looks_complete(head, tail, size) else _decoding_fault(path)), size


def _looks_complete(head: bytes, tail: bytes, size: int) -> bool:
    """Whether the format is known by its first bytes and its end is where it should be."""
    if head.startswith(b"\xff\xd8\xff"):  # JPEG: start and end of image
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return tail.endswith(_PNG_END)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith(b"BM"):
        return 0 < int.from_bytes(head[2:6], "little") <= size
    return False


def _decoding_fault(path: Path) -> str:
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        return "not an image"
    except _UNDECODABLE:
        return "truncated or damaged"
    return ""

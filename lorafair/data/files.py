"""Image files: reading them, and finding out beforehand which ones cannot be read."""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from lorafair.console import EVERY_RANK, format_count, log, some
from lorafair.data.images import DataError, resize
from lorafair.data.pixels import is_deep, to_rgb
from lorafair.errors import first_line

T = TypeVar("T")
_THREADS = 16  # waiting for a network file system, not computing
_PART = 256  # files a thread inspects at a time
# What Pillow raises for damaged files.
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_PNG_END = b"IEND\xaeB`\x82"
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_FRAMES = (0xC0, 0xC1, 0xC2)  # JPEG's segments with the size of the image: baseline, extended, progressive
_BEGINNING = 2048  # bytes at the beginning of a file that are looked at
_END = 32  # bytes at the end of a file that are looked at
_COMPARED = 2000  # files of a split whose content is read to find copies: most images differ at their ends


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files below a folder."""

    root: Path
    # Bytes (N,), relative to root. One array, because worker processes would copy the pages of N strings by counting
    # references to them.
    entries: np.ndarray
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) see `Inspected.known`; 0: not yet
    note: Path | None = None  # a file for the entries of images that could not be decoded, one a line

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
        return self._decoded(index, to_rgb)

    def _decoded(self, index: int, use: Callable[[Image.Image], T]) -> T:
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return use(image)
        except _UNDECODABLE as error:
            if _is_of_system(error):
                raise DataError(
                    f"{path} cannot be read now ({first_line(error)}); when it can be, the same command continues"
                ) from error
            self._write_note(index)
            raise DataError(f"{path} cannot be decoded ({error}); repair it or leave it out of data.root") from error

    def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
        """As `ImageReader.read_many`."""
        return np.stack([self.read(int(i), size) for i in indices])

    def digest(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.digest`, from the relative paths and the sizes of the files."""
        return self._digest(indices, inspect_files([self.path(i) for i in indices]))

    def inspected(self, train: np.ndarray, test: np.ndarray) -> tuple[ImageFiles, tuple[bytes, bytes]]:
        """The same with what is known of both splits, and the `digest` of each; warns of copies in both."""
        of_train, of_test = (inspect_files([self.path(i) for i in indices]) for indices in (train, test))
        self._warn_of_copies(train, test, of_train, of_test)
        known = np.zeros(len(self), np.int64)
        for indices, files in ((train, of_train), (test, of_test)):
            known[indices] = [file.known for file in files]
        return replace(self, known=known), (self._digest(train, of_train), self._digest(test, of_test))

    def _digest(self, indices: np.ndarray, files: Sequence[Inspected]) -> bytes:
        digest = hashlib.sha256()
        for index, file in zip(indices, files, strict=True):
            digest.update(b"%s\0%d\0" % (self.entries[index], file.size))
            if file.is_deep:  # earlier versions read other pixels
                digest.update(b"scaled\0")
        return digest.digest()

    def _write_note(self, index: int) -> None:
        if self.note is not None:
            try:
                self.note.parent.mkdir(parents=True, exist_ok=True)
                with self.note.open("ab") as note:
                    note.write(b"%s\n" % self.entries[index])
            except OSError as error:  # the error to raise is the image's
                log.warning(f"{self.note} cannot be written: {first_line(error)}", extra=EVERY_RANK)

    def _warn_of_copies(
        self, train: np.ndarray, test: np.ndarray, of_train: Sequence[Inspected], of_test: Sequence[Inspected]
    ) -> None:
        many = Counter(file.end for file in (*of_train, *of_test))
        shared = {file.end for file in of_train} & {file.end for file in of_test}
        # First those whose end few images share: where many do, it is the border of a format without compression.
        of_both = [
            sorted(
                (many[file.end], file.end, int(i)) for i, file in zip(indices, files, strict=True) if file.end in shared
            )
            for indices, files in ((train, of_train), (test, of_test))
        ]
        trained, tested = (self._contents([i for _, _, i in alike[:_COMPARED]]) for alike in of_both)
        image_of = {content: i for i, content in reversed(trained.items())}
        copies = sorted((i, image_of[content]) for i, content in tested.items() if content in image_of)
        if copies:
            least = "at least " if any(len(alike) > _COMPARED for alike in of_both) else ""
            test_image, train_image = map(self.path, copies[0])
            log.warning(
                f"{least}{format_count(len(copies), 'test image is a copy', 'test images are copies')} of a training "
                f"image, such as {test_image} of {train_image}: results may be too good"
            )

    def _contents(self, indices: Sequence[int]) -> dict[int, bytes]:
        """A sum of each file's content."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(indices, pool.map(lambda i: _content(self.path(i)), indices), strict=True))

    def version(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.version`, from the paths, the sizes and the times of the last change of the files."""
        digest = hashlib.sha256(os.fsencode(self.root.resolve()))
        with ThreadPoolExecutor(_THREADS) as pool:
            for index, status in zip(indices, pool.map(lambda i: self.path(i).stat(), indices), strict=True):
                digest.update(b"%s\0%d\0%d\0" % (self.entries[index], status.st_size, status.st_mtime_ns))
        return digest.digest()


class Inspected(NamedTuple):
    """What the beginning and the end of a file tell."""

    fault: str = ""  # why the image cannot be used
    size: int = 0  # of the file, in bytes
    end: int = 0  # a hash of size and end: equal for copies, and hardly ever for other images
    is_deep: bool = False  # see `pixels.is_deep`

    @property
    def known(self) -> int:
        """Size and depth in one number, which tells whether an image may have changed."""
        return -self.size if self.is_deep else self.size


def inspect_files(paths: Sequence[Path]) -> list[Inspected]:
    """What is known of the files, if every one is there and is a complete image.

    Reads the header and the end of each file, and decodes only those whose end does not tell that they are complete.
    Raises DataError that counts the unusable files by kind and names the first few.
    """
    parts = [paths[i : i + _PART] for i in range(0, len(paths), _PART)]
    with ThreadPoolExecutor(_THREADS) as pool:
        inspected = [file for of_part in pool.map(_inspect_all, parts) for file in of_part]
    faults: dict[str, list[Path]] = defaultdict(list)
    for path, file in zip(paths, inspected, strict=True):
        if file.fault:
            faults[file.fault].append(path)
    if faults:
        raise DataError(_report(faults, len(paths)))
    return inspected


def _report(faults: dict[str, list[Path]], total: int) -> str:
    kinds = [f"{len(files)} {fault} ({some(files)})" for fault, files in faults.items()]
    return (
        f"{sum(map(len, faults.values()))} of {total} image files cannot be used: {'; '.join(kinds)}; "
        "repair or remove them, or change data.root"
    )


def _inspect_all(paths: Sequence[Path]) -> list[Inspected]:
    return [_inspect(path) for path in paths]


def _inspect(path: Path) -> Inspected:
    try:
        with path.open("rb") as file:
            return _inspect_open(file)
    except (FileNotFoundError, NotADirectoryError):
        return Inspected("missing")
    except Image.DecompressionBombError:
        return Inspected("of more pixels than can be decoded")
    except UnidentifiedImageError:
        return Inspected("not an image")
    except _UNDECODABLE as error:
        return Inspected("unreadable" if _is_of_system(error) else "truncated or damaged")


def _is_of_system(error: Exception) -> bool:
    """Whether it comes from the disk or the network: such errors have a number. Else it is of the file's content."""
    return getattr(error, "errno", None) is not None


def _inspect_open(file: BinaryIO) -> Inspected:
    head = file.read(_BEGINNING)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END))
    end = file.read()
    if size == 0:
        return Inspected("empty")
    ends = hash((size, end))
    is_complete = _looks_complete(head, end, size)
    if is_complete and 0 < _pixels(head) <= (Image.MAX_IMAGE_PIXELS or 0):
        return Inspected("", size, ends)
    file.seek(0)
    with Image.open(file) as image:  # reads the header alone
        if not is_complete:
            image.load()
        return Inspected("", size, ends, is_deep(image.mode))


def _pixels(head: bytes) -> int:
    """How many pixels an ordinary JPEG, or a PNG of 8 bits, has, in a third of the time Pillow needs; 0: ask Pillow."""
    if head.startswith(_PNG) and head[12:16] == b"IHDR" and head[24:25] == b"\x08":
        width, height = struct.unpack(">II", head[16:24])
        return int(width * height)
    place = 2 if head.startswith(_JPEG) else len(head)
    while place + 9 <= len(head) and head[place] == 0xFF:  # a segment: its kind, and its length
        kind, length = struct.unpack(">xBH", head[place : place + 4])
        if kind in _FRAMES:
            height, width = struct.unpack(">HH", head[place + 5 : place + 9])
            return int(width * height)
        place += 2 + length
    return 0


def _looks_complete(head: bytes, tail: bytes, size: int) -> bool:
    """Whether the format is known by its first bytes and its end is where it should be."""
    if head.startswith(_JPEG):  # JPEG: start and end of image
        return tail.endswith(b"\xff\xd9")
    if head.startswith(_PNG):
        return tail.endswith(_PNG_END)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith(b"BM"):
        return 0 < int.from_bytes(head[2:6], "little") <= size
    return False


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()

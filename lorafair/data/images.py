"""Images by index, and a data set made of them.

Letters: N images, S side in pixels.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from lorafair.config.schema import DataConfig
from lorafair.data.pixels import to_rgb
from lorafair.errors import LorafairError

_BLOCK = 64  # images taken out of an array at a time


class DataError(LorafairError):
    """The data are not there, not usable or not enough; the message names the file or the key."""


class ImageReader(Protocol):
    """Images in a fixed order. Cheap to construct and to pickle, so that worker processes can have one each."""

    def __len__(self) -> int: ...

    def read(self, index: int, size: int) -> np.ndarray:
        """Image `index` as RGB, uint8 (size, size, 3): the whole image resized to the square, bicubic.

        Raises DataError naming the image where it cannot be decoded.
        """
        ...

    def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
        """The images `indices` (B,) as `read` gives them: uint8 (B, size, size, 3), a new array."""
        ...


class CheckedReader(ImageReader, Protocol):
    """A reader that can tell in advance whether images will be readable."""

    def digest(self, indices: np.ndarray) -> bytes:
        """A value that changes with the images `indices` (N,) and their order; DataError if one is unusable."""
        ...

    def version(self, indices: np.ndarray) -> bytes:
        """As `digest`, but sees every change that can be seen without decoding: names what is kept of the pixels."""
        ...


@runtime_checkable
class PictureReader(CheckedReader, Protocol):
    """A reader that gives images also before they are resized."""

    def picture(self, index: int) -> Image.Image:
        """Image `index` as RGB, of its own size; DataError as in `read`."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """The training or the test images of all domains."""

    images: ImageReader
    labels: np.ndarray  # (N,) int64
    domains: np.ndarray  # (N,) int64, indices into ImageData.domains

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> Split:
        """The images `indices` (M,), in that order."""
        return Split(Subset.of(self.images, indices), self.labels[indices], self.domains[indices])


@dataclass(frozen=True, eq=False)
class ImageData:
    """What a run trains and tests on."""

    name: str
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    train: Split
    test: Split
    description: str  # one line: which images are real and which are made
    fingerprint: str  # sha256, hexadecimal, of images, labels, order and split


@dataclass(frozen=True, eq=False)
class ImageCollection:
    """All images of a source, before the configuration selects among them.

    Example:
        >>> lorafair.ImageCollection(
        ...     domains=("photo",),
        ...     classes=("cat", "dog"),
        ...     images=ImagesInMemory(np.zeros((4, 32, 32, 3), np.uint8)),
        ...     labels=np.array([0, 1, 0, 1]),
        ...     domain_of=np.array([0, 0, 0, 0]),
        ...     held_out=np.array([False, False, True, True]),
        ...     description="four photos",
        ... )
    """

    domains: tuple[str, ...]
    classes: tuple[str, ...]
    images: CheckedReader
    labels: np.ndarray  # (N,) int64, indices into classes
    domain_of: np.ndarray  # (N,) int64, indices into domains
    held_out: np.ndarray  # (N,) bool, true for test images
    description: str


@dataclass(frozen=True)
class Source:
    """Where images come from: a value of data.source."""

    load: Callable[[DataConfig, int], ImageCollection]  # from the group `data` of the configuration and the seed
    domains: tuple[str, ...] | None = None  # where they are known before anything is loaded


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of another reader."""

    images: ImageReader
    indices: np.ndarray  # (M,) int64

    @staticmethod
    def of(images: ImageReader, indices: np.ndarray) -> Subset:
        """The images `indices`; a subset of a subset refers to the original reader."""
        if isinstance(images, Subset):
            return Subset(images.images, images.indices[indices])
        return Subset(images, np.asarray(indices, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, size: int) -> np.ndarray:
        """As `ImageReader.read`."""
        return self.images.read(int(self.indices[index]), size)

    def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
        """As `ImageReader.read_many`."""
        return self.images.read_many(self.indices[indices], size)


class OneArray(ABC):
    """Images of one side as an array: those of the wanted size are its rows, without a detour."""

    @property
    @abstractmethod
    def pixels(self) -> np.ndarray:
        """(N, S, S, 3) uint8."""

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int, size: int) -> np.ndarray:
        """As `ImageReader.read`."""
        return np.asarray(self.read_many(np.array([index]), size)[0])

    def picture(self, index: int) -> Image.Image:
        """As `PictureReader.picture`."""
        return Image.fromarray(self.pixels[index])

    def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
        """As `ImageReader.read_many`."""
        chosen: np.ndarray = self.pixels[indices]
        if chosen.shape[1] == size:
            return chosen
        return np.stack([resize(Image.fromarray(image), size) for image in chosen])


@dataclass(frozen=True, eq=False)
class ImagesInMemory(OneArray):
    """Images in one array."""

    array: np.ndarray  # (N, S, S, 3) uint8

    @property
    def pixels(self) -> np.ndarray:
        """As `OneArray.pixels`."""
        return self.array

    def digest(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.digest`."""
        digest = hashlib.sha256()
        for first in range(0, len(indices), _BLOCK):
            digest.update(self.array[indices[first : first + _BLOCK]].tobytes())
        return digest.digest()

    version = digest


@dataclass(frozen=True, eq=False)
class MappedImages(OneArray):
    """Images in one .npy file, mapped into memory: processes of a machine share its pages."""

    file: Path  # (N, S, S, 3) uint8

    @property
    def pixels(self) -> np.ndarray:
        """As `OneArray.pixels`."""
        return _mapped(self.file)


@dataclass(frozen=True, eq=False)
class StoredImages(MappedImages):
    """Mapped images whose digests were kept when they were stored."""

    digests: np.ndarray  # (N, 32) uint8, the sha256 of every image

    def digest(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.digest`; from what was stored, without reading the images again."""
        return hashlib.sha256(self.digests[indices].tobytes()).digest()

    version = digest


@functools.lru_cache(maxsize=4)
def _mapped(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file, mmap_mode="r")
    return array.view(np.ndarray)  # what is taken from a memmap would be one


def resize(image: Image.Image, size: int) -> np.ndarray:
    """The whole image as an RGB square, bicubic: uint8 (size, size, 3), a new writable array."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC))

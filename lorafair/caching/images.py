"""The images of a run, decoded and resized once, in one memory-mapped file that later runs find again.

Letters: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from lorafair.caching.shared_array import SharedArray, build_together, cache_folder, lack_of_room
from lorafair.caching.staging import staged
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.config.schema import FOLDER_SOURCES, DataConfig
from lorafair.console import log
from lorafair.data.images import CheckedReader, ImageData, MappedImages, OneArray, Split, Subset
from lorafair.data.loading import ImageSource, Indices
from lorafair.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PART = 64  # images decoded by one rank at a time
_READER = "2"  # changes when files are decoded to other pixels than before; 2: deep grey values are scaled


@dataclass(frozen=True, eq=False)
class ImageSelection:
    """What a run uses of a source, whatever the split: runs that split alike images differently share a file."""

    images: CheckedReader
    indices: Indices  # (N,) ascending

    @staticmethod
    def of(data: ImageData) -> ImageSelection:
        """The images of both splits."""
        train, test = (_subset(split) for split in (data.train, data.test))
        return ImageSelection(train.images, np.union1d(train.indices, test.indices))  # type: ignore[arg-type]

    def file(self, size: int) -> Path:
        """Where they are, or will be."""
        codecs = (PIL.__version__, *(str(features.version(codec)) for codec in ("jpg", "libjpeg_turbo", "webp")))
        parts = (self.images.version(self.indices).hex(), str(size), _READER, *codecs)
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        return cache_folder("images", "data.cache=never") / f"{name}.npy"

    def select(self, split: Split, images: MappedImages) -> Split:
        """The split with its images taken from the file."""
        return replace(split, images=Subset(images, np.searchsorted(self.indices, _subset(split).indices)))


def _subset(split: Split) -> Subset:
    return Subset.of(split.images, np.arange(len(split)))


def cached_images(fabric: Fabric, config: DataConfig, data: ImageData, size: int, *, read_once: bool) -> ImageData:
    """The same images (N, S, S, 3) from a file in the cache, found there or made by the ranks of each node together.

    `data` as they are where they are not to be cached. `read_once`: the run reads every image a single time.

    Raises ConfigError where the cache is demanded and not possible. Call on every rank.
    """
    selection, array = ImageSelection.of(data), None
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero and not _is_unneeded(config, selection, size, read_once):
            array = SharedArray(selection.file(size), (len(selection.indices), size, size, 3), np.uint8, PART)
            reason = "" if array.file.exists() else lack_of_room(array, config.cache_gb, "data.cache_gb")
            if reason and config.cache == "always":
                raise ConfigError(f"data.cache=always is not possible: {reason}")
            if reason:
                log.info(f"decoded images are not cached: {reason}")
                array = None
    array = fabric.broadcast(array)
    if array is None:
        return data
    count = len(selection.indices)
    if fabric.is_global_zero and not array.file.exists():
        log.info(f"images: {count:,} are decoded and resized to {size} pixels once ({array.bytes / 1e9:.1f} GB)")

    def decode(parts: Sequence[Indices]) -> Iterator[NDArray[np.uint8]]:
        source = ImageSource(selection.images, size, config.workers)
        for pixels in source.batches([selection.indices[part] for part in parts]):
            yield pixels.permute(0, 2, 3, 1).contiguous().numpy()

    file = build_together(fabric, array, decode, "decoding images")
    images = MappedImages(file if read_once else staged(fabric, file, config.stage))
    return replace(data, train=selection.select(data.train, images), test=selection.select(data.test, images))


def _is_unneeded(config: DataConfig, selection: ImageSelection, size: int, read_once: bool) -> bool:
    if config.cache == "never" or (isinstance(selection.images, OneArray) and selection.images.pixels.shape[1] == size):
        return True
    return config.cache == "auto" and (read_once or config.source not in FOLDER_SOURCES)

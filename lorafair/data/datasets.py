"""Images from torch data sets, one pair of training and test images a domain.

Letters: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Subset as TorchSubset

from lorafair.console import format_count
from lorafair.data.images import DataError, ImageCollection, resize
from lorafair.data.pixels import to_rgb
from lorafair.errors import first_line

# A data set has a length and gives (image, label) for an index, as torch's map-style ones do.
Domains = Mapping[str, tuple[Any, Any]]
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError)  # what data sets raise for an item


def from_datasets(domains: Domains, *, classes: Sequence[str] | None = None, description: str = "") -> ImageCollection:
    """The images of torch data sets as a source of lorafair.

    Labels are read immediately, from `dataset.targets` if it exists, else from the items. Random transforms of the data
    sets would make the images differ between processes: leave them out, and set data.augmentation.

    Args:
        domains: (training data set, test data set) by the name of the domain. An item is an image and its label: a PIL
            image, an array (H, W, 3) or (H, W) of uint8, or a tensor (3, H, W) or (1, H, W), of uint8 or of floats from
            0 to 1; the label is an integer from 0.
        classes: The names of the classes by label (`dataset.classes` of the first data set, else the labels).
        description: One line that says which images are real and which are generated.

    Returns:
        The collection. Its images are read from the data sets when they are needed.

    Raises:
        DataError: No domain, an empty data set, or a label without a class.

    Example:
        >>> train, test = [(np.zeros((32, 32, 3), np.uint8), 0)] * 8, [(np.zeros((32, 32, 3), np.uint8), 1)] * 2
        >>> lorafair.from_datasets({"photo": (train, test)}, classes=("cat", "dog")).held_out.sum()
        2
    """
    if not domains:
        raise DataError("a source of data sets needs at least one domain: {'photo': (train, test)}")
    datasets = [dataset for pair in domains.values() for dataset in _pair(pair)]
    names = list(domains)
    labels = [_labels(dataset) for dataset in datasets]
    for name, of_domain in zip(np.repeat(names, 2), labels, strict=True):
        if not len(of_domain):
            raise DataError(f"domain {name}: one of its two data sets is empty")
    _check_disjoint(domains)
    all_labels = np.concatenate(labels)
    classes = classes or getattr(datasets[0], "classes", None) or [str(i) for i in range(int(all_labels.max()) + 1)]
    if all_labels.min() < 0 or all_labels.max() >= len(classes):
        raise DataError(
            f"labels go from {all_labels.min()} to {all_labels.max()}, and there are {len(classes)} classes"
        )
    sizes = [len(of_dataset) for of_dataset in labels]
    return ImageCollection(
        domains=tuple(names),
        classes=tuple(map(str, classes)),
        images=DatasetImages(tuple(datasets), np.cumsum([0, *sizes])),
        labels=all_labels,
        domain_of=np.repeat(np.repeat(np.arange(len(names)), 2), sizes),
        held_out=np.repeat(np.tile([False, True], len(names)), sizes),
        description=description or f"data sets of {', '.join(names)}",
    )


@dataclass(frozen=True, eq=False)
class DatasetImages:
    """The images of several data sets, one after the other."""

    datasets: tuple[Any, ...]
    offsets: np.ndarray  # (data sets + 1,) where each begins

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, index: int, size: int) -> np.ndarray:
        """As `ImageReader.read`."""
        return resize(self._image(index), size)

    def picture(self, index: int) -> Image.Image:
        """As `PictureReader.picture`."""
        return to_rgb(self._image(index))

    def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
        """As `ImageReader.read_many`."""
        return np.stack([self.read(int(index), size) for index in indices])

    def digest(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.digest`: of the pixels, since nothing else tells whether they have changed."""
        digest = hashlib.sha256()
        for index in indices:
            image = self._image(int(index))
            digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        return digest.digest()

    version = digest

    def _image(self, index: int) -> Image.Image:
        place = int(np.searchsorted(self.offsets, index, side="right")) - 1
        try:
            item = self.datasets[place][index - int(self.offsets[place])]
            return _picture(item[0])
        except _UNREADABLE as error:
            raise DataError(
                f"image {index - int(self.offsets[place])} of data set {place} cannot be read ({first_line(error)}); "
                "an item is an image and its label"
            ) from error


def _pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError("a domain needs two data sets: (train, test)")
    return pair[0], pair[1]


def _check_disjoint(domains: Domains) -> None:
    """Raise DataError where a data set, or an item of one that torch's `Subset` takes, is in both splits."""
    trained: dict[int, set[int]] = {}
    for train, _ in domains.values():
        base, indices = _items(train)
        trained.setdefault(id(base), set()).update(indices)
    for name, (_, test) in domains.items():
        base, indices = _items(test)
        shared = trained.get(id(base), set()).intersection(indices)
        if shared:
            raise DataError(
                f"domain {name}: {format_count(len(shared), 'item')} of its test data set are also trained on, such as "
                f"item {min(shared)}: results would be too good; give two data sets without common items"
            )


def _items(dataset: Any) -> tuple[Any, Sequence[int]]:
    """The data set that items come from, and which ones: of a `Subset` those it takes."""
    if not isinstance(dataset, TorchSubset):
        return dataset, range(len(dataset))
    base, indices = _items(dataset.dataset)
    return base, [indices[int(i)] for i in dataset.indices]


def _whole(value: Any) -> int:
    if not isinstance(value, str) and int(value) != value:
        raise ValueError(f"{value} is no whole number")
    return int(value)


def _labels(dataset: Any) -> np.ndarray:
    known = getattr(dataset, "targets", None)
    try:
        values = known if known is not None else [dataset[index][1] for index in range(len(dataset))]
        labels = np.asarray([_whole(value) for value in values], np.int64)
    except _UNREADABLE as error:
        raise DataError(
            f"the labels of a data set cannot be read ({first_line(error)}); an item is an image and its label, a "
            "whole number from 0"
        ) from error
    if len(labels) != len(dataset):
        raise DataError(f"a data set of {len(dataset)} images has {len(labels)} targets")
    return labels


def _picture(image: Any) -> Image.Image:
    """A PIL image of what an item holds."""
    if isinstance(image, Image.Image):
        return image
    if hasattr(image, "numpy"):  # a tensor (C, H, W)
        image = np.moveaxis(image.detach().cpu().numpy(), 0, -1) if image.ndim == 3 else image.detach().cpu().numpy()
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN neither
            raise ValueError("its numbers are not between 0 and 1; leave the normalisation out")
        array = np.rint(255 * array).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"an array of {array.dtype} and shape {array.shape} is no image")
    return Image.fromarray(array)

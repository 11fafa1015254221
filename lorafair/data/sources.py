"""The images of a run: a source, and the selection of domains, classes and images that the configuration asks for."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from lorafair.config.schema import DataConfig
from lorafair.data.collection_checks import check_collection, warn_of_uneven_classes
from lorafair.data.datasets import Domains, from_datasets
from lorafair.data.files import ImageFiles
from lorafair.data.images import DataError, ImageCollection, ImageData, Source, Split, Subset
from lorafair.data.resizing import WithoutAntialias
from lorafair.errors import of_plugin
from lorafair.registry import SOURCES
from lorafair.seeding import seeded_numpy

Load = Callable[[DataConfig, int], ImageCollection | Domains]


def register_source(name: str, images: Domains | None = None, *, domains: tuple[str, ...] | None = None) -> Any:
    """Make images a value of data.source.

    Args:
        name: The value to use for data.source.
        images: Torch data sets by domain, `{"photo": (train, test), ...}`; see `from_datasets`. Without it this is a
            decorator for a function that returns such data sets, or an `ImageCollection`, from the group `data` of the
            configuration and the seed. Further options of the function are in `config.options`.
        domains: The names of the domains, if they are known before anything is loaded; mistakes in data.domains are
            then found immediately.

    Returns:
        The decorator; with `images`, nothing.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @lorafair.register_source("mine")
        ... def mine(config, seed):
        ...     return {"photo": (train_photos, test_photos), "sketch": (train_sketches, test_sketches)}
    """
    if images is not None:
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        module = caller.f_globals["__name__"] if caller is not None else "__main__"
        origin = SimpleNamespace(__module__=module, __qualname__=name)
        SOURCES.add(name, Source(lambda config, seed: from_datasets(images), tuple(images)), origin)
        return None

    def register(load: Load) -> Load:
        SOURCES.add(name, Source(lambda config, seed: _collection(load(config, seed), name), domains), origin=load)
        return load

    return register


def _collection(loaded: Any, name: str) -> ImageCollection:
    if isinstance(loaded, ImageCollection):
        return loaded
    if isinstance(loaded, Mapping):
        return from_datasets(loaded)
    raise DataError(
        f"data.source={name} returned a {type(loaded).__name__}; a source returns an ImageCollection, or torch data "
        "sets by domain: {'photo': (train, test)}"
    )


def load_images(config: DataConfig, seed: int) -> ImageData:
    """The training and test images of the configured source, with its domains, classes and numbers of images.

    Domains come in the order of data.domains. Of data.train_images and data.test_images images a domain, every class
    gets the same number as far as it has them (a larger number only adds images); they are drawn with the seed. The
    image files that will be used are checked here, and an unusable one is an error before training begins.

    With data.validation_fraction the test images are left alone and a part of the training images is tested on instead.

    Raises DataError (what is there, and the key to change), FetchError or CacheError.
    """
    with of_plugin(f"data.source={config.source}") if SOURCES.is_from_plugin(config.source) else nullcontext():
        collection = SOURCES[config.source].load(config, seed)
    check_collection(collection, config.source)
    domains = _choose_domains(collection, config)
    classes = _choose_classes(collection, config)
    warn_of_uneven_classes(collection, domains, classes)
    train = _choose_images(collection, domains, len(classes), "train", config.train_images, seed)
    description = collection.description
    if config.validation_fraction is None:
        test = _choose_images(collection, domains, len(classes), "test", config.test_images, seed)
    else:
        train, test = _hold_out_for_validation(collection, domains, train, config, seed)
        description += f"; tested on {config.validation_fraction:.0%} of the training images, held out"
    _check_enough(collection, domains, classes, train, test, config)
    digest = hashlib.sha256(json.dumps([config.source, domains, classes]).encode())
    if isinstance(collection.images, ImageFiles):
        images, digests = collection.images.inspected(train, test)
        collection = dataclasses.replace(collection, images=images)
    else:
        digests = (collection.images.digest(train), collection.images.digest(test))
    for indices, of_images in zip((train, test), digests, strict=True):
        digest.update(of_images)
        digest.update(collection.labels[indices].astype("<i8").tobytes())
        digest.update(collection.domain_of[indices].astype("<i8").tobytes())
    if not config.antialias:
        collection = dataclasses.replace(collection, images=WithoutAntialias.of(collection.images, config.source))
        digest.update(b"without antialias")
    return ImageData(
        name=config.source,
        domains=domains,
        classes=classes,
        train=_split(collection, domains, train),
        test=_split(collection, domains, test),
        description=description,
        fingerprint=digest.hexdigest(),
    )


def _choose_domains(collection: ImageCollection, config: DataConfig) -> tuple[str, ...]:
    for name in config.domains or ():
        if name not in collection.domains:
            raise DataError(
                f"data.domains: {config.source} has no domain {name}; there are {', '.join(collection.domains)}"
            )
    return config.domains or collection.domains


def _choose_classes(collection: ImageCollection, config: DataConfig) -> tuple[str, ...]:
    if config.classes is not None and config.classes > len(collection.classes):
        raise DataError(f"data.classes={config.classes}: {config.source} has {len(collection.classes)} classes")
    return collection.classes[: config.classes]


def _choose_images(
    collection: ImageCollection, domains: tuple[str, ...], classes: int, split: str, limit: int | None, seed: int
) -> np.ndarray:
    """Indices (N,) of a split's images, domain by domain, at most `limit` of each."""
    eligible = (collection.labels < classes) & (collection.held_out == (split == "test"))
    chosen = []
    for name in domains:
        members = np.flatnonzero(eligible & (collection.domain_of == collection.domains.index(name)))
        chosen.append(_limited(collection, members, limit, split, name, seed))
    return np.concatenate(chosen)


def _limited(
    collection: ImageCollection, members: np.ndarray, limit: int | None, split: str, domain: str, seed: int
) -> np.ndarray:
    """At most `limit` of a domain's images `members` (N,), evenly over the classes."""
    if limit is None or limit >= len(members):
        return members
    shuffled = seeded_numpy(seed, "draw", split, domain).permutation(members)
    turns = _turns(collection.labels[shuffled])
    return np.asarray(np.sort(shuffled[np.argsort(turns, kind="stable")[:limit]]))


def _hold_out_for_validation(
    collection: ImageCollection, domains: tuple[str, ...], train: np.ndarray, config: DataConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Deal the training images `train` (N,) out into those to train on and those to test on, domain by domain.

    Of every class of a domain at least one image stays in training. Raises DataError for a domain that has no image
    to spare.
    """
    assert config.validation_fraction is not None
    kept, held_out = [], []
    for name in domains:
        members = train[collection.domain_of[train] == collection.domains.index(name)]
        spared = []
        for label in np.unique(collection.labels[members]):
            of_class = members[collection.labels[members] == label]
            count = min(round(config.validation_fraction * len(of_class)), len(of_class) - 1)
            spared.append(seeded_numpy(seed, "validation", name, int(label)).permutation(of_class)[:count])
        tested = np.sort(np.concatenate(spared)) if spared else members
        if len(members) and not len(tested):
            largest = np.bincount(collection.labels[members]).max()
            raise DataError(
                f"data.validation_fraction={config.validation_fraction:g} holds out no image of domain {name}, whose "
                f"classes have {largest} training images at most; raise it or data.train_images"
            )
        kept.append(np.setdiff1d(members, tested))
        held_out.append(_limited(collection, tested, config.test_images, "validation", name, seed))
    return np.concatenate(kept), np.concatenate(held_out)


def _turns(labels: np.ndarray) -> np.ndarray:
    """For each image (N,), how many of its class come before it: taking low numbers first takes all classes evenly."""
    turns = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = labels == label
        turns[of_class] = np.arange(of_class.sum())
    return turns


def _check_enough(
    collection: ImageCollection,
    domains: tuple[str, ...],
    classes: tuple[str, ...],
    train: np.ndarray,
    test: np.ndarray,
    config: DataConfig,
) -> None:
    for name in domains:
        domain = collection.domains.index(name)
        for split, indices in (("training", train), ("test", test)):
            if not np.any(collection.domain_of[indices] == domain):
                raise DataError(
                    f"domain {name} of {config.source} has no {split} images of the {len(classes)} classes; "
                    "change data.domains, data.classes or the files in data.root"
                )
        present = np.unique(collection.labels[train][collection.domain_of[train] == domain])
        if len(present) < 2:
            only = classes[present[0]]
            raise DataError(
                f"the training images of domain {name} are all of class {only}, and training needs at least 2 classes; "
                "raise data.classes or data.train_images, or change data.domains"
            )


def _split(collection: ImageCollection, domains: tuple[str, ...], indices: np.ndarray) -> Split:
    position = np.array([domains.index(name) if name in domains else -1 for name in collection.domains], np.int64)
    return Split(
        images=Subset.of(collection.images, indices),
        labels=collection.labels[indices],
        domains=position[collection.domain_of[indices]],
    )

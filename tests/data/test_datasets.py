"""Images from torch data sets, and from what a user registers as a source."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from lorafair.config.schema import DataConfig
from lorafair.data.datasets import Domains, from_datasets
from lorafair.data.images import DataError, ImageCollection, ImagesInMemory, Split
from lorafair.data.sources import load_images, register_source
from lorafair.errors import ConfigError
from lorafair.registry import SOURCES

SIDE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
GREYS = PIXELS[..., 0]
LABELS = (0, 1, 2, 0, 1, 2)


class ListDataset:
    """A map-style data set as torchvision's are, but for `targets`."""

    def __init__(self, images: Sequence[Any], labels: Sequence[Any] = LABELS) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


class DatasetWithTargets(ListDataset):
    """Labels are known without reading an image, which would take long."""

    classes = ("ant", "bee", "cow")

    def __init__(self, images: Sequence[Any], targets: Sequence[Any] = LABELS) -> None:
        super().__init__(images, targets)
        self.targets, self.read = targets, 0

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.read += 1
        return super().__getitem__(index)


def pixels(collection: ImageCollection) -> np.ndarray:
    return collection.images.read_many(np.arange(len(collection.labels)), SIDE)


# What an item may be

COLOURED = {
    "PIL": [Image.fromarray(image) for image in PIXELS],
    "array": PIXELS,
    "tensor of uint8": torch.from_numpy(PIXELS).movedim(3, 1),
    "tensor of floats": torch.from_numpy(PIXELS).movedim(3, 1) / 255,
    "array of floats": (PIXELS / 255).astype(np.float32),
}
GREY = {
    "PIL": [Image.fromarray(image) for image in GREYS],
    "array": GREYS,
    "array with a channel": GREYS[..., None],
    "tensor with a channel": torch.from_numpy(GREYS)[:, None] / 255,
    "tensor": torch.from_numpy(GREYS),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_images_of_every_kind_are_read_as_they_are(kind: str) -> None:
    collection = from_datasets({"one": (ListDataset(COLOURED[kind]), ListDataset(COLOURED[kind]))})
    np.testing.assert_array_equal(pixels(collection), np.concatenate([PIXELS, PIXELS]))


@pytest.mark.parametrize("kind", GREY)
def test_grey_images_become_rgb(kind: str) -> None:
    collection = from_datasets({"one": (ListDataset(GREY[kind]), ListDataset(GREY[kind]))})
    expected = np.repeat(GREYS[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(collection), np.concatenate([expected, expected]))


def test_images_are_resized_as_those_of_files() -> None:
    wide = np.concatenate([PIXELS, PIXELS[::-1]], axis=2)
    collection = from_datasets({"one": (ListDataset(wide), ListDataset(wide))})
    expected = Image.fromarray(wide[4]).resize((5, 5), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(collection.images.read(4, 5), np.asarray(expected))


# Labels, domains, splits


def test_every_domain_has_its_training_and_its_test_images() -> None:
    train, test = ListDataset(PIXELS[:4]), ListDataset(PIXELS[4:], LABELS[4:])
    others = ListDataset(PIXELS[4:], LABELS[4:]), ListDataset(PIXELS[:4])
    collection = from_datasets({"photo": (train, test), "sketch": others})
    assert collection.domains == ("photo", "sketch")
    assert collection.labels.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0]
    assert collection.domain_of.tolist() == [0] * 6 + [1] * 6
    assert collection.held_out.tolist() == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 4
    np.testing.assert_array_equal(pixels(collection), PIXELS[[0, 1, 2, 3, 4, 5, 4, 5, 0, 1, 2, 3]])
    assert collection.description == "data sets of photo, sketch"
    described = from_datasets({"photo": (train, test)}, description="six real images")
    assert described.description == "six real images"


@pytest.mark.parametrize("targets", [LABELS, list(LABELS), np.array(LABELS), torch.tensor(LABELS)], ids=type)
def test_labels_come_from_the_targets_without_reading_images(targets: Any) -> None:
    train, test = DatasetWithTargets(PIXELS, targets), DatasetWithTargets(PIXELS, targets)
    collection = from_datasets({"one": (train, test)})
    assert collection.labels.tolist() == [*LABELS, *LABELS]
    assert collection.classes == ("ant", "bee", "cow")
    assert train.read == test.read == 0


def test_without_targets_labels_come_from_the_items() -> None:
    """As with what torch makes: a part of a data set, or tensors beside each other, whose labels are tensors."""
    part = Subset(DatasetWithTargets(PIXELS), [5, 0, 4])  # type: ignore[arg-type]
    tensors = TensorDataset(torch.from_numpy(PIXELS).movedim(3, 1), torch.tensor(LABELS))
    collection = from_datasets({"one": (part, tensors)})
    assert collection.labels.tolist() == [2, 0, 1, *LABELS]
    assert collection.classes == ("0", "1", "2")


def test_classes_have_the_names_that_are_given() -> None:
    train, test = DatasetWithTargets(PIXELS), DatasetWithTargets(PIXELS)
    assert from_datasets({"one": (train, test)}, classes=["a", "b", "c", "d"]).classes == ("a", "b", "c", "d")


# Mistakes


def images(*, labels: Sequence[Any] = LABELS, count: int = 6) -> ListDataset:
    return ListDataset(PIXELS[:count], labels[:count])


@pytest.mark.parametrize(
    ("domains", "classes", "message"),
    [
        ({}, None, r"needs at least one domain: \{'photo': \(train, test\)\}"),
        ({"one": images()}, None, r"a domain needs two data sets: \(train, test\)"),
        ({"one": (images(), images(), images())}, None, r"a domain needs two data sets"),
        ({"one": (images(), images()), "two": (images(count=0), images())}, None, "domain two: one of its .* is empty"),
        ({"one": (images(), images(count=0))}, None, "domain one: one of its two data sets is empty"),
        ({"one": (images(), images())}, ["a", "b"], "labels go from 0 to 2, and there are 2 classes"),
        ({"one": (images(), images(labels=(0, 1, -1, 0, 1, 2)))}, None, "labels go from -1 to 2, and there are 3 cl"),
        ({"one": (DatasetWithTargets(PIXELS, (0, 1)), images())}, None, "a data set of 6 images has 2 targets"),
    ],
)
def test_data_sets_that_make_no_source_are_refused(domains: Domains, classes: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_datasets(domains, classes=classes)


class Failing(ListDataset):
    targets = LABELS

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index == 4:
            raise OSError("the archive is damaged\nsomewhere")
        return super().__getitem__(index)


WITHOUT_PICTURE = PIXELS.astype(np.int64)
NORMALISED = (PIXELS / 127.5 - 1).astype(np.float32)
NOT_A_NUMBER = np.full((6, SIDE, SIDE, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (Failing(PIXELS), r"the archive is damaged"),
        (ListDataset(NORMALISED), "its numbers are not between 0 and 1; leave the normalisation out"),
        (ListDataset(255 * np.abs(NORMALISED)), "its numbers are not between 0 and 1"),
        (ListDataset(NOT_A_NUMBER), "its numbers are not between 0 and 1"),
        (ListDataset(WITHOUT_PICTURE), r"an array of int64 and shape \(8, 8, 3\) is no image"),
        (ListDataset(PIXELS[:, 0, 0]), r"an array of uint8 and shape \(3,\) is no image"),
        (ListDataset(["a.png"] * 6), "an array of <U5"),
    ],
    ids=["raises", "normalised", "from 0 to 255", "NaN", "int64", "one pixel", "name of a file"],
)
def test_an_image_that_cannot_be_read_is_named_in_one_line(dataset: ListDataset, reason: str) -> None:
    collection = from_datasets({"one": (images(), dataset)})
    with pytest.raises(
        DataError, match=rf"^image 4 of data set 1 cannot be read \({reason}.*\); an item is .*$"
    ) as caught:
        collection.images.read(6 + 4, SIDE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [(), (None,), ("bee",), ([0, 1, 0],)], ids=["none", "None", "a name", "one-hot"])
def test_labels_that_are_no_numbers_are_refused(label: tuple[Any, ...]) -> None:
    class Mislabelled(ListDataset):
        def __getitem__(self, index: int) -> Any:
            return self.images[index], *label

    with pytest.raises(
        DataError, match=r"^the labels of a data set cannot be read \(.*\); an item is an image and its "
    ):
        from_datasets({"one": (Mislabelled(PIXELS), images())})


def test_items_in_both_splits_are_refused_across_domains_and_parts() -> None:
    whole = ListDataset(PIXELS)
    others = ListDataset(PIXELS)
    for domains, count in (
        ({"one": (whole, whole)}, 6),
        ({"one": (whole, others), "two": (ListDataset(PIXELS), whole)}, 6),
        ({"one": (Subset(whole, [0, 1, 2, 3]), Subset(Subset(whole, [5, 3, 2, 4]), [1, 2, 3]))}, 2),  # type: ignore[arg-type]
    ):
        with pytest.raises(DataError, match=rf"{count} items of its test data set are also trained on"):
            from_datasets(domains)
    parts = Subset(whole, [0, 1, 2]), Subset(whole, [3, 4, 5])  # type: ignore[arg-type]
    assert len(from_datasets({"one": parts}).images) == 6


def test_a_label_that_is_no_whole_number_is_not_cut() -> None:
    dataset = DatasetWithTargets(PIXELS, [0.0, 1.0, 1.5, 0.0, 1.0, 2.0])
    with pytest.raises(DataError, match=r"1\.5 is no whole number"):
        from_datasets({"one": (dataset, images())})


# Beyond one process and one run


def test_a_reader_of_data_sets_can_be_sent_to_worker_processes() -> None:
    collection = from_datasets({"one": (images(), images())})
    sent = pickle.loads(pickle.dumps(collection.images))
    np.testing.assert_array_equal(sent.read_many(np.array([3, 7]), SIDE), PIXELS[[3, 1]])
    assert len(sent) == 12


def test_the_digest_sees_pixels_and_order() -> None:
    def digest(indices: list[int], shade: int = 0) -> bytes:
        changed = PIXELS.copy()
        changed[1, 0, 0, 0] ^= shade
        return from_datasets({"one": (ListDataset(changed), ListDataset(changed))}).images.digest(np.array(indices))

    assert digest([0, 1, 2]) == digest([0, 1, 2])
    assert len({digest([0, 1, 2]), digest([1, 0, 2]), digest([0, 1]), digest([0, 1, 2], shade=1)}) == 4
    assert digest([0, 2]) == digest([0, 2], shade=1)


# Sources that a user registers


@pytest.fixture(autouse=True)
def only_shipped_sources() -> Iterator[None]:
    """Take back what a test has registered."""
    before = set(SOURCES.names)
    yield
    for name in set(SOURCES.names) - before:
        SOURCES.remove(name)


def two_domains() -> Domains:
    def part(chosen: slice) -> DatasetWithTargets:
        return DatasetWithTargets(PIXELS[chosen], LABELS[chosen])

    return {"photo": (part(slice(4)), part(slice(4, 6))), "sketch": (part(slice(2, 6)), part(slice(2)))}


def pixels_of(split: Split) -> np.ndarray:
    return split.images.read_many(np.arange(len(split)), SIDE)


def test_a_function_that_returns_data_sets_is_a_source() -> None:
    asked: list[tuple[DataConfig, int]] = []

    @register_source("mine")
    def mine(config: DataConfig, seed: int) -> Domains:
        asked.append((config, seed))
        return two_domains()

    config = DataConfig(source="mine", options={"shade": 3})
    data = load_images(config, seed=5)
    assert asked == [(config, 5)]
    assert (data.name, data.domains, data.classes) == ("mine", ("photo", "sketch"), ("ant", "bee", "cow"))
    np.testing.assert_array_equal(pixels_of(data.train), PIXELS[[0, 1, 2, 3, 2, 3, 4, 5]])
    np.testing.assert_array_equal(pixels_of(data.test), PIXELS[[4, 5, 0, 1]])
    assert data.test.labels.tolist() == [1, 2, 0, 1]
    assert SOURCES["mine"].domains is None


def test_a_function_that_returns_a_collection_is_a_source_and_can_name_its_domains() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1])

    @register_source("mine", domains=("only",))
    def mine(config: DataConfig, seed: int) -> ImageCollection:
        held_out = np.arange(6) >= 4
        return ImageCollection(("only",), ("a", "b"), ImagesInMemory(PIXELS), labels, 0 * labels, held_out, "noise")

    data = load_images(DataConfig(source="mine"), seed=0)
    assert (data.domains, data.description) == (("only",), "noise")
    np.testing.assert_array_equal(pixels_of(data.train), PIXELS[:4])
    assert SOURCES["mine"].domains == ("only",)


def test_data_sets_can_be_registered_as_they_are() -> None:
    assert register_source("mine", two_domains()) is None
    data = load_images(DataConfig(source="mine", domains=("sketch",)), seed=0)
    assert data.domains == ("sketch",)
    np.testing.assert_array_equal(pixels_of(data.train), PIXELS[2:])
    assert SOURCES["mine"].domains == ("photo", "sketch")
    assert SOURCES.is_known_to_others("mine", [__name__]), "a process that imports this module has them, too"
    assert not SOURCES.is_known_to_others("mine", ["another_module"])


def register_nothing(name: str) -> Callable[[DataConfig, int], Any]:
    """Register a function; every call defines the same one again."""

    @register_source(name)
    def nothing(config: DataConfig, seed: int) -> None:
        return None

    return nothing


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is a data source folder already, of lorafair; register yours under"):
        register_nothing("folder")
    with pytest.raises(ConfigError, match=r"there is a data source folder already, of lorafair"):
        register_source("folder", two_domains())
    register_nothing("mine")

    @register_source("other")
    def other(config: DataConfig, seed: int) -> Domains:
        return two_domains()

    for register in (lambda: register_source("mine")(other), lambda: register_source("mine", two_domains())):
        with pytest.raises(ConfigError, match=r"there is a data source mine already, .*nothing in .*test_datasets\.py"):
            register()
    assert load_images(DataConfig(source="other"), seed=0).domains == ("photo", "sketch")


def test_the_same_function_may_be_registered_again() -> None:
    """As when a cell of a notebook is run twice."""
    register_nothing("mine")
    register_nothing("mine")
    assert SOURCES.names.count("mine") == 1


@pytest.mark.parametrize("returned", [None, [1, 2]], ids=["NoneType", "list"])
def test_a_source_that_returns_something_else_says_what_it_should(returned: object) -> None:
    @register_source("mine")
    def mine(config: DataConfig, seed: int) -> Any:
        return returned

    with pytest.raises(DataError, match=rf"data\.source=mine returned a {type(returned).__name__}; .*ImageCollection"):
        load_images(DataConfig(source="mine"), seed=0)

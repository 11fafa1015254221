"""What the configuration selects from a source, and the sources that are made or fetched."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lorafair.config.schema import DataConfig
from lorafair.data.demo import digits, emoji, glyphs
from lorafair.data.demo.typefaces import draw_character, fetch_typefaces
from lorafair.data.images import DataError, ImageCollection, ImageData, ImagesInMemory, Source, Split
from lorafair.data.sources import load_images
from lorafair.data.stored import load_stored, store
from lorafair.files.download import FetchError
from lorafair.registry import SOURCES
from lorafair.seeding import seeded_numpy

SYNTHETIC = DataConfig(source="synthetic")


def pixels(split: Split) -> np.ndarray:
    return np.stack([split.images.read(i, 32) for i in range(len(split))])


def counts(split: Split, domain: int) -> list[int]:
    return np.bincount(split.labels[split.domains == domain]).tolist()


def test_every_source_of_the_configuration_exists() -> None:
    assert all(isinstance(SOURCES[name], Source) for name in SOURCES.names)


def test_domains_that_a_source_knows_beforehand_are_those_it_has() -> None:
    assert SOURCES["synthetic"].domains == load_images(SYNTHETIC, seed=0).domains


# Selection


def test_domains_come_in_the_order_asked_for() -> None:
    everything = load_images(SYNTHETIC, seed=0)
    data = load_images(dataclasses.replace(SYNTHETIC, domains=("inverted", "plain")), seed=0)
    assert data.domains == ("inverted", "plain")
    assert data.train.domains.tolist() == [0] * 64 + [1] * 64
    np.testing.assert_array_equal(pixels(data.train)[:64], pixels(everything.train)[128:])


def test_an_unknown_domain_or_too_many_classes_say_what_there_is() -> None:
    with pytest.raises(DataError, match="no domain dark; there are plain, noisy, inverted"):
        load_images(dataclasses.replace(SYNTHETIC, domains=("dark",)), seed=0)


@pytest.fixture
def uneven() -> Iterator[DataConfig]:
    """Two domains with 50, 5 and 20 training images of their 3 classes and 9 test images; image i has grey level i."""
    labels = np.concatenate([np.repeat([0, 1, 2], (50, 5, 20)), np.arange(9) % 3])
    n = len(labels)
    collection = ImageCollection(
        domains=("one", "two"),
        classes=("a", "b", "c"),
        images=ImagesInMemory(np.tile(np.arange(2 * n, dtype=np.uint8)[:, None, None, None], (1, 4, 4, 3))),
        labels=np.tile(labels, 2),
        domain_of=np.repeat([0, 1], n),
        held_out=np.tile(np.arange(n) >= 75, 2),
        description="greys",
    )
    SOURCES.add("uneven", Source(lambda config, seed: collection))
    yield DataConfig(source="uneven")
    SOURCES.remove("uneven")


def test_images_are_drawn_evenly_over_classes_as_far_as_they_go(uneven: DataConfig) -> None:
    data = load_images(dataclasses.replace(uneven, train_images=24, test_images=4), seed=0)
    for domain in range(2):
        assert sorted(counts(data.train, domain)) == [5, 9, 10]
        assert counts(data.train, domain)[1] == 5
        assert sorted(counts(data.test, domain)) == [1, 1, 2]


def test_a_larger_number_adds_images_and_a_too_large_one_takes_all(uneven: DataConfig) -> None:
    def drawn(n: int) -> set[int]:
        return set(pixels(load_images(dataclasses.replace(uneven, train_images=n), seed=0).train)[:, 0, 0, 0].tolist())

    assert drawn(10) < drawn(24) < drawn(74) < drawn(75) == drawn(1000)


def test_the_seed_draws_and_other_domains_have_no_say(uneven: DataConfig) -> None:
    limited = dataclasses.replace(uneven, train_images=10)
    both, other_seed = load_images(limited, seed=0), load_images(limited, seed=1)
    alone = load_images(dataclasses.replace(limited, domains=("two",)), seed=0)
    np.testing.assert_array_equal(pixels(alone.train), pixels(both.train)[10:])
    assert not np.array_equal(pixels(both.train), pixels(other_seed.train))


def test_classes_are_the_first_ones(uneven: DataConfig) -> None:
    data = load_images(dataclasses.replace(uneven, classes=2), seed=0)
    assert data.classes == ("a", "b")
    assert counts(data.train, 0) == [50, 5]
    with pytest.raises(DataError, match=r"data\.classes=4: uneven has 3 classes"):
        load_images(dataclasses.replace(uneven, classes=4), seed=0)


def test_a_domain_with_one_class_cannot_be_learned(uneven: DataConfig) -> None:
    with pytest.raises(DataError, match=r"domain one are all of class a, .*at least 2 classes; raise data\.classes"):
        load_images(dataclasses.replace(uneven, classes=1), seed=0)


def test_validation_takes_from_every_class_of_the_training_images_and_never_from_the_test_images(
    uneven: DataConfig,
) -> None:
    whole = load_images(uneven, seed=0)
    parts = load_images(dataclasses.replace(uneven, validation_fraction=0.2), seed=0)
    for domain in (0, 1):
        assert counts(whole.train, domain) == [50, 5, 20]
        assert counts(parts.test, domain) == [10, 1, 4]
        assert counts(parts.train, domain) == [40, 4, 16]
    trained, tested = sorted(parts.train.images.indices), sorted(parts.test.images.indices)
    assert sorted(trained + tested) == sorted(whole.train.images.indices)
    assert not set(tested) & set(whole.test.images.indices)
    assert parts.fingerprint != whole.fingerprint
    again, other = (load_images(dataclasses.replace(uneven, validation_fraction=0.2), seed=seed) for seed in (0, 1))
    assert again.fingerprint == parts.fingerprint
    assert sorted(other.test.images.indices) != tested
    limited = load_images(dataclasses.replace(uneven, validation_fraction=0.2, test_images=6), seed=0)
    assert counts(limited.test, 0) == [3, 1, 2]
    assert set(limited.test.images.indices) <= set(tested)


def test_validation_leaves_an_image_of_every_class_and_needs_one_to_spare(uneven: DataConfig) -> None:
    nearly_all = load_images(dataclasses.replace(uneven, validation_fraction=0.99), seed=0)
    assert counts(nearly_all.train, 0) == [1, 1, 1]
    with pytest.raises(
        DataError, match=r"data\.validation_fraction=0\.005 holds out no image of domain .* 50 training"
    ):
        load_images(dataclasses.replace(uneven, validation_fraction=0.005), seed=0)


def test_the_fingerprint_changes_with_whatever_is_selected(uneven: DataConfig) -> None:
    changes = ({}, {"domains": ("two", "one")}, {"domains": ("one",)}, {"classes": 2}, {"train_images": 9})
    configs = [dataclasses.replace(uneven, **change) for change in changes]
    prints = [load_images(config, seed=0).fingerprint for config in configs]
    assert len(set(prints)) == len(prints)
    assert prints == [load_images(config, seed=0).fingerprint for config in configs]
    assert load_images(configs[-1], seed=1).fingerprint != prints[-1]  # other images are drawn


@pytest.mark.parametrize("changed", ["pixel", "label", "split", "class name"])
def test_the_fingerprint_changes_with_the_content(uneven: DataConfig, changed: str) -> None:
    before = load_images(uneven, seed=0).fingerprint
    collection = SOURCES["uneven"].load(uneven, 0)
    if changed == "pixel":
        collection.images.array[3, 1, 1, 1] ^= 1
    elif changed == "label":
        collection.labels[3] = 1
    elif changed == "split":
        collection.held_out[3] = True
    else:
        renamed = dataclasses.replace(collection, classes=("a", "b", "d"))
        SOURCES.remove("uneven")
        SOURCES.add("uneven", Source(lambda config, seed: renamed))
    assert load_images(uneven, seed=0).fingerprint != before


# Made and stored sets


def test_synthetic_images_follow_the_seed_and_the_options() -> None:
    data = load_images(dataclasses.replace(SYNTHETIC, classes=6, train_images=12, test_images=6), seed=0)
    assert data.domains == ("plain", "noisy", "inverted")
    assert len(data.classes) == 6
    assert (len(data.train), len(data.test)) == (36, 18)
    assert counts(data.train, 0) == [2] * 6
    assert "made-up" in data.description
    assert load_images(SYNTHETIC, seed=0).fingerprint == load_images(SYNTHETIC, seed=0).fingerprint
    assert load_images(SYNTHETIC, seed=0).fingerprint != load_images(SYNTHETIC, seed=1).fingerprint


def test_synthetic_images_can_be_learned_in_every_domain() -> None:
    """Nearest class by the mean spectrum: chance is 25 %."""
    data = load_images(SYNTHETIC, seed=0)

    def spectra(split: Split) -> np.ndarray:
        grey = pixels(split).mean(-1)
        return np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))).reshape(len(split), -1)

    train, test = spectra(data.train), spectra(data.test)
    for domain in range(3):
        own = data.train.domains == domain
        means = np.stack([train[own & (data.train.labels == c)].mean(0) for c in range(4)])
        mine = data.test.domains == domain
        nearest = ((test[mine][:, None] - means) ** 2).sum(-1).argmin(1)
        assert (nearest == data.test.labels[mine]).mean() > 0.9


def test_a_stored_set_comes_back_as_it_was_and_a_lost_file_is_named(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    about = {"domains": ("d",), "classes": ("a", "b"), "description": "six images"}
    held_out = np.array([0, 0, 0, 0, 1, 1], bool)
    store(tmp_path, images=images, labels=np.arange(6) % 2, domain_of=np.zeros(6), held_out=held_out, **about)
    found = load_stored(tmp_path)
    assert (found.domains, found.classes, found.description) == (("d",), ("a", "b"), "six images")
    assert found.labels.dtype == found.domain_of.dtype == np.int64
    np.testing.assert_array_equal(found.held_out, held_out)
    np.testing.assert_array_equal(found.images.read(4, 8), images[4])
    assert found.images.digest(np.array([0, 1])) != found.images.digest(np.array([1, 0]))
    (tmp_path / "index.npz").unlink()
    with pytest.raises(DataError, match=r"has lost index\.npz; delete that folder"):
        load_stored(tmp_path)


# Fetched sets


def fetched(load: Callable[[], ImageData]) -> ImageData:
    try:
        return load()
    except FetchError as error:
        if "could not be fetched" in str(error) or "npm, which was not found" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def assert_sound(data: ImageData, domains: int, classes: int) -> None:
    """All classes in every domain's training and test images, none of which is blank or in both."""
    assert (len(data.domains), len(data.classes)) == (domains, classes)
    for split, domain in itertools.product((data.train, data.test), range(domains)):
        assert np.all(np.bincount(split.labels[split.domains == domain], minlength=classes) > 0)
    train, test = ({image.tobytes() for image in pixels(split)} for split in (data.train, data.test))
    assert train.isdisjoint(test)


@pytest.mark.slow
@pytest.mark.network
def test_a_character_is_drawn_whole_and_the_same_again(empty_cache: Path) -> None:
    families = {}

    def fetch() -> None:
        families.update(fetch_typefaces(["great-vibes", "satisfy"], empty_cache))

    fetched(fetch)  # type: ignore[arg-type]
    for (file,), letter in itertools.product(families.values(), "agMQ"):
        images = [
            np.asarray(draw_character(letter, file, rng, side=64, ink=(0, 0, 0), paper=(255, 255, 255)))
            for seed in (0, 0, 1)
            for rng in (seeded_numpy(seed, letter),)
        ]
        np.testing.assert_array_equal(images[0], images[1])
        assert not np.array_equal(images[0], images[2])
        dark = images[0][..., 0] < 128
        assert dark.sum() > 15
        for edge in (dark[0], dark[-1], dark[:, 0], dark[:, -1]):
            assert edge.sum() < 8  # a stroke may reach the border, but not be cut along it


@pytest.mark.slow
@pytest.mark.network
def test_glyph_domains(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "_TRAIN", 52)  # the whole set takes three times as long
    monkeypatch.setattr(glyphs, "_TEST", 26)
    data = fetched(lambda: load_images(DataConfig(source="glyph_domains"), seed=0))
    assert data.domains == SOURCES["glyph_domains"].domains == ("serif", "sans", "mono", "hand", "display")
    assert (len(data.train), len(data.test)) == (5 * 52, 5 * 26)
    assert_sound(data, 5, 26)


@pytest.mark.slow
@pytest.mark.network
def test_digits_domains_leave_the_global_random_state_alone(empty_cache: Path) -> None:
    state = random.getstate()
    data = fetched(lambda: load_images(DataConfig(source="digits_domains"), seed=0))
    assert random.getstate() == state
    assert data.domains == SOURCES["digits_domains"].domains == ("mnist", "optdig", "print", "captcha")
    assert len(data.train) + len(data.test) == 4 * 1797
    assert_sound(data, 4, 10)
    for domain in range(4):
        of_test = np.bincount(data.test.labels[data.test.domains == domain])
        of_train = np.bincount(data.train.labels[data.train.domains == domain])
        np.testing.assert_allclose(of_test / (of_test + of_train), 0.3, atol=0.005)


def test_captchas_follow_their_seed(tmp_path: Path) -> None:
    """The package draws from `secrets`; the module is given another source under that name."""
    file = tmp_path / "image.py"
    file.write_text(
        "import secrets\n"
        "def draw():\n"
        "    return secrets.randbelow(1000), secrets.randbits(32), secrets.choice('abcdef')\n"
    )
    draws = [digits._load_captcha(file, random.Random(seed)).draw() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.slow
@pytest.mark.network
def test_emoji_domains(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = emoji._emoji
    monkeypatch.setattr(emoji, "_emoji", lambda package: itertools.islice(some(package), 0, None, 8))
    data = fetched(lambda: load_images(DataConfig(source="emoji_domains"), seed=0))
    domains = ("noto", "twemoji", "openmoji", "line", "silhouette", "fluent3d")
    assert data.domains == SOURCES["emoji_domains"].domains == domains
    assert_sound(data, 6, 12)
    for split in (data.train, data.test):  # the same emoji in every domain
        first = split.labels[split.domains == 0]
        assert all(np.array_equal(split.labels[split.domains == d], first) for d in range(1, 6))

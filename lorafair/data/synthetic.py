"""Made-up images for tests and trials: a grating's direction is the class, its style the domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lorafair.config.schema import DataConfig
from lorafair.data.images import ImageCollection, ImagesInMemory, Source
from lorafair.seeding import seeded_numpy

_CLASSES, _TRAIN, _TEST, _SIDE = 4, 64, 32, 32  # defaults of data.classes, train_images, test_images a domain; pixels

_BLOCK = 256  # images in float64 at a time

_STYLES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "plain": lambda images, rng: images,
    "noisy": lambda images, rng: images + rng.normal(0.0, 0.15, images.shape),
    "inverted": lambda images, rng: 1.0 - images,
}


def synthetic(config: DataConfig, seed: int) -> ImageCollection:
    """3 domains of gratings in random colours and phases, drawn with the seed; nothing is fetched or stored."""
    classes = config.classes or _CLASSES
    train, test = config.train_images or _TRAIN, config.test_images or _TEST
    labels = np.concatenate([np.arange(train), np.arange(test)]) % classes  # (N,)
    images = np.empty((len(_STYLES), len(labels), _SIDE, _SIDE, 3), np.uint8)
    for of_domain, (domain, style) in zip(images, _STYLES.items(), strict=True):
        rng = seeded_numpy(seed, "synthetic", domain)
        for i, block in enumerate(_gratings(labels * np.pi / classes, rng)):
            of_domain[i * _BLOCK : (i + 1) * _BLOCK] = 255 * np.clip(style(block, rng), 0.0, 1.0)
    return ImageCollection(
        domains=tuple(_STYLES),
        classes=tuple(f"grating-{180 * c / classes:.0f}deg" for c in range(classes)),
        images=ImagesInMemory(images.reshape(-1, _SIDE, _SIDE, 3)),
        labels=np.tile(labels, len(_STYLES)),
        domain_of=np.repeat(np.arange(len(_STYLES)), train + test),
        held_out=np.tile(np.arange(train + test) >= train, len(_STYLES)),
        description="synthetic: made-up gratings in 3 styles, for tests and trials only",
    )


SYNTHETIC = Source(synthetic, tuple(_STYLES))


def _gratings(angles: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Stripes perpendicular to `angles` (N,), from dark to a bright colour: blocks of (N, S, S, 3) in 0–1."""
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    phases = rng.uniform(0.0, 2 * np.pi, (len(angles), 1, 1))
    colours = rng.uniform(0.5, 1.0, (len(angles), 1, 1, 3))
    for block in (slice(i, i + _BLOCK) for i in range(0, len(angles), _BLOCK)):
        angle = angles[block, None, None]
        across = np.cos(angle) * x + np.sin(angle) * y  # (N, S, S)
        stripes = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * across + phases[block])
        yield np.asarray(0.1 + 0.9 * stripes[..., None] * colours[block])

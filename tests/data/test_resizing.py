"""Resizing without a filter, against the definition of bicubic interpolation and torchvision where it can be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorafair.config.schema import DataConfig
from lorafair.data.datasets import DatasetImages
from lorafair.data.files import ImageFiles
from lorafair.data.images import ImagesInMemory, resize
from lorafair.data.resizing import WithoutAntialias, resize_without_antialias
from lorafair.data.sources import load_images
from lorafair.errors import ConfigError

PHOTO = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)


def bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Keys' cubic with a = −0.75 over the 4 x 4 pixels around each centre, edges repeated, in float64."""

    def weight(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    height, width, _ = pixels.shape
    result = np.zeros((size, size, 3))
    for row in range(size):
        y = (row + 0.5) * height / size - 0.5
        for column in range(size):
            x = (column + 0.5) * width / size - 0.5
            for j in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for i in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    pixel = pixels[min(max(j, 0), height - 1), min(max(i, 0), width - 1)]
                    result[row, column] += weight(y - j) * weight(x - i) * pixel
    return np.clip(result, 0, 255)


@pytest.mark.parametrize("size", [6, 9, 23, 40])
def test_without_antialias_is_plain_bicubic(size: int) -> None:
    found = resize_without_antialias(Image.fromarray(PHOTO), size)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert np.abs(found - bicubic(PHOTO, size)).max() < 0.51  # rounding, and float32
    assert size >= 23 or np.abs(found.astype(int) - resize(Image.fromarray(PHOTO), size)).mean() > 5


def test_torchvision_gives_the_same_pixels() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    for size in (6, 40):
        expected = functional.resize(tensor, [size, size], functional.InterpolationMode.BICUBIC, antialias=False)
        found = resize_without_antialias(Image.fromarray(PHOTO), size)
        assert np.array_equal(found, expected.permute(1, 2, 0).numpy())


def test_every_kind_of_reader_gives_the_same_pixels_and_another_digest(tmp_path: Path) -> None:
    square = PHOTO[:20, :20]
    Image.fromarray(square).save(tmp_path / "a.png")
    readers = (
        ImageFiles(tmp_path, np.array([b"a.png"])),
        ImagesInMemory(square[None]),
        DatasetImages(([(Image.fromarray(square), 0)],), np.array([0, 1])),
    )
    for images in readers:
        plain, only = WithoutAntialias.of(images, "folder"), np.array([0])
        assert np.array_equal(plain.read(0, 8), resize_without_antialias(Image.fromarray(square), 8))
        assert np.array_equal(plain.read_many(only, 8)[0], plain.read(0, 8))
        assert plain.digest(only) != images.digest(only)
        assert plain.version(only) != images.version(only)


def test_the_option_changes_pixels_and_what_names_them() -> None:
    config = DataConfig(source="synthetic", train_images=4, test_images=4)
    filtered, plain = load_images(config, 0), load_images(DataConfig(**{**vars(config), "antialias": False}), 0)
    assert filtered.fingerprint != plain.fingerprint
    side = 16
    assert not np.array_equal(plain.train.images.read(0, side), filtered.train.images.read(0, side))


def test_images_that_come_resized_are_refused() -> None:
    class Resized:
        def __len__(self) -> int:
            return 1

        def read(self, index: int, size: int) -> np.ndarray:
            return np.zeros((size, size, 3), np.uint8)

        def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
            return np.zeros((len(indices), size, size, 3), np.uint8)

        def digest(self, indices: np.ndarray) -> bytes:
            return b""

        version = digest

    with pytest.raises(ConfigError, match=r"data\.antialias=false .* data\.source=mine .* method picture"):
        WithoutAntialias.of(Resized(), "mine")

"""What pictures of every kind become: what torchvision's loader gives, and deep grey values scaled."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorafair.data.files import ImageFiles
from lorafair.data.images import DataError
from lorafair.data.pixels import to_rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def grey(image: Image.Image) -> np.ndarray:
    rgb = np.asarray(to_rgb(image))
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path: Path, kind: type[np.generic], suffix: str) -> None:
    file = tmp_path / f"deep.{suffix}"
    Image.fromarray((65535 * RAMP).astype(kind)).save(file)
    with Image.open(file) as image:
        assert image.mode in ("I;16", "I")
        np.testing.assert_array_equal(grey(image), np.rint((65535 * RAMP).astype(kind) / 257))
    files = ImageFiles(tmp_path, np.array([file.name.encode()]))
    assert files.read(0, 8)[..., 0].max() > files.read(0, 8)[..., 0].mean() > 100


@pytest.mark.parametrize("largest", [1, 255, 65535, 1e6])
def test_floats_are_scaled_by_the_first_range_that_holds_them(largest: float) -> None:
    expected = np.rint(255 * RAMP)
    np.testing.assert_allclose(grey(Image.fromarray((largest * RAMP).astype(np.float32))), expected, atol=1)


def test_negative_values_are_scaled_from_the_smallest_to_the_largest() -> None:
    np.testing.assert_allclose(grey(Image.fromarray((500 * RAMP - 300).astype(np.int32))), 255 * RAMP, atol=1)
    assert not grey(Image.fromarray(np.full((4, 4), -3, np.int32))).any(), "one value, and no division by zero"


def test_values_that_are_no_numbers_name_the_file(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(DataError, match=r"nan\.tif cannot be decoded \(some of its grey values are not finite\)"):
        ImageFiles(tmp_path, np.array([b"nan.tif"])).read(0, 4)


def transparent(mode: str) -> Image.Image:
    image = Image.fromarray(PIXELS).convert("L" if mode == "LA" else "RGB").convert(mode)
    image.putalpha(Image.fromarray((255 * RAMP).astype(np.uint8)))
    return image


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_leaves_the_colours_under_it(tmp_path: Path, mode: str) -> None:
    transparent(mode).save(tmp_path / "image.png")
    opaque = transparent(mode)
    opaque.putalpha(255)
    with Image.open(tmp_path / "image.png") as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(opaque.convert("RGB")))


def test_a_palette_gives_its_colours_also_where_some_are_transparent(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    for name, transparency in (("one.png", 0), ("all.png", bytes(range(0, 160, 10)))):
        image.save(tmp_path / name, transparency=transparency)
        with Image.open(tmp_path / name) as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow proposes RGBA
            np.testing.assert_array_equal(np.asarray(to_rgb(opened)), expected)


def test_an_orientation_is_not_applied_and_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    wide = Image.fromarray(PIXELS[:4])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    wide.save(tmp_path / "turned.png", exif=exif)
    frames = [Image.new("L", (8, 4), shade) for shade in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "turned.png") as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), PIXELS[:4])
    with Image.open(tmp_path / "moving.gif") as image:
        assert (grey(image) == 10).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_the_smallest_and_longest_images_become_squares(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("CMYK" if size == (1, 1) else "RGB", size).save(tmp_path / "image.jpg")
    assert ImageFiles(tmp_path, np.array([b"image.jpg"])).read(0, 8).shape == (8, 8, 3)

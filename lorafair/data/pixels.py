"""Any picture as 8-bit RGB, in one way for every source.

It is the way of torchvision's `pil_loader`, `Image.convert("RGB")`: the first frame of an animation, the colours that
lie under a transparency, a palette's colours, no turn by an EXIF orientation. One thing differs, because `convert` cuts
off every grey value above 255: grey images of more than 8 bits are scaled.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# What the grey values of an image may go up to: the first that holds all of them.
_INTEGERS = (65535.0,)
_FLOATS = (1.0, 255.0, 65535.0)


def is_deep(mode: str) -> bool:
    """Whether images of a Pillow mode have grey values that do not fit into 8 bits: I, I;16, F and their kin."""
    return mode == "F" or mode.startswith("I")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB. Raises ValueError or OSError where it cannot be."""
    return (_eight_bits(image) if is_deep(image.mode) else image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values from 0 to 65535, floats also from 0 to 1 or to 255, as 0 to 255.

    Larger ones are scaled by the image's largest; where some are negative, from its smallest to its largest.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("some of its grey values are not finite")
    if low >= 0:
        ranges = _FLOATS if image.mode == "F" else _INTEGERS
        low, high = 0.0, next((largest for largest in ranges if high <= largest), high)
    scaled = (values - low) * (255 / (high - low or 1.0))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))

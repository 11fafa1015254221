"""Gaussian noise and random samples, from a generator of the run or from the operating system.

Letters: n numbers to draw.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MANTISSA = 53  # bits of a float64


def standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent standard normal numbers, in the shape of `like` and on its device.

    From the generator, which is on that device; without one from the operating system's generator for cryptography, by
    Box and Muller's transform in float64.
    """
    if generator is not None:
        return torch.empty_like(like).normal_(generator=generator)
    pairs = -(-like.numel() // 2)
    radius, angle = np.sqrt(-2 * np.log1p(-system_uniform(pairs))), 2 * math.pi * system_uniform(pairs)
    drawn = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: like.numel()]
    return torch.from_numpy(drawn).to(like.device, like.dtype).view_as(like)


def system_uniform(count: int) -> NDArray[np.float64]:
    """So many numbers, uniform in [0, 1), from the operating system's generator for cryptography."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(64 - _MANTISSA)
    return bits.astype(np.float64) * 2.0**-_MANTISSA

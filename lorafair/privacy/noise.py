"""Gaussian noise, from a generator of the run or from the operating system."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lorafair.seeding import system_uniform


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

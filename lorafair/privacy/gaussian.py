"""Gaussian noise of a release: of the run's seed and a purpose, or of the operating system's generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.privacy.noise import standard_normal
from lorafair.seeding import seeded

_DRAWS = 4  # of the system's: a sum of several has no rounding pattern that tells the noise from what it hides


@dataclass(frozen=True)
class GaussianNoise:
    """Standard normal numbers, float64 on the CPU.

    With a seed they depend on the seed and on what they are for. Without, they come from the operating system, four
    draws in each number (arXiv 2107.10138 explains the attack on a single one). The state of torch's generator is set
    by 32 bits, so a seed hides nothing from who can try them all; it is for simulations.
    """

    seed: int | None  # None: the system's generator

    def draw(self, shape: Sequence[int], *purpose: int | str) -> Tensor:
        """So many numbers; of the same seed and purpose the same ones."""
        like = torch.empty(tuple(shape), dtype=torch.float64)
        if self.seed is not None:
            return standard_normal(like, seeded(self.seed, "privacy", *purpose))
        draws = torch.stack([standard_normal(like, None) for _ in range(_DRAWS)])
        return draws.sum(0) / math.sqrt(_DRAWS)

"""Random numbers that depend on what they are for, never on the rank, the process or the order of calls."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MANTISSA = 53  # bits of a float64
# SplitMix64's constants as signed numbers of 64 bits.
_GOLDEN, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def seeded(seed: int, *purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that `seed` and `purpose` alone determine.

    The purpose names the draw, e.g. `seeded(seed, round_index, client)` or `seeded(seed, "lora", 0, "attn.proj")`. The
    key is hashed, so neighbouring seeds, rounds and clients give unrelated streams. Draws on a CUDA device differ
    from those on the CPU.
    """
    return torch.Generator(device=device).manual_seed(seeded_key(seed, *purpose))


def seeded_numpy(seed: int, *purpose: int | str) -> np.random.Generator:
    """NumPy's counterpart of `seeded`, e.g. `seeded_numpy(seed, "dirichlet", "serif")`."""
    return np.random.default_rng(int.from_bytes(_key(seed, purpose), "little"))


def seeded_key(seed: int, *purpose: int | str) -> int:
    """A number of 64 bits (signed) that `seed` and `purpose` alone determine, as a start for `hashed`."""
    return int.from_bytes(_key(seed, purpose)[:8], "little", signed=True)


def hashed(key: Tensor | int, counter: Tensor | int) -> Tensor:
    """Random bits (int64) of a place in a stream: the output number `counter` of SplitMix64 from the state `key`.

    Either may be an int64 tensor; they broadcast. A result is a key itself, so places may have several coordinates. The
    same on every device, and whatever is computed beside it. (Steele, Lea, Flood: Fast splittable generators, 2014.)
    """
    z = torch.as_tensor(key) + (torch.as_tensor(counter) + 1) * _GOLDEN  # int64 wraps, as the algorithm wants
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def below(bits: Tensor, limit: int) -> Tensor:
    """Whole numbers of 0 to limit − 1 from the random bits of `hashed`; for a limit far below 2^31."""
    return _shifted(bits, 33) % limit


def system_uniform(count: int) -> NDArray[np.float64]:
    """So many numbers, uniform in [0, 1), from the operating system's generator for cryptography: nothing repeats."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(64 - _MANTISSA)
    return bits.astype(np.float64) * 2.0**-_MANTISSA


def _shifted(z: Tensor, places: int) -> Tensor:
    """z >> places of the unsigned number with the same bits."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _key(seed: int, purpose: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256(repr((seed, *purpose)).encode()).digest()

"""Random numbers that depend on what they are for, never on the rank, the process or the order of calls."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seeded(seed: int, *purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that `seed` and `purpose` alone determine.

    The purpose names the draw, e.g. `seeded(seed, round_index, client)` or `seeded(seed, "lora", 0, "attn.proj")`. The
    key is hashed, so neighbouring seeds, rounds and clients give unrelated streams. Draws on a CUDA device differ
    from those on the CPU.
    """
    return torch.Generator(device=device).manual_seed(int.from_bytes(_key(seed, purpose)[:8], "little", signed=True))


def seeded_numpy(seed: int, *purpose: int | str) -> np.random.Generator:
    """NumPy's counterpart of `seeded`, e.g. `seeded_numpy(seed, "dirichlet", "serif")`."""
    return np.random.default_rng(int.from_bytes(_key(seed, purpose), "little"))


def _key(seed: int, purpose: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256(repr((seed, *purpose)).encode()).digest()

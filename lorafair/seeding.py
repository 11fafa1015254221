"""Random numbers that depend on what they are for, never on the rank, the process or the order of calls."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, *purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that `seed` and `purpose` alone determine.

    The purpose names the draw, e.g. `seeded(seed, round_index, client)` or `seeded(seed, "lora", "blocks.0.attn.proj")`.
    The key is hashed, so neighbouring seeds, rounds and clients give unrelated streams. Draws on a CUDA device differ
    from those on the CPU.
    """
    key = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(key[:8], "little", signed=True))

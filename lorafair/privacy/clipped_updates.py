"""Sums of clients' updates in which each client counts no more than a bound. All of it in float64.

Letters: K clients, E pieces of an adapter, G groups of pieces that are clipped together, P packed length, n numbers of
a piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.config.schema import PrivacyConfig
from lorafair.model.adapter import PARTS, AdapterLayout, Part

TOGETHER = "all"  # the group of all parts, where an update is clipped as one vector


@dataclass(frozen=True)
class Piece:
    """One tensor of an adapter: a part of one layer, or a parameter of the head."""

    part: Part
    name: str  # the layer's path, or the parameter's name
    columns: slice  # of a packed row of the layout


def pieces_of(layout: AdapterLayout, parts: Sequence[Part]) -> list[Piece]:
    """The pieces of some parts, in the order of a packed row."""
    pieces: list[Piece] = []
    for part, span in layout.slices.items():
        begin = span.start
        for name, size in layout.sizes_of(part).items():
            if part in parts and size:
                pieces.append(Piece(part, name, slice(begin, begin + size)))
            begin += size
    return pieces


def squares_of(rows: Tensor, start: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """‖row − start‖² of every piece and client (E, K), from rows (K, P) and the start (P,)."""
    squares = torch.zeros(len(pieces), len(rows), dtype=torch.float64, device=rows.device)
    for index, piece in enumerate(pieces):
        squares[index] = change_of(rows, start, piece).square().sum(1)
    return squares


def change_of(rows: Tensor, start: Tensor, piece: Piece) -> Tensor:
    """row − start of one piece (K, n)."""
    return rows[:, piece.columns].to(torch.float64) - start[piece.columns].to(torch.float64)


@dataclass(frozen=True)
class Clipping:
    """Bounds of a client's update: one for all that it sends, or one for each part."""

    bounds: Mapping[str, float]  # of each group (G), by part or TOGETHER

    @property
    def total(self) -> float:
        """The largest norm of a clipped update: the root of the sum of the squared bounds. This is the sensitivity."""
        return math.sqrt(sum(bound * bound for bound in self.bounds.values()))

    def group_of(self, part: Part) -> str:
        """What a part is clipped with."""
        return TOGETHER if TOGETHER in self.bounds else part

    def norms(self, pieces: Sequence[Piece], squares: Tensor) -> dict[str, Tensor]:
        """The norm of each client's update (K,) by group, from the squares (E, K) of its pieces."""
        found: dict[str, Tensor] = {}
        for group in self.bounds:
            chosen = [index for index, piece in enumerate(pieces) if self.group_of(piece.part) == group]
            found[group] = squares[chosen].sum(0).sqrt()
        return found

    def scales(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each client's update is multiplied by (K,), by group: min(1, bound/norm)."""
        return {group: scales_to(norms[group], bound) for group, bound in self.bounds.items()}


def scales_to(norms: Tensor, bound: float) -> Tensor:
    """min(1, bound/norm), and 1 for a norm of 0."""
    return torch.where(norms > bound, bound / torch.where(norms > bound, norms, 1.0), 1.0)


def clipped_sum(rows: Tensor, start: Tensor, piece: Piece, scales: Tensor) -> Tensor:
    """Σ_k scale_k (row_k − start) of one piece (n,)."""
    return scales.to(rows.device) @ change_of(rows, start, piece)


def next_bound(bound: float, noisy_fraction: float, *, quantile: float, rate: float) -> float:
    """The bound of the next round, so that this fraction of norms is below it (arXiv 1905.03871, algorithm 1)."""
    return bound * math.exp(-rate * (noisy_fraction - quantile))


def first_bounds(privacy: PrivacyConfig) -> dict[str, float]:
    """The bounds of the first round by group: clip_norm as it is, or shared out to the parts in the ratio given."""
    assert privacy.clip_norm is not None
    if not privacy.clip_parts:
        return {TOGETHER: privacy.clip_norm}
    length = math.sqrt(sum(float(ratio) ** 2 for ratio in privacy.clip_parts.values()))
    given = [part for part in PARTS if part in privacy.clip_parts]
    return {part: privacy.clip_norm * float(privacy.clip_parts[part]) / length for part in given}


def bounds_at_start(privacy: PrivacyConfig) -> Tensor | None:
    """The state of bounds that follow a quantile (G,); None where they are fixed."""
    if privacy.unit != "client" or privacy.clip_quantile is None:
        return None
    return torch.tensor(list(first_bounds(privacy).values()), dtype=torch.float64)

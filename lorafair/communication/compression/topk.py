"""topk: of every row the numbers that are largest in magnitude, with their positions; in float32, or with b bits each.

Letters: m rows, n numbers of a row, k of them sent, b bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.communication.compression.base import RowCoding
from lorafair.communication.compression.half import Float32
from lorafair.communication.compression.integers import Integers
from lorafair.communication.compression.positions import decode_positions, encode_positions, position_bytes
from lorafair.config.schema import CompressionConfig


@dataclass(frozen=True)
class TopK(RowCoding):
    """Positions of k = ⌈fraction·n⌉ numbers, then the numbers, as `values` codes a row of k."""

    is_sparse: ClassVar[bool] = True
    fraction: float
    values: RowCoding

    @classmethod
    def of(cls, options: CompressionConfig, feedback: bool) -> RowCoding:
        """With compression.fraction, bits and rounding."""
        return cls(fraction_of(options), values_of(options))

    def row_bytes(self, width: int) -> int:
        """Positions and values."""
        count = kept(self.fraction, width)
        return position_bytes(count, width) + self.values.row_bytes(count)

    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Of equal magnitudes the first ones are kept."""
        order = rows.abs().sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, : kept(self.fraction, rows.shape[1])].sort(dim=1).values
        values = self.values.encode(rows.gather(1, chosen), keys)
        return torch.cat([encode_positions(chosen, rows.shape[1]), values], dim=1)

    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Zero where nothing was sent."""
        count = kept(self.fraction, width)
        begin = position_bytes(count, width)
        values = self.values.decode(message[:, begin:], count, keys)
        return values.new_zeros(len(values), width).scatter_(
            1, decode_positions(message[:, :begin], count, width), values
        )


def kept(fraction: float, width: int) -> int:
    """How many of so many numbers are sent."""
    return min(width, max(1, math.ceil(fraction * width)))


def fraction_of(options: CompressionConfig) -> float:
    """compression.fraction."""
    return 0.125 if options.fraction is None else options.fraction


def values_of(options: CompressionConfig) -> RowCoding:
    """How the numbers are coded that are sent."""
    return Float32() if options.bits is None else Integers(options.bits, options.rounding == "stochastic")

"""int8 and int4: whole multiples of a scale, max|x| / (2^(b−1) − 1), one scale a row in float32.

Letters: m rows, n numbers of a row, b bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.coded_fold import integers
from lorafair.communication.coding import pack_bits, unpack_bits
from lorafair.communication.compression.base import RowCoding, as_bytes, as_numbers, random_fractions
from lorafair.config.schema import CompressionConfig


@dataclass(frozen=True)
class Integers(RowCoding):
    """The scale of a row, then its numbers with b bits each, filled up to a byte."""

    bits: int
    stochastic: bool = False  # up or down at random, so that the mean is exact; else to the nearest

    def row_bytes(self, width: int) -> int:
        """A scale, and the numbers."""
        return 4 + -(-width * self.bits // 8)

    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """The largest number of a row is exact but for the rounding of the scale."""
        numbers, scales = integers(rows, self.bits, dim=1)
        if self.stochastic:
            largest, unit = 2 ** (self.bits - 1) - 1, scales.to(torch.float64)
            exact = torch.where(unit > 0, rows.to(torch.float64) / torch.where(unit > 0, unit, 1.0), 0.0)
            numbers = (exact + random_fractions(keys, rows.shape[1])).floor().clamp(-largest, largest)
        return torch.cat([as_bytes(scales), pack_bits(numbers, self.bits)], dim=1)

    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Number times scale, in float32."""
        return unpack_bits(message[:, 4:], width, self.bits) * as_numbers(message[:, :4], torch.float32)


class Int8(Integers):
    """From −127 to 127."""

    @classmethod
    def of(cls, options: CompressionConfig, feedback: bool) -> RowCoding:
        """With compression.rounding."""
        return Integers(8, options.rounding == "stochastic")


class Int4(Integers):
    """From −7 to 7."""

    @classmethod
    def of(cls, options: CompressionConfig, feedback: bool) -> RowCoding:
        """With compression.rounding."""
        return Integers(4, options.rounding == "stochastic")

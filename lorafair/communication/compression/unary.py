"""unary: a row is c·v with whole numbers v, small ones in few bits, and c in bfloat16; the row's length is given.

0, 1, −1, 2, −2, ... are 1, 01, 001, 0001, 00001, ..., so v takes 2|v| or 2|v| + 1 bits. v = x / step to the nearest, with
the smallest step, of all numbers of bfloat16, whose bits fit into the row. c = Σ x·v / Σ v² is then the scale that
minimises ‖x − c·v‖. A few numbers far above the others cost bits in proportion to their size, and nothing is cut off.

Letters: m rows, n numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.communication.coding import pack_flags, unpack_flags
from lorafair.communication.compression.base import RowCoding, as_bytes, as_numbers
from lorafair.config.schema import CompressionConfig

RATE = 1.95  # somewhat below 2 bits: the few bytes that short rows take in addition still leave 16 times less
_SCALE_BYTES = 2
_LARGEST = 1e38  # a step of bfloat16 makes all numbers up to it zero
_LARGEST_STEP = 0x7F7F  # the bits of the largest finite number of bfloat16; those of a larger number are larger


@dataclass(frozen=True)
class Unary(RowCoding):
    """The scale of a row, then its numbers in unary, filled up with zeros: `rate` bits a number in all."""

    rate: float = RATE

    @classmethod
    def of(cls, options: CompressionConfig, feedback: bool) -> RowCoding:
        """With compression.rate."""
        return cls(RATE if options.rate is None else options.rate)

    def row_bytes(self, width: int) -> int:
        """A very short row has 1.25 bits a number beside the scale, so that at least some are not zero."""
        return max(int(self.rate * width / 8), _SCALE_BYTES + -(-5 * width // 32))

    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Computed in float64; sums of a row are made one number after the other, as on every device."""
        exact, bits = rows.to(torch.float64).clamp(-_LARGEST, _LARGEST), self._bits(rows.shape[1])
        numbers = (exact / _smallest_steps(exact, bits)).round()
        products, squares = ((exact * numbers).cumsum(1)[:, -1:], numbers.square().cumsum(1)[:, -1:])
        scales = torch.where(squares > 0, products / squares.clamp(min=1), 0.0)
        ends = _lengths(numbers).cumsum(1).to(torch.int64) - 1
        flags = torch.zeros(len(rows), bits, dtype=torch.uint8, device=rows.device).scatter_(1, ends, 1)
        return torch.cat([as_bytes(scales.to(torch.bfloat16)), pack_flags(flags)], dim=1)

    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Number times scale, in float32."""
        flags = unpack_flags(message[:, _SCALE_BYTES:], self._bits(width))
        ends = flags.nonzero()[:, 1].view(len(message), width)
        lengths = ends.diff(dim=1, prepend=ends.new_full((len(message), 1), -1))
        numbers = lengths // 2 * (1 - 2 * (lengths % 2))
        return numbers.float() * as_numbers(message[:, :_SCALE_BYTES], torch.bfloat16).float()

    def _bits(self, width: int) -> int:
        return 8 * (self.row_bytes(width) - _SCALE_BYTES)


def _lengths(numbers: Tensor) -> Tensor:
    """Bits of whole numbers."""
    return 2 * numbers.abs() + (numbers <= 0)


def _smallest_steps(rows: Tensor, bits: int) -> Tensor:
    """The smallest steps (m, 1) with which the rows (m, n) fit into so many bits; a larger step never takes more."""
    too_small = torch.zeros(len(rows), 1, dtype=torch.int32, device=rows.device)
    enough = torch.full_like(too_small, _LARGEST_STEP)
    for _ in range(_LARGEST_STEP.bit_length()):
        middle = (too_small + enough).div(2, rounding_mode="floor").clamp(min=1)
        fits = _lengths((rows / _steps(middle)).round()).sum(1, keepdim=True) <= bits
        enough, too_small = torch.where(fits, middle, enough), torch.where(fits, too_small, middle)
    return _steps(enough)


def _steps(patterns: Tensor) -> Tensor:
    """The numbers of bfloat16 with these bits, in float64."""
    return (patterns << 16).view(torch.float32).to(torch.float64)

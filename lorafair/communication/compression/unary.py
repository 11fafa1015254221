"""unary: a row is c·v with v in unary code and c in bfloat16; as precise as fits into a given length.

v are whole numbers, or halves of odd ones where those are nearer to the row, as in a row of numbers of one size.
0, 1, −1, 2, −2, ... are 1, 01, 001, 0001, 00001, ..., and so are ½, −½, 1½, −1½, ...: v takes 2|v| bits, and another
one if it is not positive. v is x / step to the nearest, with the smallest step, of all numbers of bfloat16, whose bits
fit into the row. The first numbers get the v of the next smaller step, as far as the bits that are left suffice, where
that is nearer to the row. c = Σ x·v / Σ v² minimises ‖x − c·v‖. It is never negative, so its sign says whether v are
halves. A few numbers far above the others cost bits in proportion to their size, and none is cut off.

Letters: m rows, n numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.communication.coding import pack_flags, unpack_flags
from lorafair.communication.compression.base import RowCoding, as_bytes, as_numbers
from lorafair.config.schema import CompressionConfig

RATE = 1.95  # not 2, so that it is 16 times less than float32 also with the few bytes that short rows take in addition
_SCALE_BYTES = 2
_LARGEST = 1e38  # with the largest step, all numbers up to this size are zero
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
        """A short row has 1.25 bits a number beside the scale, so that not all of them are zero."""
        return max(int(self.rate * width / 8), _SCALE_BYTES + -(-5 * width // 32))

    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Computed in float64; sums of a row are made one number after the other, as on every device."""
        exact, bits = rows.to(torch.float64).clamp(-_LARGEST, _LARGEST), self._bits(rows.shape[1])
        numbers, scales = _best(exact, [*_fitting(exact, bits, 0.0), *_fitting(exact, bits, 0.5)])
        ends = _lengths(numbers).cumsum(1).to(torch.int64) - 1
        flags = torch.zeros(len(rows), bits, dtype=torch.uint8, device=rows.device).scatter_(1, ends, 1)
        return torch.cat([as_bytes(scales.to(torch.bfloat16)), pack_flags(flags)], dim=1)

    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Number times scale, in float32."""
        scales = as_numbers(message[:, :_SCALE_BYTES], torch.bfloat16).float()
        ends = unpack_flags(message[:, _SCALE_BYTES:], self._bits(width)).nonzero()[:, 1].view(len(message), width)
        lengths = ends.diff(dim=1, prepend=ends.new_full((len(message), 1), -1))
        negative = (lengths % 2 == 1) ^ scales.signbit()  # or zero
        numbers = torch.where(negative, 1 - lengths, lengths).float() / 2
        return numbers * scales.abs()

    def _bits(self, width: int) -> int:
        return 8 * (self.row_bytes(width) - _SCALE_BYTES)


def _best(rows: Tensor, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of numbers v (m, n) those nearest to each row with their best scale c (m, 1), which is negative for halves."""
    best, scales = candidates[0], torch.zeros_like(rows[:, :1])
    gains = scales  # ‖x‖² − ‖x − c·v‖²
    for numbers in candidates:
        products, squares = (rows * numbers).cumsum(1)[:, -1:], numbers.square().cumsum(1)[:, -1:]
        of_these = torch.where(squares > 0, products / squares.clamp(min=0.25), 0.0)
        better = products * of_these > gains
        gains = torch.where(better, products * of_these, gains)
        best = torch.where(better, numbers, best)
        scales = torch.where(better, torch.where(numbers[:, :1] % 1 > 0, -of_these, of_these), scales)
    return best, scales


def _fitting(rows: Tensor, bits: int, shift: float) -> tuple[Tensor, Tensor]:
    """Two choices of v (m, n), whole numbers plus `shift`, that fit: of the smallest step, and with the bits left used.

    Zeros, which gain nothing, where even the shortest halves do not fit.
    """
    smaller, step = _steps_around(rows, bits, shift)
    numbers, finer = _rounded(rows, step, shift), _rounded(rows, smaller, shift)
    left = bits - _lengths(numbers).sum(1, keepdim=True)
    more = (_lengths(finer) - _lengths(numbers)).cumsum(1)
    filled = torch.where(more <= left, finer, numbers)
    return torch.where(left >= 0, numbers, 0.0), torch.where(left >= 0, filled, 0.0)


def _steps_around(rows: Tensor, bits: int, shift: float) -> tuple[Tensor, Tensor]:
    """The largest step (m, 1) that is too small to fit, and the next one; a larger step never takes more bits."""
    too_small = torch.zeros(len(rows), 1, dtype=torch.int32, device=rows.device)
    enough = torch.full_like(too_small, _LARGEST_STEP)
    for _ in range(_LARGEST_STEP.bit_length()):
        middle = ((too_small + enough) // 2).clamp(min=1)
        fits = _lengths(_rounded(rows, _steps(middle), shift)).sum(1, keepdim=True) <= bits
        enough, too_small = torch.where(fits, middle, enough), torch.where(fits, too_small, middle)
    return _steps(too_small.clamp(min=1)), _steps(enough)


def _rounded(rows: Tensor, steps: Tensor, shift: float) -> Tensor:
    """The nearest whole numbers, or halves of odd ones, of the same signs."""
    sizes = (rows.abs() / steps + (0.5 - shift)).floor() + shift
    return torch.where(rows < 0, -sizes, sizes)


def _lengths(numbers: Tensor) -> Tensor:
    """Bits of whole numbers, and of halves of odd ones."""
    return 2 * numbers.abs() + (numbers <= 0)


def _steps(patterns: Tensor) -> Tensor:
    """The numbers of bfloat16 with these bits, in float64."""
    return (patterns << 16).view(torch.float32).to(torch.float64)

"""ternary: a row is c·t with t of −1, 0 and 1, five of them in a byte (3^5 = 243), and c in float32.

With rounding to the nearest, c and t minimise ‖x − c·t‖: the k largest numbers get ±c with c the mean of their
magnitudes, and k maximises (Σ of the k largest |x|)² / k. With stochastic rounding, c = max|x| and t is ±1 with
probability |x| / c (TernGrad, arXiv 1705.07878).

Letters: m rows, n numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.communication.compression.base import RowCoding, as_bytes, as_numbers, random_fractions
from lorafair.config.schema import CompressionConfig

_IN_A_BYTE = 5


@dataclass(frozen=True)
class Ternary(RowCoding):
    """The scale of a row, then its numbers, five a byte: 1.6 bits each."""

    stochastic: bool = False

    @classmethod
    def of(cls, options: CompressionConfig, feedback: bool) -> RowCoding:
        """With compression.rounding."""
        return cls(options.rounding == "stochastic")

    def row_bytes(self, width: int) -> int:
        """A scale, and the numbers."""
        return 4 + -(-width // _IN_A_BYTE)

    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Computed in float64; sums of a row are made one number after the other, as on every device."""
        sizes = rows.to(torch.float64).abs()
        if self.stochastic:
            scales = sizes.amax(1, keepdim=True)
            chosen = random_fractions(keys, rows.shape[1]) * scales < sizes
        else:
            scales, chosen = _nearest(sizes)
        digits = torch.where(chosen, rows.sign(), 0.0).to(torch.int32) + 1  # 0, 1, 2
        filled = torch.nn.functional.pad(digits, (0, -digits.shape[1] % _IN_A_BYTE)).unflatten(1, (-1, _IN_A_BYTE))
        packed = (filled * _powers(rows.device)).sum(2, dtype=torch.int32).to(torch.uint8)
        return torch.cat([as_bytes(scales.float()), packed], dim=1)

    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Number times scale, in float32."""
        digits = (message[:, 4:].unsqueeze(2).to(torch.int32) // _powers(message.device)) % 3
        return (digits.flatten(1)[:, :width] - 1).float() * as_numbers(message[:, :4], torch.float32)


def _nearest(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (m, 1), and which numbers (m, n) get it, from their magnitudes."""
    falling, order = sizes.sort(dim=1, descending=True, stable=True)
    sums = falling.cumsum(1)
    counts = torch.arange(1, sizes.shape[1] + 1, device=sizes.device, dtype=torch.float64)
    best = (sums.square() / counts).argmax(1, keepdim=True)  # (m, 1): k − 1
    places = torch.arange(sizes.shape[1], device=sizes.device)
    chosen = torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, order, places <= best)
    return sums.gather(1, best) / (best + 1), chosen


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([3**place for place in range(_IN_A_BYTE)], dtype=torch.int32, device=device)

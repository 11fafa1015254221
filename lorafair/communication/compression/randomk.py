"""randomk: of every row some numbers drawn with a key that travels in the message; positions need not.

Letters: m rows, n numbers of a row, k of them sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.communication.compression.base import RowCoding
from lorafair.communication.compression.topk import fraction_of, kept, values_of
from lorafair.config.schema import CompressionConfig
from lorafair.seeding import hashed


@dataclass(frozen=True)
class RandomK(RowCoding):
    """k = ⌈fraction·n⌉ numbers, as `values` codes a row of k; another choice for every round, client and row."""

    is_sparse: ClassVar[bool] = True
    needs_key: ClassVar[bool] = True
    fraction: float
    values: RowCoding
    scaled: bool = False  # by n/k, so that the mean is exact, where what is left out is not sent later

    @classmethod
    def of(cls, options: CompressionConfig, feedback: bool) -> RowCoding:
        """With compression.fraction, bits and rounding."""
        return cls(fraction_of(options), values_of(options), scaled=not feedback)

    def row_bytes(self, width: int) -> int:
        """Values alone."""
        return self.values.row_bytes(kept(self.fraction, width))

    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """The numbers as they are, or n/k times as large."""
        return self.values.encode(rows.gather(1, self._chosen(keys, rows.shape[1])), hashed(keys, 1))

    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Zero where nothing was sent."""
        count = kept(self.fraction, width)
        values = self.values.decode(message, count, keys) * (width / count if self.scaled else 1.0)
        return values.new_zeros(len(values), width).scatter_(1, self._chosen(keys, width), values)

    def _chosen(self, keys: Tensor, width: int) -> Tensor:
        """Positions (m, k): those of the smallest of n random numbers."""
        drawn = hashed(hashed(keys, 0).unsqueeze(1), torch.arange(width, device=keys.device))
        return drawn.sort(dim=1, stable=True).indices[:, : kept(self.fraction, width)]

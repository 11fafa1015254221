"""float16 and bfloat16: 2 bytes a number. float32 is here, too: what values of a sparse coding are sent in by default.

float16 has 11 bits of precision from 6e-5 to 65,504 and fewer below; bfloat16 has 8 bits in the range of float32.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lorafair.communication.compression.base import RowCoding, as_bytes, as_numbers


class _Floats(RowCoding):
    dtype: ClassVar[torch.dtype]

    def row_bytes(self, width: int) -> int:
        """Of one format for all numbers."""
        return width * self.dtype.itemsize

    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Rounded to the nearest; what is too large becomes the largest number."""
        limits = torch.finfo(self.dtype)
        return as_bytes(rows.clamp(limits.min, limits.max).to(self.dtype))

    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Exact."""
        return as_numbers(message, self.dtype).float()


class Float16(_Floats):
    """IEEE half precision."""

    dtype = torch.float16


class BFloat16(_Floats):
    """The upper half of float32."""

    dtype = torch.bfloat16


class Float32(_Floats):
    """As they are."""

    dtype = torch.float32

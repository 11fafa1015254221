"""Which k of n numbers are sent: a bitmap of n bits, or the code of Elias and Fano, whichever is shorter.

Elias and Fano (1971, 1974) write rising numbers as their lowest l bits, k·l in all, and the rest in unary: a bitmap of
k + ⌊(n − 1) / 2^l⌋ + 1 bits in which number i sets bit i + (number / 2^l). That is less than half a bit a number above
log2 of the ways to choose k of n, and its length follows from k and n. For k = n/8 it is 5 bits a number that is sent.
Where all are sent, nothing is to be said.

Letters: m rows, n numbers of a row, k of them sent, l low bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafair.communication.coding import pack_flags, unpack_flags


def position_bytes(count: int, width: int) -> int:
    """Bytes of a row."""
    if count == width:
        return 0
    low = _low_bits(count, width)
    return -(-(width if low is None else _upper(count, width, low) + count * low) // 8)


def encode_positions(positions: Tensor, width: int) -> Tensor:
    """Bytes (m, position_bytes) of rising positions (m, k), int64."""
    rows, count = positions.shape
    if count == width:
        return torch.empty(rows, 0, dtype=torch.uint8, device=positions.device)
    low = _low_bits(count, width)
    size = width if low is None else _upper(count, width, low)
    flags = torch.zeros(rows, size, dtype=torch.uint8, device=positions.device)
    if low is None:
        return pack_flags(flags.scatter_(1, positions, 1))
    flags.scatter_(1, (positions >> low) + torch.arange(count, device=positions.device), 1)
    lowest = (positions.unsqueeze(2) >> torch.arange(low, device=positions.device)) & 1
    return pack_flags(torch.cat([flags, lowest.flatten(1).to(torch.uint8)], dim=1))


def decode_positions(message: Tensor, count: int, width: int) -> Tensor:
    """Rising positions (m, k), int64, from their bytes."""
    if count == width:
        return torch.arange(width, device=message.device).expand(len(message), -1)
    low = _low_bits(count, width)
    if low is None:
        return _set(unpack_flags(message, width), count)
    size = _upper(count, width, low)
    flags = unpack_flags(message, size + count * low)
    high = _set(flags[:, :size], count) - torch.arange(count, device=message.device)
    places = torch.arange(low, device=message.device)
    lowest = (flags[:, size:].unflatten(1, (count, low)).to(torch.int64) << places).sum(2) if low else 0
    return (high << low) + lowest


def _low_bits(count: int, width: int) -> int | None:
    """The l of the shortest code; None where the bitmap is as short."""
    best = min(range(width.bit_length()), key=lambda low: _upper(count, width, low) + count * low)
    return None if width <= _upper(count, width, best) + count * best else best


def _upper(count: int, width: int, low: int) -> int:
    return count + ((width - 1) >> low) + 1


def _set(flags: Tensor, count: int) -> Tensor:
    """Where the rows (m, ...) have their k ones."""
    return flags.nonzero()[:, 1].view(len(flags), count)

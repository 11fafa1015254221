"""What a coding is: rows of numbers become rows of bytes, all of one length, and back.

A row is a direction of a factor (a row of A, a column of B), a class of the head, or a core. Every row is coded by
itself, so a client of smaller LoRA rank gets fewer rows of the same message, and clients can be coded side by side.

Letters: m rows, n numbers of a row.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lorafair.config.schema import CompressionConfig
from lorafair.errors import ConfigError
from lorafair.registry import COMPRESSIONS
from lorafair.seeding import hashed

_MANTISSA = 2**53


class RowCoding(ABC):
    """A coding of rows of numbers; register one with `lorafair.register_compression`.

    It has to be the same on every device and for any number of rows beside each other: what `decode` makes of the bytes
    is what server and clients go on with.

    Example:
        >>> @lorafair.register_compression("signs")
        ... class Signs(lorafair.RowCoding):
        ...     def row_bytes(self, width):
        ...         return 4 + width
        ...
        ...     def encode(self, rows, keys):
        ...         scale = rows.abs().amax(1, keepdim=True)
        ...         return torch.cat([scale.view(torch.uint8), (rows > 0).to(torch.uint8)], dim=1)
        ...
        ...     def decode(self, message, width, keys):
        ...         scale = message[:, :4].contiguous().view(torch.float32)
        ...         return scale * (2 * message[:, 4:].float() - 1)
    """

    is_sparse: ClassVar[bool] = False
    """It leaves numbers out, which is of use only where what is left out is sent later."""
    needs_key: ClassVar[bool] = False
    """The decoder needs the key that the encoder had: it travels, 8 bytes a message."""

    @classmethod
    def of(cls, options: CompressionConfig, feedback: bool) -> RowCoding:
        """The coding with the options of a run; with `feedback`, what is lost in a round is added in the next one."""
        return cls()

    @abstractmethod
    def row_bytes(self, width: int) -> int:
        """Bytes of a row of so many numbers."""

    @abstractmethod
    def encode(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bytes (m, row_bytes(n)), uint8, of finite rows (m, n) in float32.

        `keys` (m,) int64 are random bits that seed, round, client and place of the row determine.
        """

    @abstractmethod
    def decode(self, message: Tensor, width: int, keys: Tensor) -> Tensor:
        """Rows (m, n) in float32, n = `width`, from their bytes; `keys` say something only where `needs_key`."""


Kind = TypeVar("Kind", bound=type[RowCoding])


def register_compression(name: str) -> Callable[[Kind], Kind]:
    """Make a class a value of compression.up, compression.down and compression.folded.

    Args:
        name: The value to use.

    Returns:
        A decorator for a class that extends `RowCoding`.

    Raises:
        ConfigError: The name is taken, or the class is no such class.

    Example:
        >>> @lorafair.register_compression("signs")
        ... class Signs(lorafair.RowCoding): ...
    """

    def register(coding: Kind) -> Kind:
        if not (isinstance(coding, type) and issubclass(coding, RowCoding) and not inspect.isabstract(coding)):
            raise ConfigError(
                f"coding {name}: {coding} must extend lorafair.RowCoding and have `row_bytes`, `encode` and `decode`"
            )
        COMPRESSIONS.add(name, coding)
        return coding

    return register


def as_bytes(rows: Tensor) -> Tensor:
    """Rows of any numbers as rows of bytes."""
    return rows.contiguous().view(torch.uint8)


def as_numbers(message: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of bytes as rows of numbers."""
    return message.clone(memory_format=torch.contiguous_format).view(
        dtype
    )  # a copy: where it begins fits no wider number


def random_fractions(keys: Tensor, width: int) -> Tensor:
    """Numbers (m, n) from 0 to below 1, in float64, that the keys (m,) determine."""
    bits = hashed(keys.unsqueeze(1), torch.arange(width, device=keys.device))
    return (bits & (_MANTISSA - 1)).to(torch.float64) / _MANTISSA

"""The coded message of a client, or of the server: the parts of a packed adapter, row by row.

First the key, 8 bytes, where the coding needs it; then A of all layers, B, cores and head, as in a packed row. The rows
of a layer are its directions: rows of A, columns of B. A core has a row a head, the head a row a class and one for its
biases. A client of LoRA rank r sends and gets r of the R directions of every layer; nothing else depends on the rank.

Letters: C clients, R LoRA rank, r of a client, I in_features, O out_features, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.communication.compression.base import RowCoding, as_bytes, as_numbers
from lorafair.model.adapter import AdapterLayout, Part
from lorafair.seeding import hashed

KEY_BYTES = 8
_NUMBERS_AT_A_TIME = 2**22  # of all clients coded side by side: more would only take memory


@dataclass(frozen=True)
class MessageFormat:
    """What is sent of an adapter, and how."""

    layout: AdapterLayout
    parts: tuple[Part, ...]
    coding: RowCoding
    of_head: RowCoding | None = None  # where the head has a coding of its own

    @property
    def head(self) -> RowCoding:
        """The coding of the head."""
        return self.coding if self.of_head is None else self.of_head

    @property
    def needs_key(self) -> bool:
        """Whether the key travels."""
        sent = [self.coding] * (self.parts != ("head",)) + [self.head] * ("head" in self.parts)
        return any(coding.needs_key for coding in sent)

    def length(self, lora_rank: int, sent: Mapping[str, int] | None = None) -> int:
        """Bytes of the message of one client of this LoRA rank; of some layers fewer directions may be `sent`."""
        row_bytes, parts = self.coding.row_bytes, self.parts
        total = KEY_BYTES if self.needs_key else 0
        for path, (a, b) in self.layout.factors.items():
            directions = min(lora_rank, (sent or {}).get(path, lora_rank))
            total += directions * (row_bytes(a[1]) * ("A" in parts) + row_bytes(b[0]) * ("B" in parts))
        if "core" in parts:
            total += sum(H[0] * row_bytes(H[1] * H[2]) for H, _ in self.layout.cores.values())
        if "head" in parts:
            total += sum(rows * self.head.row_bytes(width) for rows, width in map(_rows_of, self.layout.head.values()))
        return total

    def encode(
        self, numbers: Tensor, directions: Tensor, keys: Tensor, sent: Mapping[str, int] | None = None
    ) -> Tensor:
        """Messages (C, bytes) of packed numbers (C, P), of the clients' `directions` (C, r) in every layer.

        Of layers in `sent` so many of them, the first ones. `keys` (C,) are random bits, other ones for each message.
        """
        together = max(1, _NUMBERS_AT_A_TIME // max(1, self.layout.length))
        some = zip(numbers.split(together), directions.split(together), keys.split(together), strict=True)
        return torch.cat([self._encode(rows, chosen, of_rows, sent) for rows, chosen, of_rows in some])

    def decode(self, messages: Tensor, directions: Tensor, sent: Mapping[str, int] | None = None) -> Tensor:
        """Packed numbers (C, P), zero in all that is not sent, from messages (C, bytes)."""
        result = torch.zeros(len(messages), self.layout.length, device=messages.device)
        together = max(1, _NUMBERS_AT_A_TIME // max(1, self.layout.length))
        some = zip(result.split(together), messages.split(together), directions.split(together), strict=True)
        for target, coded, chosen in some:
            self._decode(target, coded, chosen, sent)
        return result

    def _encode(self, numbers: Tensor, directions: Tensor, keys: Tensor, sent: Mapping[str, int] | None) -> Tensor:
        message = [as_bytes(keys.unsqueeze(1)) if self.needs_key else keys.new_zeros(len(keys), 0).byte()]
        for place, (view, chosen, coding) in enumerate(self._blocks(numbers, directions, sent)):
            rows = view.gather(1, _across(chosen, view)).flatten(0, 1)
            coded = coding.encode(rows, row_keys(keys, place, chosen))
            message.append(coded.view(len(numbers), -1))
        return torch.cat(message, dim=1)

    def _decode(self, target: Tensor, messages: Tensor, directions: Tensor, sent: Mapping[str, int] | None) -> None:
        offset, keys = 0, torch.zeros(len(messages), dtype=torch.int64, device=messages.device)
        if self.needs_key:
            offset, keys = KEY_BYTES, as_numbers(messages[:, :KEY_BYTES], torch.int64).squeeze(1)
        for place, (view, chosen, coding) in enumerate(self._blocks(target, directions, sent)):
            (count, rows), width = chosen.shape, view.shape[2]
            begin, offset = offset, offset + rows * coding.row_bytes(width)
            coded = messages[:, begin:offset].reshape(count * rows, -1)
            decoded = coding.decode(coded, width, row_keys(keys, place, chosen))
            view.scatter_(1, _across(chosen, view), decoded.view(count, rows, width))

    def _blocks(
        self, flat: Tensor, directions: Tensor, sent: Mapping[str, int] | None
    ) -> Iterator[tuple[Tensor, Tensor, RowCoding]]:
        """Views (C, rows, width) into packed numbers (C, P), which rows are sent (C, n), and how, in order."""
        state = self.layout.unpack(flat)
        for part in (part for part in ("A", "B") if part in self.parts):
            for path, factors in state.factors.items():
                chosen = directions[:, : (sent or {}).get(path)]
                if chosen.shape[1]:
                    yield (factors.A if part == "A" else factors.B.mT), chosen, self.coding
        others = [(core.H.flatten(2), self.coding) for core in state.cores.values()] if "core" in self.parts else []
        if "head" in self.parts:
            shapes = {name: _rows_of(shape) for name, shape in self.layout.head.items()}
            others += [(tensor.view(len(flat), *shapes[name]), self.head) for name, tensor in state.head.items()]
        for view, coding in others:
            yield view, torch.arange(view.shape[1], device=flat.device).expand(len(flat), -1), coding


def first_directions(clients: int, lora_rank: int, device: torch.device) -> Tensor:
    """The first ones (C, r), which is what clients of smaller LoRA rank have of every layer."""
    return torch.arange(lora_rank, device=device).expand(clients, -1)


def _rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and width of a tensor of the head: a row a class, or one row of biases."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def row_keys(keys: Tensor, place: int, chosen: Tensor) -> Tensor:
    """Random bits (C·n,) of the rows `chosen` (C, n) of a block."""
    return hashed(hashed(keys, place).unsqueeze(1), chosen).flatten()


def _across(chosen: Tensor, view: Tensor) -> Tensor:
    return chosen.unsqueeze(2).expand(-1, -1, view.shape[2])

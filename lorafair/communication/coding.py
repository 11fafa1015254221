"""The coded message of the server: bytes, and back.

First the parts of a packed row that clients get, A and B in float16 or float32 and the head in float32; then, for each
layer that has something folded, the scales of the columns of B and of the rows of A in float32, and the whole numbers
of B and A, b bits each, offset so that none is negative, the first bit the lowest, filled up to a byte.

Letters: R LoRA rank, I in_features, O out_features, r rank of what is folded, b bits, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.coded_fold import Coding, integers
from lorafair.model.adapter import PARTS, AdapterLayout, LoRAFactors, Part


def start_dtype(part: Part, coding: Coding) -> torch.dtype:
    """What the numbers of a part are sent in."""
    return torch.float16 if coding.half_start and part in ("A", "B") else torch.float32


def message_length(layout: AdapterLayout, parts: Sequence[Part], folded_ranks: Sequence[int], coding: Coding) -> int:
    """Bytes of the message; `folded_ranks` (L,) are 0 where nothing is folded."""
    start = sum(layout.length_of((part,)) * start_dtype(part, coding).itemsize for part in PARTS if part in parts)
    shapes = zip(layout.factors.values(), folded_ranks, strict=True)
    return start + sum(coding.message_bytes(rank, b[0], a[1]) for (a, b), rank in shapes)


def encode(update: ServerUpdate, layout: AdapterLayout, parts: Sequence[Part], coding: Coding) -> Tensor:
    """The message as bytes (uint8), on the device of the update."""
    row = layout.pack(update.adapter)
    message = [_bytes(layout.select(row, (part,)).to(start_dtype(part, coding))) for part in PARTS if part in parts]
    for path in layout.factors:
        if path in update.folded:
            of_b, scale_b = integers(update.folded[path].B, coding.bits, dim=0)
            of_a, scale_a = integers(update.folded[path].A, coding.bits, dim=1)
            message += [_bytes(scale_b), _bytes(scale_a)]
            message.append(pack_bits(torch.cat([of_b.flatten(), of_a.flatten()]), coding.bits))
    return torch.cat([row[:0].view(torch.uint8), *message])


def decode(
    message: Tensor, layout: AdapterLayout, parts: Sequence[Part], folded_ranks: Sequence[int], coding: Coding
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """The numbers of `parts` in the order of a packed row, in float32, and the folded factors by layer."""
    offset = 0

    def take(count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        nonlocal offset
        begin, offset = offset, offset + count * dtype.itemsize
        return message[begin:offset].clone().view(dtype)  # a copy: where it begins fits no wider number

    start = [take(layout.length_of((part,)), start_dtype(part, coding)).float() for part in PARTS if part in parts]
    folded: dict[str, LoRAFactors] = {}
    for (path, (a, b)), rank in zip(layout.factors.items(), folded_ranks, strict=True):
        if rank:
            scale_b, scale_a = take(rank, torch.float32), take(rank, torch.float32)
            count = rank * (b[0] + a[1])
            numbers = unpack_bits(take(-(-count * coding.bits // 8)), count, coding.bits)
            of_b, of_a = numbers.split([b[0] * rank, rank * a[1]])
            B, A = of_b.view(b[0], rank) * scale_b, of_a.view(rank, a[1]) * scale_a.unsqueeze(1)
            folded[path] = LoRAFactors(A=A, B=B)
    return torch.cat([message[:0].float(), *start]), folded


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers (..., n) from −(2^(b−1) − 1) to 2^(b−1) − 1 as bytes, b bits each; every row ends with a byte."""
    offset = numbers.to(torch.int32) + (2 ** (bits - 1) - 1)
    places = torch.arange(bits, device=numbers.device, dtype=torch.int32)
    return pack_flags(((offset.unsqueeze(-1) >> places) & 1).to(torch.uint8).flatten(-2))


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` numbers in each row of `packed`, as float32."""
    of_number = unpack_flags(packed, count * bits).unflatten(-1, (count, bits)).to(torch.int32)
    places = torch.arange(bits, device=packed.device, dtype=torch.int32)
    sums: Tensor = (of_number << places).sum(-1, dtype=torch.int32)
    return sums.sub_(2 ** (bits - 1) - 1).float()


def pack_flags(flags: Tensor) -> Tensor:
    """Zeros and ones (..., n) of uint8 as bytes, the first one the lowest bit, filled up to a byte."""
    filled = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (filled << torch.arange(8, device=flags.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed


def unpack_flags(packed: Tensor, count: int) -> Tensor:
    """The first `count` zeros and ones in each row of `packed`."""
    flags: Tensor = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return flags.flatten(-2)[..., :count]


def folded_ranks(folded: Mapping[str, LoRAFactors], layout: AdapterLayout) -> list[int]:
    """The rank of what is folded into each layer (L,), 0 where nothing is."""
    return [folded[path].rank if path in folded else 0 for path in layout.factors]


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(-1).view(torch.uint8)

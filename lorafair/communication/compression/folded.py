"""The coded message of what is folded into the frozen weights, layer by layer: the rows of A, then the columns of B.

A product that the server keeps as a matrix has an identity for its other factor, which is not sent.

Letters: r rank of what is folded, I in_features, O out_features, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lorafair.communication.collectives import BOTH, ONLY_A, ONLY_B, which_factors
from lorafair.communication.compression.base import RowCoding, as_bytes, as_numbers
from lorafair.communication.compression.message import KEY_BYTES, row_keys
from lorafair.model.adapter import AdapterLayout, LoRAFactors

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Forms: TypeAlias = dict[str, tuple[int, int]]  # of layers with something folded: its rank, and which factors are sent


def forms_of(folded: Mapping[str, LoRAFactors]) -> Forms:
    """What is to be known of folded factors before their message can be read."""
    return {path: (factors.rank, which_factors(factors)) for path, factors in folded.items() if factors.rank}


def folded_bytes(layout: AdapterLayout, forms: Forms, coding: RowCoding) -> dict[str, int]:
    """Bytes of each layer; the key, where the coding needs one, is in the first of them."""
    found = {
        path: sum(rows * coding.row_bytes(width) for rows, width in _shapes(layout, path, *form))
        for path, form in forms.items()
    }
    for path in list(found)[:1]:
        found[path] += KEY_BYTES if coding.needs_key else 0
    return found


def encode_folded(folded: Mapping[str, LoRAFactors], layout: AdapterLayout, coding: RowCoding, key: int) -> Tensor:
    """The message (bytes,) of factors by layer, at least of one."""
    forms, message = forms_of(folded), list[Tensor]()
    for path in (path for path in layout.factors if path in forms):
        factors, (_, sent) = folded[path], forms[path]
        for rows in [factors.A] * (sent != ONLY_B) + [factors.B.mT] * (sent != ONLY_A):
            keys = torch.tensor([key], device=rows.device)
            message.append(coding.encode(rows.float().contiguous(), _keys(keys, len(message), len(rows))).flatten())
    start = [as_bytes(keys)] if coding.needs_key else []
    return torch.cat([*start, *message])


def decode_folded(message: Tensor, layout: AdapterLayout, forms: Forms, coding: RowCoding) -> dict[str, LoRAFactors]:
    """The factors by layer, in float32."""
    offset, keys, found = 0, torch.zeros(1, dtype=torch.int64, device=message.device), {}
    if coding.needs_key:
        offset, keys = KEY_BYTES, as_numbers(message[:KEY_BYTES], torch.int64)
    place = 0
    for path in (path for path in layout.factors if path in forms):
        rank, sent = forms[path]
        matrices = []
        for rows, width in _shapes(layout, path, rank, sent):
            begin, offset = offset, offset + rows * coding.row_bytes(width)
            matrices.append(coding.decode(message[begin:offset].view(rows, -1), width, _keys(keys, place, rows)))
            place += 1
        identity = torch.eye(rank, device=message.device)
        A, B = {BOTH: matrices, ONLY_A: [*matrices, identity], ONLY_B: [identity, *matrices]}[sent]
        found[path] = LoRAFactors(A=A, B=B.mT.contiguous())
    return found


def broadcast_folded(
    fabric: Fabric, folded: Mapping[str, LoRAFactors] | None, layout: AdapterLayout, coding: RowCoding, key: int
) -> dict[str, LoRAFactors]:
    """The coded factors of rank 0 on every rank, as they are decoded. Call on every rank."""
    mine = forms_of(folded or {})
    table = torch.tensor([mine.get(path, (0, BOTH)) for path in layout.factors]).view(-1, 2).to(fabric.device)
    if fabric.world_size > 1:
        dist.broadcast(table, src=0)
    listed = zip(layout.factors, table.tolist(), strict=True)
    forms = {path: (rank, sent) for path, (rank, sent) in listed if rank}
    if not forms:
        return {}
    if folded is None:
        length = sum(folded_bytes(layout, forms, coding).values())
        message = torch.empty(length, dtype=torch.uint8, device=fabric.device)
    else:
        message = encode_folded(folded, layout, coding, key)
    if fabric.world_size > 1:
        dist.broadcast(message, src=0)
    return decode_folded(message, layout, forms, coding)


def _shapes(layout: AdapterLayout, path: str, rank: int, sent: int) -> list[tuple[int, int]]:
    """Rows and width of the matrices that are sent of a layer."""
    (_, inputs), (outputs, _) = layout.factors[path]
    return [(rank, inputs)] * (sent != ONLY_B) + [(rank, outputs)] * (sent != ONLY_A)


def _keys(keys: Tensor, place: int, rows: int) -> Tensor:
    return row_keys(keys, place, torch.arange(rows, device=keys.device).unsqueeze(0))

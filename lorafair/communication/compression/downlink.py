"""What the server sends down with compression: the difference to what clients hold, coded, and what was lost before.

x is what the method returns, h what clients hold and e what was lost so far. The server sends m = Q(x + e − h),
clients and server go on from h + m, and e becomes x + e − h − m. Of a method that decomposes its update anew, factors
may be far from those before: they are turned towards them first, which leaves the product as it is, and a tensor is
sent whole, as Q(x + e) from which clients go on, where its norm is smaller than the difference's. A bit a tensor tells.

Letters: R LoRA rank, P packed length, p numbers sent, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lorafair.aggregation.alignment import aligned
from lorafair.aggregation.base import ServerUpdate
from lorafair.communication.coding import pack_flags, unpack_flags
from lorafair.communication.compression.base import RowCoding
from lorafair.communication.compression.message import MessageFormat, first_directions
from lorafair.model.adapter import AdapterLayout, LoRAFactors, Part

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Downlink:
    """The server's coded messages of a run."""

    layout: AdapterLayout
    coding: RowCoding
    corrected: tuple[Part, ...]  # with error feedback
    decomposes: bool = False
    turns: bool = False
    of_head: RowCoding | None = None  # where the head has a coding of its own

    def length(self, parts: Sequence[Part], lora_rank: int, sent: Mapping[str, int] | None = None) -> int:
        """Bytes of the message to a client of this LoRA rank."""
        flags = -(-len(list(self._tensors(self._row(), parts))) // 8) if self.decomposes else 0
        return flags + self._format(parts).length(lora_rank, sent)

    def broadcast(
        self, fabric: Fabric, update: ServerUpdate | None, held: Tensor, lost: Tensor, parts: Sequence[Part], key: int
    ) -> Tensor:
        """What clients hold next, the numbers (p,) of `parts`, on every rank; `update` is given on rank 0.

        `held` (P,) is the same on every rank; `lost` (P,) is moved on, on rank 0. Call on every rank.
        """
        sent, size = self._broadcast_sent(fabric, update), self._largest
        if update is None:
            message = torch.empty(self.length(parts, size, sent), dtype=torch.uint8, device=fabric.device)
        else:
            message, wanted = self.encode(update, held, lost, parts, key)
        if fabric.world_size > 1 and message.numel():
            dist.broadcast(message, src=0)
        reached = self.decode(message, held, parts, sent)
        if update is not None:
            for part in (part for part in self.corrected if part in parts):
                span = self.layout.slices[part]
                lost[span] = wanted[span] - reached[span]
        return self.layout.select(reached, parts)

    def encode(
        self, update: ServerUpdate, held: Tensor, lost: Tensor, parts: Sequence[Part], key: int
    ) -> tuple[Tensor, Tensor]:
        """The message (bytes,), and what clients should hold (P,)."""
        wanted = self.layout.pack(self._turned(update, held).adapter)
        self._clear_unsent(lost, update.sent_lora_rank)
        wanted, base = wanted + lost, held.clone()
        flags = []
        for target, kept in zip(self._tensors(wanted, parts), self._tensors(base, parts), strict=True):
            flags.append(self.decomposes and bool(target.norm() < (target - kept).norm()))
            if flags[-1]:
                kept.zero_()
        directions = first_directions(1, self._largest, held.device)
        keys = torch.tensor([key], device=held.device)
        difference = (wanted - base).unsqueeze(0)
        [message] = self._format(parts).encode(difference, directions, keys, update.sent_lora_rank)
        if self.decomposes:
            of_tensors = torch.tensor(flags, dtype=torch.uint8, device=held.device)
            message = torch.cat([pack_flags(of_tensors), message])
        return message, wanted

    def decode(self, message: Tensor, held: Tensor, parts: Sequence[Part], sent: Mapping[str, int]) -> Tensor:
        """What clients hold after a message, (P,)."""
        reached = held.clone()
        if self.decomposes:
            tensors = list(self._tensors(reached, parts))
            size = -(-len(tensors) // 8)
            for tensor, flag in zip(tensors, unpack_flags(message[:size], len(tensors)).tolist(), strict=True):
                if flag:
                    tensor.zero_()
            message = message[size:]
        directions = first_directions(1, self._largest, held.device)
        reached += self._format(parts).decode(message.unsqueeze(0), directions, sent)[0]
        for path, factors in self.layout.unpack(reached).factors.items():
            if sent[path] < factors.rank:  # nothing is sent of them: B is zero, and A the one that clients have
                factors.B[:, sent[path] :] = 0
                factors.A[sent[path] :] = self.layout.unpack(held).factors[path].A[sent[path] :]
        return reached

    def _turned(self, update: ServerUpdate, held: Tensor) -> ServerUpdate:
        """The same products of factors next to those that clients hold."""
        if not self.turns:
            return update
        last, factors = self.layout.unpack(held).factors, dict(update.factors)
        for path, new in update.factors.items():
            if update.sent_lora_rank.get(path, new.rank) == new.rank:
                stacked = LoRAFactors(A=new.A.unsqueeze(0), B=new.B.unsqueeze(0))
                turned = aligned(stacked, last[path])
                factors[path] = LoRAFactors(A=turned.A[0], B=turned.B[0]).to(new.A.dtype)
        return replace(update, factors=factors)

    def _clear_unsent(self, lost: Tensor, sent: Mapping[str, int]) -> None:
        """Directions that are not sent are zero at the clients, which lack nothing of them."""
        for path, factors in self.layout.unpack(lost).factors.items():
            factors.B[:, sent.get(path, factors.rank) :] = 0
            factors.A[sent.get(path, factors.rank) :] = 0

    def _broadcast_sent(self, fabric: Fabric, update: ServerUpdate | None) -> dict[str, int]:
        """Directions sent of each layer (L,); as other shapes they go ahead and are not counted."""
        given = {} if update is None else update.sent_lora_rank
        ranks = torch.tensor([given.get(path, a[0]) for path, (a, _) in self.layout.factors.items()])
        ranks = ranks.to(fabric.device)
        if fabric.world_size > 1:
            dist.broadcast(ranks, src=0)
        return dict(zip(self.layout.factors, ranks.tolist(), strict=True))

    def _tensors(self, flat: Tensor, parts: Sequence[Part]) -> Iterator[Tensor]:
        """Views into a packed row: each factor, core and parameter of the head that is sent."""
        state = self.layout.unpack(flat)
        yield from (f.A for f in state.factors.values() if "A" in parts)
        yield from (f.B for f in state.factors.values() if "B" in parts)
        yield from (core.H for core in state.cores.values() if "core" in parts)
        yield from (tensor for tensor in state.head.values() if "head" in parts)

    def _format(self, parts: Sequence[Part]) -> MessageFormat:
        return MessageFormat(self.layout, tuple(parts), self.coding, self.of_head)

    def _row(self) -> Tensor:
        return torch.empty(self.layout.length, device="meta")

    @property
    def _largest(self) -> int:
        """R."""
        return max((a[0] for a, _ in self.layout.factors.values()), default=0)

"""Watches the operations of torch.distributed on one rank and holds them to the rules of NCCL, which is not there.

The rules are those at the top of lorafair/communication/collectives.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from tests.torch_private import FakeStore

# ncclDataType of PyTorch's ProcessGroupNCCL.cpp; bool travels as uint8.
DTYPES = {
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool,
}  # fmt: skip
# What a group can do beside what is recorded. Whoever begins to use one writes down first what NCCL asks for.
UNKNOWN = (
    "all_to_all", "all_to_all_single", "all_gather_into_tensor", "gather", "gather_object", "scatter", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "new_group", "monitored_barrier",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One operation, as all ranks of it must name it alike."""

    name: str  # "send" and "receive" concern two ranks, all others every rank
    numbers: int
    dtype: torch.dtype | None
    detail: Any = None  # of a collective, its operator or source
    peer: int | None = None


@dataclass
class Recorded:
    """What a rank has done, in order."""

    operations: list[Operation]

    def bytes_of(self, *names: str) -> int:
        """Of operations of these names, as they are handed to the group."""
        sizes = (op.numbers * op.dtype.itemsize for op in self.operations if op.name in names and op.dtype is not None)
        return sum(sizes)


class BrokenRuleError(AssertionError):
    """NCCL would hang, fail or mix up data."""


def check(tensor: Tensor, device: torch.device, name: str) -> None:
    """One tensor that is handed to a group."""
    for holds, rule in (
        (tensor.device == device, f"is on {tensor.device}, not on {device}"),
        (tensor.is_contiguous(), f"of strides {tensor.stride()} is not contiguous"),
        (tensor.dtype in DTYPES, f"is of {tensor.dtype}, which NCCL has not"),
        (tensor.numel() > 0, "is empty"),
    ):
        if not holds:
            raise BrokenRuleError(f"{name}: a tensor {tuple(tensor.shape)} {rule}")


@contextmanager
def pretended(rank: int, world_size: int, device: str = "cpu") -> Iterator[Any]:
    """A Fabric of one rank of many, with PyTorch's group that sends nothing. What it receives stays as it was."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield SimpleNamespace(
            world_size=world_size, global_rank=rank, local_rank=rank % 8, is_global_zero=rank == 0,
            device=torch.device(device),
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


@contextmanager
def recording(device: torch.device | str = "cpu", *, perform: bool = True) -> Iterator[Recorded]:
    """Record and check what this process does; without `perform` nothing else happens to the tensors."""
    device, recorded = torch.device(device), Recorded([])

    def note(name: str, tensor: Tensor, **more: Any) -> None:
        check(tensor, device, name)
        recorded.operations.append(Operation(name, tensor.numel(), tensor.dtype, **more))

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *_: Any, **__: Any) -> None:
        note("all_reduce", tensor, detail=str(op))

    def broadcast(tensor: Tensor, src: int | None = None, *_: Any, group_src: int | None = None, **__: Any) -> None:
        note("broadcast", tensor, detail=src if group_src is None else group_src)

    def all_gather(tensors: Sequence[Tensor], tensor: Tensor, *_: Any, **__: Any) -> None:
        for other in tensors:
            check(other, device, "all_gather")
            if (other.numel(), other.dtype) != (tensor.numel(), tensor.dtype):
                raise BrokenRuleError(f"all_gather: {tuple(other.shape)} beside {tuple(tensor.shape)}")
        note("all_gather", tensor)

    def barrier(*_: Any, **__: Any) -> None:
        recorded.operations.append(Operation("barrier", 0, None))

    def batch_isend_irecv(operations: Sequence[dist.P2POp]) -> None:
        if not recorded.operations:
            raise BrokenRuleError("a group's first operation has to be one of all ranks")
        for operation in operations:
            name = "send" if operation.op is isend else "receive"
            note(name, operation.tensor, peer=operation.peer)

    isend = dist.isend
    with pytest.MonkeyPatch.context() as patch:
        for seen in (all_reduce, broadcast, all_gather, barrier, batch_isend_irecv):
            for module in (dist, distributed_c10d):  # object collectives use the names of the second one
                patch.setattr(module, seen.__name__, _after(seen, getattr(module, seen.__name__), perform))
        for name in UNKNOWN:
            patch.setattr(dist, name, _unknown(name))
        yield recorded


def _after(seen: Callable[..., None], original: Callable[..., Any], perform: bool) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        seen(*arguments, **more)
        return original(*arguments, **more) if perform else ()

    return call


def _unknown(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise BrokenRuleError(f"{name}: nobody has looked at what NCCL asks for")

    return call


def disagreement(ranks: Sequence[Recorded]) -> str:
    """Where the ranks do not do the same; empty if they do.

    All have the same collectives in the same order, and between two of them every send has its receive.
    """
    parts = [_between_collectives(recorded.operations) for recorded in ranks]
    for rank, (collectives, _) in enumerate(parts):
        for index, (mine, first) in enumerate(zip(collectives, parts[0][0], strict=False)):
            if mine != first:
                return f"operation {index} is {mine} on rank {rank} and {first} on rank 0"
        if len(collectives) != len(parts[0][0]):
            return f"rank {rank} has {len(collectives)} collectives and rank 0 {len(parts[0][0])}"
    for index in range(len(parts[0][1])):
        sent = {(rank, op.peer, "send") for rank, (_, gaps) in enumerate(parts) for op in gaps[index]}
        for sender, receiver in sorted({(a, b) for a, b, _ in sent} | {(b, a) for a, b, _ in sent}):  # type: ignore[type-var]
            gone = _messages(parts[sender][1][index], "send", receiver)
            come = _messages(parts[receiver or 0][1][index], "receive", sender)
            if gone != come:
                return f"after collective {index} rank {sender} sends {gone} and rank {receiver} receives {come}"
    return ""


def _between_collectives(operations: Sequence[Operation]) -> tuple[list[Operation], list[list[Operation]]]:
    """The collectives, and the messages before the first, between each two, and after the last of them."""
    collectives: list[Operation] = []
    gaps: list[list[Operation]] = [[]]
    for operation in operations:
        if operation.peer is None:
            collectives.append(operation)
            gaps.append([])
        else:
            gaps[-1].append(operation)
    return collectives, gaps


def _messages(operations: Sequence[Operation], name: str, peer: int | None) -> list[tuple[int, Any]]:
    return [(op.numbers, op.dtype) for op in operations if (op.name, op.peer) == (name, peer)]

"""Agreement between the ranks: one that fails, or is asked to stop, takes the others along."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from lorafair import third_party
from lorafair.cluster.signals import (
    ANOTHER_RANK,
    NOTHING,
    request_stop,
    request_stop_unless_it_fits,
    stop_requested,
)
from lorafair.errors import LorafairError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# What gloo, NCCL and PyTorch's store say when a process is gone.
_SIGNS_OF_LOSS = (
    "losed by peer", "eset by peer", "roken pipe", "imed out", "imeout", "NCCL", "got 0 bytes", "likely closed",
    "refused",
)  # fmt: skip


def is_peer_loss(error: Exception) -> bool:
    """Whether an error of a collective says that another process is gone, or does not answer."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


@dataclass
class Agreement:
    """What the ranks have agreed on at the end of a block."""

    stop: int = NOTHING  # why to stop, see cluster/signals.py


@contextmanager
def same_error_on_all_ranks(fabric: Fabric) -> Iterator[Agreement]:
    """Let an error of one rank end all of them, instead of leaving the others waiting. Use on every rank.

    Rank 0 raises the first error as LorafairError; the other ranks leave quietly with the same exit status. Costs two
    numbers to reduce where all went well; the second says on all ranks alike whether one of them was asked to stop. No
    other collective belongs inside: a rank with an error would miss it.
    """
    agreement = Agreement()
    mine: str | None = None
    try:
        yield agreement
    except (LorafairError, OSError) as error:
        mine = str(error)
    errors: list[str | None] = [mine] * fabric.world_size
    failed, agreement.stop = int(mine is not None), stop_requested()
    if fabric.world_size > 1:
        numbers = torch.tensor([failed, agreement.stop], device=fabric.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        failed, agreement.stop = numbers.tolist()
        if failed:
            dist.all_gather_object(errors, mine)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        abort_on_all_ranks(fabric, first)


def close_process_group(fabric: Fabric) -> None:
    """Take the process group down together. Call on every rank, as the last thing.

    A process that ends with the group open may abort, its threads still running, and then fails a run that is done.
    """
    if fabric.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


class StopRequest:
    """Whether any rank was asked to stop, for looking at between two clients: no rank waits for another.

    A rank that was asked sets a key in the process group's store; one that sees the key is asked thereby. The next
    `same_error_on_all_ranks` then makes all of them stop. Where the job has a time limit, what is not expected to end
    before it asks to stop, too, judged by the longest one so far of its kind.
    """

    _KEY = "lorafair/stop"
    _SECONDS = 0.05  # between two looks at the store, so that tiny clients cost nothing

    def __init__(self, fabric: Fabric) -> None:
        self._store: Any = None
        if fabric.world_size > 1:
            self._store = third_party.default_store()
            if fabric.is_global_zero:
                self._store.delete_key(self._KEY)  # of a run before this one on the same processes
        self._looked = 0.0
        self._longest: dict[str, float] = {}

    def is_set(self, next_kind: str) -> bool:
        """Whether this rank should stop instead of beginning something of this kind."""
        request_stop_unless_it_fits(self._longest.get(next_kind, 0.0))
        if self._store is not None and stop_requested() != NOTHING:
            self._store.set(self._KEY, "")
        elif self._store is not None and time.monotonic() - self._looked > self._SECONDS:
            self._looked = time.monotonic()
            if self._store.check([self._KEY]):
                request_stop(ANOTHER_RANK)
        return stop_requested() != NOTHING

    @contextmanager
    def measured(self, kind: str) -> Iterator[None]:
        """Remember how long the block takes, if it is the longest of its kind."""
        began = time.monotonic()
        yield
        self.remember(kind, time.monotonic() - began)

    def remember(self, kind: str, seconds: float) -> None:
        """Something of this kind has taken so long."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)


def abort_on_all_ranks(fabric: Fabric, message: str) -> NoReturn:
    """End a run for a reason that every rank knows: rank 0 raises it as LorafairError, the others leave quietly."""
    raise LorafairError(message) if fabric.is_global_zero else SystemExit(2)

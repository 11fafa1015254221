"""Agreement between the ranks: if one rank fails or is asked to stop, all ranks stop."""

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
    NO_REASON,
    request_stop,
    request_stop_before_time_limit,
    stop_requested,
)
from lorafair.cluster.watchdog import waiting_for_others
from lorafair.communication.collectives import gather_objects
from lorafair.errors import LorafairError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# In the error messages of gloo, NCCL and PyTorch's store when a process is lost.
_SIGNS_OF_LOSS = (
    "losed by peer", "eset by peer", "roken pipe", "imed out", "imeout", "NCCL", "got 0 bytes", "likely closed",
    "refused",
)  # fmt: skip


# One thread on rank 0 answers what all ranks ask of the store, about 20,000 requests a second. Heartbeats need it, too.
_RANKS_AT_FULL_PACE = 64


def seconds_between_requests(fabric: Fabric, seconds: float) -> float:
    """How long a rank waits between two requests to the store: longer on many ranks, so that rank 0 keeps up."""
    return seconds * max(1.0, fabric.world_size / _RANKS_AT_FULL_PACE)


def is_peer_loss(error: Exception) -> bool:
    """Whether an error of a collective means that another process is lost or does not answer."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


@dataclass
class Agreement:
    """What the ranks have agreed on at the end of a block."""

    stop: int = NO_REASON  # why to stop, see cluster/signals.py


@contextmanager
def same_error_on_all_ranks(fabric: Fabric) -> Iterator[Agreement]:
    """End all ranks when one has an error, so that the others do not wait for it. Use on every rank.

    Rank 0 raises the first error as LorafairError; the other ranks exit with the same status and print nothing. Without
    an error this costs one reduction of two numbers; the second is the request to stop, the same on all ranks
    afterwards. Use no other collective inside: a rank with an error would not take part in it.
    """
    agreement = Agreement()
    mine: str | None = None
    try:
        yield agreement
    except (LorafairError, OSError) as error:
        mine = str(error)
    errors: list[str | None] | None = [mine]
    failed, agreement.stop = int(mine is not None), stop_requested()
    if fabric.world_size > 1:
        numbers = torch.tensor([failed, agreement.stop], device=fabric.device)
        with waiting_for_others():
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
            failed, agreement.stop = numbers.tolist()
            if failed:
                errors = gather_objects(fabric, mine)
    if failed:
        abort_on_all_ranks(fabric, next((error for error in errors or () if error is not None), ""))


def close_process_group(fabric: Fabric) -> None:
    """Close the process group. Call on every rank, at the end.

    A process that ends with the group open may abort while threads still run, and a completed run would then fail.
    """
    if fabric.world_size > 1:
        with waiting_for_others():
            fabric.barrier()  # names the device to NCCL; with dist.barrier() all processes of a node may take its first
            dist.destroy_process_group()


class StopRequest:
    """Whether any rank was asked to stop; checked between two clients without a collective.

    A rank with a request sets a key in the process group's store; a rank that finds the key has a request, too. The
    next `same_error_on_all_ranks` then stops all of them. Where the job has a time limit, a stop is also requested
    before work that may not end in time: it is expected to take as long as the longest of its kind so far.
    """

    _KEY = "lorafair/stop"
    _SECONDS = 0.05  # between two checks of the store, so that they cost nothing with tiny clients; more on many ranks

    def __init__(self, fabric: Fabric) -> None:
        self._store: Any = None
        if fabric.world_size > 1:
            self._store = third_party.default_store()
            if fabric.is_global_zero:
                self._store.delete_key(self._KEY)  # of a run before this one on the same processes
        self._seconds, self._checked_at = seconds_between_requests(fabric, self._SECONDS), 0.0
        self._longest: dict[str, float] = {}

    def is_set(self, next_kind: str, pending: int = 0) -> bool:
        """Whether this rank should stop instead of starting work of this kind, after so much of it that is pending."""
        request_stop_before_time_limit((1 + pending) * self._longest.get(next_kind, 0.0))
        if self._store is not None and stop_requested() != NO_REASON:
            self._store.set(self._KEY, "")
        elif self._store is not None and time.monotonic() - self._checked_at > self._seconds:
            self._checked_at = time.monotonic()
            if self._store.check([self._KEY]):
                request_stop(ANOTHER_RANK)
        return stop_requested() != NO_REASON

    def knows(self, kind: str) -> bool:
        """Whether a duration of this kind was recorded."""
        return kind in self._longest

    def record_duration(self, kind: str, seconds: float) -> None:
        """Work of this kind has taken so long; the longest duration is kept."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)


def abort_on_all_ranks(fabric: Fabric, message: str) -> NoReturn:
    """End a run for a reason that every rank knows: rank 0 raises it as LorafairError, the others exit."""
    raise LorafairError(message) if fabric.is_global_zero else SystemExit(2)

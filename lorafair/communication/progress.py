"""Progress of all ranks, counted in the process group's store and printed by rank 0."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from lorafair import third_party
from lorafair.communication.agreement import seconds_between_requests
from lorafair.console import Progress
from lorafair.schedule import RoundPlan

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_SECONDS = 0.2  # between two additions of a rank to what all have done; longer on many ranks
_numbers = itertools.count()  # of the counts of this process; every rank makes the same ones in the same order


class SharedCount:
    """A number that every rank adds to and rank 0 reads. Make it on every rank, in the same order."""

    def __init__(self, fabric: Fabric) -> None:
        number, self._seconds = next(_numbers), seconds_between_requests(fabric, _SECONDS)
        self._key, self._mine, self._sent_at = f"lorafair/count/{number}", 0, time.monotonic()
        self._store: Any = third_party.default_store() if fabric.world_size > 1 else None
        if self._store is not None and fabric.is_global_zero:
            self._store.delete_key(f"lorafair/count/{number - 3}")  # no rank adds to it any more

    def add(self, amount: int) -> None:
        """This rank has done more."""
        self._mine += amount
        if self._store is not None and time.monotonic() - self._sent_at >= self._seconds:
            self.send()

    def send(self) -> None:
        """Send what was added here to the store."""
        if self._store is not None and self._mine:
            self._store.add(self._key, self._mine)
            self._mine = 0
        self._sent_at = time.monotonic()

    @property
    def total(self) -> int:
        """What all ranks have added and sent."""
        return self._mine if self._store is None else int(self._store.add(self._key, 0)) + self._mine


class SharedProgress:
    """A progress line over what all ranks do. Use it on every rank, as a context."""

    def __init__(self, fabric: Fabric, what: str, total: int, unit: str) -> None:
        self._count, self._line = SharedCount(fabric), Progress(what, total, unit)

    def __enter__(self) -> SharedProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._count.send()
        self._line.close()

    def add(self, amount: int) -> None:
        """This rank has done more."""
        self._count.add(amount)
        if self._line.is_due:
            self._line.show(self._count.total)


class TrainingProgress:
    """The progress line of a round's training: clients done, images, pace, time left. Use it on every rank."""

    def __init__(
        self,
        fabric: Fabric,
        what: str,
        plan: RoundPlan,
        finished: Collection[tuple[int, ...]],
        costs: Sequence[int],
    ) -> None:
        """`finished` cohorts of the plan are done already; `costs` (N,) are the images each client visits."""
        planned = {cohort for cohorts in plan.cohorts_of_rank for cohort in cohorts}  # others were of another device
        before = {client for cohort in planned.intersection(finished) for client in cohort}
        self._total, self._before = len(plan.clients), len(before)
        self._clients, self._images = SharedCount(fabric), SharedCount(fabric)
        self._line = Progress(what, sum(costs[client] for client in plan.clients if client not in before), "images")

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._clients.send()
        self._images.send()
        self._line.close()

    def images_done(self, amount: int) -> None:
        """This rank has trained on so many more images."""
        self._images.add(amount)
        if self._line.is_due:
            done = self._before + self._clients.total
            self._line.show(self._images.total, f"{done} of {self._total} clients, ")

    def clients_done(self, amount: int) -> None:
        """This rank has finished so many more clients."""
        self._clients.add(amount)

"""Whose update counts in a round: clients that are available, and early enough in virtual time.

Everything is a pure function of the seed, the profile and the round, so every rank chooses the same clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafair.virtual_time.devices import Device, Devices


@dataclass(frozen=True)
class Choice:
    """The clients of a round."""

    clients: tuple[int, ...]  # whose update arrives in time, ascending
    late: tuple[int, ...] = ()  # that were asked, too, and are later; ascending
    waited: float | None = None  # the deadline, where the server waited until then
    in_time: bool = True  # False: nobody was, and the first one to arrive is taken


@dataclass(frozen=True)
class Work:
    """What one client has to do in a round."""

    images: int  # visited in local training
    down: int  # bytes to receive
    up: int  # bytes to send


@dataclass(frozen=True)
class Rule:
    """How the clients of a round are chosen."""

    devices: Devices
    over_selection: float | None  # how many clients are asked, by the number that is wanted
    deadline: float | None  # seconds of virtual time
    flop_per_image: float | None = None  # where the profile gives a speed in operations

    def choose(self, order: Sequence[int], wanted: int, round_index: int, work: Callable[[int], Work]) -> Choice:
        """Choose `wanted` of all clients, asked in this order.

        `work` tells what a client has to do. Clients that are not available are not asked. If nobody is available, the
        server tries again until somebody is.
        """
        devices = self.devices.of_all(order, round_index)
        attempt = min(device.failed_attempts for device in devices.values())
        available = [client for client in order if devices[client].failed_attempts == attempt]
        asked = available[: math.ceil(round(wanted * (self.over_selection or 1.0), 9))]
        seconds = {client: self._arrival(devices[client], work(client)) for client in asked}
        by_arrival = sorted(asked, key=lambda client: (seconds[client], client))
        early = [client for client in by_arrival if self.deadline is None or seconds[client] <= self.deadline]
        kept = (early or by_arrival[:1])[:wanted]
        waited = early and len(early) < min(wanted, len(asked))
        return Choice(
            clients=tuple(sorted(kept)),
            late=tuple(sorted(set(asked) - set(kept))),
            waited=self.deadline if waited else None,
            in_time=bool(early),
        )

    def _arrival(self, device: Device, work: Work) -> float:
        """Seconds from the moment a client is asked until its update has arrived."""
        computed = device.compute_seconds(work.images, self.flop_per_image)
        return device.download_seconds(work.down) + computed + device.upload_seconds(work.up)

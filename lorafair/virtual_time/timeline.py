"""From the recorded work of a run and a profile to seconds, joules, bytes and costs, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lorafair.virtual_time.devices import Device, Devices
from lorafair.virtual_time.record import RoundWork

_JOULES_OF_KWH = 3.6e6


@dataclass(frozen=True)
class RoundCost:
    """What one round takes."""

    round: int  # from 1
    seconds: float  # of virtual time
    slowest: int  # the client that the server waits for
    client_joules: float
    server_joules: float
    bytes: int

    @property
    def joules(self) -> float:
        """Of clients and server."""
        return self.client_joules + self.server_joules


@dataclass(frozen=True)
class Spent:
    """What a run has taken from its start to the end of a round."""

    seconds: float = 0.0
    joules: float = 0.0  # of clients and server
    client_joules: float = 0.0
    bytes: int = 0

    @property
    def hours(self) -> float:
        """Of virtual time."""
        return self.seconds / 3600

    @property
    def kwh(self) -> float:
        """Energy in kilowatt hours."""
        return self.joules / _JOULES_OF_KWH

    @property
    def megabytes(self) -> float:
        """10^6 bytes."""
        return self.bytes / 1e6

    def cost(self, prices: Mapping[str, float]) -> float:
        """Electricity and traffic at the prices of a profile."""
        return self.kwh * prices.get("per_kwh", 0.0) + self.bytes / 1e9 * prices.get("per_gb", 0.0)

    def __add__(self, other: RoundCost) -> Spent:
        return Spent(
            self.seconds + other.seconds,
            self.joules + other.joules,
            self.client_joules + other.client_joules,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class Timeline:
    """The rounds of a run in virtual time."""

    rounds: tuple[RoundCost, ...]

    def spent(self) -> dict[int, Spent]:
        """By completed rounds, from round 1."""
        sums = accumulate(self.rounds, lambda so_far, cost: so_far + cost, initial=Spent())
        return dict(zip((cost.round for cost in self.rounds), list(sums)[1:], strict=True))


def timeline(works: Sequence[RoundWork], devices: Devices, flop_per_image: float | None) -> Timeline:
    """Price every round. `flop_per_image` is needed where the profile gives a speed in operations."""
    return Timeline(tuple(round_cost(work, devices, flop_per_image) for work in works))


def round_cost(work: RoundWork, devices: Devices, flop_per_image: float | None) -> RoundCost:
    """One synchronous round.

    It begins when the server asks the first clients that are available. It lasts until the update of the slowest client
    has arrived, or until the deadline where the server waited for it, and for the server step after that.
    """
    index, server = work.round - 1, devices.profile.server
    kept = [
        _Part(devices.of(client, index), images, down, up, flop_per_image)
        for client, images, down, up in zip(work.clients, work.images, work.down, work.up, strict=True)
    ]
    late = [
        _Part(devices.of(client, index), images, down, up, flop_per_image)
        for client, images, down, up in zip(work.late, work.late_images, work.late_down, work.late_up, strict=True)
    ]
    arrivals = [part.arrival for part in kept]
    collected = max(arrivals)
    if work.waited is not None:
        collected = max(collected, work.waited + min(part.device.wait_seconds for part in [*kept, *late]))
    at_server = server.get("seconds", work.server_seconds / server["speed"])
    return RoundCost(
        round=work.round,
        seconds=collected + at_server,
        slowest=work.clients[arrivals.index(max(arrivals))],
        client_joules=sum(part.joules(collected, at_server) for part in [*kept, *late]),
        server_joules=collected * server["idle_watts"] + at_server * server["watts"],
        bytes=work.bytes,
    )


class _Part:
    """What one client does in a round: it waits, downloads, computes and uploads."""

    def __init__(self, device: Device, images: int, down: int, up: int, flop_per_image: float | None) -> None:
        self.device = device
        self._phases = (
            (device.wait_seconds, 0.0),  # not at work for the federation
            (device.download_seconds(down), device.network_watts),
            (device.compute_seconds(images, flop_per_image), device.compute_watts),
            (device.upload_seconds(up), device.network_watts),
        )

    @property
    def arrival(self) -> float:
        """When its update is at the server, in seconds from the beginning of the round."""
        return sum(seconds for seconds, _ in self._phases)

    def joules(self, collected: float, at_server: float) -> float:
        """Its energy in the round; a late client stops when the server has `collected` all that it takes."""
        left, joules = collected, 0.0
        for seconds, watts in self._phases:
            spent = min(seconds, left)
            joules += spent * watts
            left -= spent
        return joules + (left + at_server) * self.device.idle_watts

"""The devices of a run's clients, drawn from a profile: by the seed, the client and the round, and by nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorafair.config.profiles import Profile, Value, place_of
from lorafair.seeding import seeded_numpy

_PURPOSE = "virtual time"
_BITS = 8.0  # of a byte


@dataclass(frozen=True)
class Device:
    """What one client has in one round."""

    kind: str  # of the profile's kinds; empty where it has one
    gflops: float | None  # 10^9 floating-point operations a second, in training
    images_per_second: float | None  # where the speed is given so
    down_mbps: float
    up_mbps: float
    latency_ms: float
    failed_attempts: int  # how often the server asks in vain before the client is available
    retry_seconds: float
    compute_watts: float
    network_watts: float
    idle_watts: float

    @property
    def wait_seconds(self) -> float:
        """Until the client is available."""
        return self.failed_attempts * self.retry_seconds

    def compute_seconds(self, images: int, flop_per_image: float | None) -> float:
        """For local training that visits so many images."""
        if self.images_per_second is not None:
            return images / self.images_per_second
        assert self.gflops is not None
        assert flop_per_image is not None
        return images * flop_per_image / (1e9 * self.gflops)

    def download_seconds(self, bytes: int) -> float:
        """For a message from the server; 0 where nothing is sent."""
        return self._transfer(bytes, self.down_mbps)

    def upload_seconds(self, bytes: int) -> float:
        """For a message to the server; 0 where nothing is sent."""
        return self._transfer(bytes, self.up_mbps)

    def _transfer(self, bytes: int, mbps: float) -> float:
        return self.latency_ms / 1e3 + _BITS * bytes / (1e6 * mbps) if bytes else 0.0


class Devices:
    """The devices of all clients of a run.

    The draws of a client do not depend on the number of clients, on the method, or on what was drawn before, so that
    methods with one seed are compared on the same devices.
    """

    def __init__(self, profile: Profile, seed: int) -> None:
        self.profile, self._seed = profile, seed
        self._drawn: dict[tuple[str | int, ...], list[float]] = {}
        self._orders: dict[str, list[int]] = {}  # of the rows of a trace
        self._names = list(profile.kinds)

    def of(self, client: int, round_index: int) -> Device:
        """The device of a client in a round (from 0)."""
        name = self._names[place_of(self._quantile(client, "kind"), self.profile.probabilities)]
        kind = self.profile.kinds[name]

        def value(key: str) -> float:
            return kind[key].at(self._quantile_of(client, key, kind[key], round_index), round_index)

        availability = value("availability")
        return Device(
            kind=name,
            gflops=value("gflops") if "gflops" in kind else None,
            images_per_second=value("images_per_second") if "images_per_second" in kind else None,
            down_mbps=value("down_mbps"),
            up_mbps=value("up_mbps"),
            latency_ms=value("latency_ms"),
            failed_attempts=_failures(self._quantile(client, "attempts", round_index), availability),
            retry_seconds=value("retry_seconds"),
            compute_watts=value("compute_watts"),
            network_watts=value("network_watts"),
            idle_watts=value("idle_watts"),
        )

    def of_all(self, clients: Iterable[int], round_index: int) -> dict[int, Device]:
        """By client."""
        return {client: self.of(client, round_index) for client in clients}

    def _quantile_of(self, client: int, key: str, value: Value, round_index: int) -> float:
        """Where a client's value is in its distribution. The rows of a trace are dealt out in an order that is drawn.

        All columns of a trace have one order, so that a client gets a row of it.
        """
        if value.kind != "trace":
            return self._quantile(client, *((key, round_index) if value.per_round else (key,)))
        rows = len(value.numbers)
        if value.trace not in self._orders:
            drawn = [self._quantile(row, "trace", value.trace) for row in range(rows)]
            self._orders[value.trace] = sorted(range(rows), key=drawn.__getitem__)
        return (self._orders[value.trace][client % rows] + 0.5) / rows

    def _quantile(self, client: int, *purpose: str | int) -> float:
        """A number from 0 to 1. The first numbers of a stream do not depend on how many are drawn."""
        drawn = self._drawn.get(purpose, [])
        if client >= len(drawn):
            count = 2 * (client + 1)
            drawn = seeded_numpy(self._seed, _PURPOSE, *purpose).random(count).tolist()
            if len(self._drawn) > 64:  # of rounds long past
                self._drawn.clear()
            self._drawn[purpose] = drawn
        return drawn[client]


def _failures(u: float, probability: float) -> int:
    """The number of failures before the first success, at the quantile `u`: of the geometric distribution."""
    failures, reached = 0, probability
    while u >= reached and failures < 1_000_000:
        failures += 1
        reached += (1.0 - reached) * probability
    return failures

"""The plan of a round: its clients, their weights, the rank that trains each, and the learning rate.

Everything is a pure function of the configuration, the round and the clients, so every rank computes the same plan and
nothing is sent. Only the assignment of clients to ranks depends on the number of ranks; no number of a result does.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from lorafair.config.schema import ClientConfig
from lorafair.model.adapter import Part
from lorafair.seeding import seeded
from lorafair.virtual_time.choice import Choice


@dataclass(frozen=True)
class RoundPlan:
    """One communication round of K clients on W ranks."""

    clients: tuple[int, ...]  # ascending; the row order of every (K, ...) tensor
    weights: tuple[float, ...]  # (K,) sum to 1; K may be 0 where clients are sampled independently
    cohorts_of_rank: tuple[tuple[tuple[int, ...], ...], ...]  # W entries: the cohorts a rank trains, in order
    choice: Choice | None = None  # how the clients were chosen in virtual time

    @property
    def clients_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """W entries: the clients of a rank in the order of training, which is the order of the rows it sends."""
        return tuple(tuple(chain.from_iterable(cohorts)) for cohorts in self.cohorts_of_rank)


@dataclass(frozen=True)
class Scheduler:
    """Plans the rounds of a run of N clients."""

    seed: int
    sizes: Sequence[int]  # (N,) training images of each client
    costs: Sequence[float]  # (N,) its expected work in a round, in any unit
    clients_per_round: int | None  # None: all
    weighting: str  # equal weights where it is uniform, else by size: what losses make of them comes later
    cohort: int  # C, clients trained side by side
    world_size: int
    poisson: bool = False  # each client takes part by itself, with the same probability

    def plan(
        self,
        round_index: int,
        measured: Mapping[int, float],
        finished: Collection[tuple[int, ...]] = (),
        choice: Choice | None = None,
        clients: Sequence[int] | None = None,
    ) -> RoundPlan:
        """The plan of round `round_index` (from 0); the same on every rank.

        Clients are drawn uniformly without replacement, or with `poisson` independently of each other, or are those
        that are given. Cohorts are cut from the clients sorted by cost, so that
        clients trained side by side finish together; cohorts go to ranks longest first, each to the rank with the least
        work. How long they take is expected from the seconds `measured` before: times differ from run to run, and only
        the assignment to ranks may, too. Cohorts that an earlier attempt at the round has `finished` are assigned
        to rank 0, which has their rows; they are not trained again. A `choice` in virtual time replaces the draw; the
        clients that it has found late are not trained.
        """
        if clients is None:
            clients = self._drawn(round_index) if choice is None else choice.clients
        clients = sorted(clients)
        amounts = [1.0 if self.weighting == "uniform" else float(self.sizes[c]) for c in clients]
        total = sum(amounts)
        by_cost = sorted(clients, key=lambda c: (-self.costs[c], c))
        cohorts = [tuple(by_cost[i : i + self.cohort]) for i in range(0, len(by_cost), self.cohort)]
        done = tuple(cohort for cohort in cohorts if cohort in finished)
        left = [cohort for cohort in cohorts if cohort not in finished]
        seconds = expected_seconds({client: self.costs[client] for client in clients}, measured)
        first, *others = _longest_first(left, seconds, self.world_size)
        return RoundPlan(
            clients=tuple(clients),
            weights=tuple(amount / total for amount in amounts),
            cohorts_of_rank=(done + first, *others),
            choice=choice,
        )

    @property
    def expected_clients(self) -> int:
        """q·N: how many clients take part in a round, with `poisson` on average."""
        return len(self.sizes) if self.clients_per_round is None else self.clients_per_round

    @property
    def sampling_probability(self) -> float:
        """q, with which a client takes part in a round."""
        return self.expected_clients / len(self.sizes)

    def _drawn(self, round_index: int) -> list[int]:
        """The clients of a round, ascending."""
        if self.poisson:
            generator = seeded(self.seed, "poisson", round_index)
            drawn = torch.rand(len(self.sizes), dtype=torch.float64, generator=generator)
            return (drawn < self.sampling_probability).nonzero().flatten().tolist()
        order, wanted = self.order(round_index)
        return sorted(order[:wanted])

    def order(self, round_index: int) -> tuple[list[int], int]:
        """All clients in the order in which a round asks them, and how many it wants."""
        return asked_clients(self.seed, round_index, len(self.sizes), self.clients_per_round)


def asked_clients(seed: int, round_index: int, total: int, wanted: int | None) -> tuple[list[int], int]:
    """All clients in the order in which a round asks them, uniform without replacement, and how many it wants."""
    if wanted is None or wanted == total:
        return list(range(total)), total
    order: list[int] = torch.randperm(total, generator=seeded(seed, "clients", round_index)).tolist()
    return order, wanted


def rounds_of_clients(seed: int, rounds: int, total: int, wanted: int | None) -> list[int]:
    """In how many of the first `rounds` each client takes part (total,)."""
    counts = [0] * total
    for round_index in range(rounds):
        order, number = asked_clients(seed, round_index, total, wanted)
        for client in order[:number]:
            counts[client] += 1
    return counts


def expected_seconds(costs: Mapping[int, float], measured: Mapping[int, float]) -> dict[int, float]:
    """How long each of some clients will take: as measured, else by its cost at the pace of those measured."""
    known = [client for client in costs if client in measured]
    done = sum(costs[client] for client in known)
    pace = sum(measured[client] for client in known) / done if done else 1.0
    return {client: measured.get(client, pace * cost) for client, cost in costs.items()}


def update_client_seconds(measured: dict[int, float], clients: Sequence[int], seconds: Sequence[float]) -> None:
    """Update what was `measured` by how long `clients` (K,) have just taken: halfway, because times are noisy."""
    for client, now in zip(clients, seconds, strict=True):
        measured[client] = float(f"{(measured.get(client, now) + now) / 2:.4g}")  # short, for the checkpoint


def _longest_first(
    cohorts: Sequence[tuple[int, ...]], seconds: Mapping[int, float], world_size: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Graham's longest-processing-time rule: at most 4/3 of the best possible makespan."""
    assigned: list[list[tuple[int, ...]]] = [[] for _ in range(world_size)]
    ranks = [(0.0, rank) for rank in range(world_size)]
    work = [(sum(seconds[c] for c in cohort), cohort) for cohort in cohorts]
    for cost, cohort in sorted(work, key=lambda item: (-item[0], item[1])):
        load, rank = heapq.heappop(ranks)
        assigned[rank].append(cohort)
        heapq.heappush(ranks, (load + cost, rank))
    return tuple(tuple(cohorts) for cohorts in assigned)


def with_scheduled_learning_rate(config: ClientConfig, round_index: int) -> ClientConfig:
    """The local training of one round (from 0): its learning rate follows client.schedule."""
    fraction = 1.0
    if config.schedule == "exponential":
        assert config.decay is not None
        fraction = config.decay**round_index
    elif config.schedule != "constant":
        assert config.schedule_rounds is not None
        assert config.final_fraction is not None
        done = min(round_index / config.schedule_rounds, 1.0)
        left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        fraction = config.final_fraction + (1 - config.final_fraction) * left
    return replace(config, learning_rate=fraction * config.learning_rate)


def part_learning_rate(config: ClientConfig, part: Part) -> float:
    """The learning rate of a part: LoRA+ trains B faster than A (arXiv 2402.12354)."""
    return config.learning_rate * (config.b_learning_rate_ratio if part == "B" else 1.0)


def effective_step_size(config: ClientConfig, part: Part, steps: int) -> float:
    """How far a constant gradient of 1 moves a parameter in so many SGD steps: Σ_j lr·(1 − m^j)/(1 − m)."""
    momentum = config.momentum or 0.0
    units = sum((1 - momentum**step) / (1 - momentum) for step in range(1, steps + 1))
    return part_learning_rate(config, part) * units

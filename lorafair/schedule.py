"""Who takes part in a round, with which weight, and which rank trains whom.

Everything is a pure function of the seed, the round and the clients, so every rank computes the same plan and nothing
is sent. Only the last field depends on the number of ranks, and nothing numerical depends on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch

from lorafair.seeding import seeded


@dataclass(frozen=True)
class RoundPlan:
    """One communication round of K clients on W ranks."""

    clients: tuple[int, ...]  # ascending; the row order of every (K, ...) tensor
    weights: tuple[float, ...]  # (K,) sum to 1
    cohorts_of_rank: tuple[tuple[tuple[int, ...], ...], ...]  # W entries: the cohorts a rank trains, in order

    @property
    def clients_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """W entries: the clients of a rank in the order of training, which is the order of the rows it sends."""
        return tuple(tuple(chain.from_iterable(cohorts)) for cohorts in self.cohorts_of_rank)


def plan_round(
    round_index: int,
    *,
    seed: int,
    sizes: Sequence[int],
    costs: Sequence[float],
    measured: Mapping[int, float] | None = None,
    clients_per_round: int | None,
    weighting: Literal["size", "uniform"],
    cohort: int,
    world_size: int,
    finished: Collection[tuple[int, ...]] = (),
) -> RoundPlan:
    """Plan round `round_index`, given each client's training images (`sizes`) and expected work (`costs`, any unit).

    Clients are drawn uniformly without replacement. Cohorts are cut from the clients sorted by cost, so that clients
    trained side by side finish together; cohorts go to ranks longest first, each to the rank with the least work. How
    long they take is expected from the seconds `measured` before: times differ from run to run, and only who trains
    where may, too. Cohorts that an earlier attempt at the round has `finished` are rank 0's, which has their rows, and
    no work.
    """
    total = len(sizes)
    if clients_per_round is None or clients_per_round == total:
        clients = list(range(total))
    else:
        drawn = torch.randperm(total, generator=seeded(seed, "clients", round_index))[:clients_per_round]
        clients = sorted(drawn.tolist())
    shares = [float(sizes[c]) if weighting == "size" else 1.0 for c in clients]
    by_cost = sorted(clients, key=lambda c: (-costs[c], c))
    cohorts = [tuple(by_cost[i : i + cohort]) for i in range(0, len(by_cost), cohort)]
    done = tuple(cohort for cohort in cohorts if cohort in finished)
    seconds = expected_seconds({client: costs[client] for client in clients}, measured or {})
    first, *others = _longest_first([cohort for cohort in cohorts if cohort not in finished], seconds, world_size)
    whole = sum(shares)
    return RoundPlan(
        clients=tuple(clients),
        weights=tuple(share / whole for share in shares),
        cohorts_of_rank=(done + first, *others),
    )


def expected_seconds(costs: Mapping[int, float], measured: Mapping[int, float]) -> dict[int, float]:
    """How long each of some clients will take: as measured, else by its cost at the pace of those measured."""
    known = [client for client in costs if client in measured]
    done = sum(costs[client] for client in known)
    pace = sum(measured[client] for client in known) / done if done else 1.0
    return {client: measured.get(client, pace * cost) for client, cost in costs.items()}


def learn_seconds(measured: dict[int, float], clients: Sequence[int], seconds: Sequence[float]) -> None:
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

"""Simulated makespan of a round: clients to ranks as the package assigns them, in turns, and in blocks.

Costs are log-normal, as the sizes of real clients are. The lower bound is the larger of the mean load of a rank and the
longest client; no schedule can be below it. Then clients of equal cost take different times (their own, times noise of
5 % a round), which are expected from their cost in round 1 and learned by round 4. Nothing is trained and nothing is
timed but the planning. Example:

    python benchmarks/scheduling.py --clients 1000 --ranks 8 64
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from lorafair.schedule import Scheduler, update_client_seconds
from lorafair.seeding import seeded_numpy


def scheduler_of(costs: list[float], ranks: int) -> Scheduler:
    """For clients of these costs, which train one by one and all take part."""
    return Scheduler(
        seed=0, sizes=[1] * len(costs), costs=costs, clients_per_round=None, weighting="uniform", cohort=1,
        world_size=ranks,
    )  # fmt: skip


def learned(costs: list[float], ranks: int, generator: np.random.Generator) -> list[float]:
    """Makespan / bound in rounds 1 and 4 where clients take half to twice as long as their cost says."""
    own = np.array(costs) * np.exp2(generator.uniform(-1, 1, len(costs)))
    scheduler, measured, ratios = scheduler_of(costs, ranks), dict[int, float](), []
    for index in range(4):
        taken = own * generator.normal(1, 0.05, len(costs)).clip(0.5)
        plan = scheduler.plan(index, measured)
        makespan = max(sum(taken[client] for client in clients) for clients in plan.clients_of_rank)
        ratios.append(makespan / max(taken.sum() / ranks, taken.max()))
        update_client_seconds(measured, plan.clients, taken.tolist())
    return [ratios[0], ratios[-1]]


def makespans(costs: list[float], ranks: int) -> tuple[dict[str, float], float]:
    """The makespan of each way to assign the clients, and the seconds the package's planning took."""
    started = time.perf_counter()
    plan = scheduler_of(costs, ranks).plan(0, measured={})
    planned = time.perf_counter() - started
    ways = {
        "longest first": plan.clients_of_rank,
        "in turns": [range(rank, len(costs), ranks) for rank in range(ranks)],
        "in blocks": np.array_split(np.arange(len(costs)), ranks),
    }
    loads = {way: max(sum(costs[c] for c in clients) for clients in of_rank) for way, of_rank in ways.items()}
    return loads, planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of a client's cost (1)")
    parser.add_argument("--draws", type=int, default=20, help="sets of clients; the worst counts (20)")
    options = parser.parse_args()
    print(f"{options.clients} clients, log-normal with σ = {options.sigma:g}, worst of {options.draws} draws")
    print("ranks | longest first / bound | in turns | in blocks | unlike cost: round 1 | round 4 | planning")
    for ranks in options.ranks:
        rows, planning = [], []
        for draw in range(options.draws):
            generator = seeded_numpy(0, "scheduling", draw)
            costs = generator.lognormal(sigma=options.sigma, size=options.clients).tolist()
            bound = max(sum(costs) / ranks, max(costs))
            loads, seconds = makespans(costs, ranks)
            rows.append([*(load / bound for load in loads.values()), *learned(costs, ranks, generator)])
            planning.append(seconds)
        worst = " | ".join(f"{ratio:.4f}" for ratio in np.max(rows, axis=0))
        print(f"{ranks} | {worst} | {1000 * float(np.median(planning)):.1f} ms")


if __name__ == "__main__":
    main()

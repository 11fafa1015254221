"""Time and bytes of what a round sends between processes, at adapter size, on several gloo ranks of one machine.

all-gather: all clients' rows to every rank, for what clients keep and SCAFFOLD. rank0 and sharded: the rows as
fabric.server sends them, to rank 0 or each layer to the rank that aggregates it. broadcast: the new adapter to all
ranks. Bytes are what the busiest rank receives from others; memory is the rank's with the largest peak beyond its own
clients' rows. Example:

    python benchmarks/exchange.py --clients 100 --ranks 2 4
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import queue
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorafair.aggregation.base import ServerUpdate
from lorafair.communication.collectives import broadcast_update, exchange_columns, gather_clients
from lorafair.config import FabricConfig
from lorafair.launch import make_fabric
from lorafair.model.adapter import PARTS, AdapterLayout

WIDTH, BLOCKS, RANK, CLASSES = 768, 12, 16, 100  # ViT-B, attn.proj and mlp.fc2 of every block
SHAPES = {f"blocks.{b}.{name}": inputs for b in range(BLOCKS) for name, inputs in (("attn", WIDTH), ("fc2", 4 * WIDTH))}
LAYOUT = AdapterLayout.of(
    {path: ((RANK, inputs), (WIDTH, RANK)) for path, inputs in SHAPES.items()}, {"head.weight": (CLASSES, WIDTH)}
)
BUFFERS = 1.4  # what a rank needs at most, in rows of all clients


def measure(rank: int, ranks: int, port: int, clients: int, repeats: int, results: Any) -> None:
    """Run every collective on this rank and put (way, milliseconds, bytes received, bytes of memory) of each."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    fabric = make_fabric(FabricConfig(accelerator="cpu", devices=ranks))
    fabric.launch()
    torch.set_num_threads(1)
    clients_of_rank = [list(range(r, clients, ranks)) for r in range(ranks)]
    rows = torch.full((len(clients_of_rank[rank]), LAYOUT.length), float(rank))
    state = LAYOUT.unpack(rows.new_zeros(LAYOUT.length))
    update = ServerUpdate(state.factors, {}, state.head, {}) if rank == 0 else None
    everything, nothing = LAYOUT.columns_of(LAYOUT, PARTS), list[slice]()
    shards = [LAYOUT.columns_of(shard, PARTS) for shard in LAYOUT.split(ranks)]
    others = clients - len(rows)

    def length(columns: list[slice]) -> int:
        return sum(span.stop - span.start for span in columns)

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "all-gather": (
            lambda: gather_clients(fabric, rows, clients_of_rank),
            2 * (ranks - 1) * clients * LAYOUT.length // ranks,  # a ring adds up, then hands round
        ),
        "rank0": (
            lambda: exchange_columns(fabric, rows, clients_of_rank, [everything, *[nothing] * (ranks - 1)]),
            others * LAYOUT.length * (rank == 0),
        ),
        "sharded": (lambda: exchange_columns(fabric, rows, clients_of_rank, shards), others * length(shards[rank])),
        "broadcast": (
            lambda: broadcast_update(fabric, update, LAYOUT, parts=PARTS, folds=False),
            LAYOUT.length * (rank != 0),
        ),
    }
    for name, (collective, numbers) in ways.items():
        results.put((name, *timed(collective, repeats), 4 * numbers))
    dist.barrier()
    dist.destroy_process_group()


def timed(collective: Callable[[], Any], repeats: int) -> tuple[float, int]:
    """Median milliseconds until all ranks are done, and the peak of this rank's memory beyond what it held before."""
    taken, peak = [], 0
    for _ in range(repeats + 1):  # the first one warms up
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the largest size so far counts anew
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would not count
        held = status("VmRSS")
        dist.barrier()
        began = time.perf_counter()
        result: Tensor | Any = collective()
        dist.barrier()
        taken.append(1e3 * (time.perf_counter() - began))
        peak = max(peak, status("VmHWM") - held)
        del result
    return statistics.median(taken[1:]), peak


def status(name: str) -> int:
    """A size of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def available() -> int:
    """Bytes of memory that this machine has free."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def run(ranks: int, clients: int, repeats: int) -> dict[str, tuple[float, int, int]]:
    """(milliseconds, bytes of memory, bytes received) of every way, each the largest of the ranks."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    processes = [
        context.Process(target=measure, args=(rank, ranks, port, clients, repeats, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found: list[tuple[str, float, int, int]] = []
        while len(found) < 4 * ranks:
            try:
                found.append(results.get(timeout=1))
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    raise SystemExit(f"a process ended early: {clients} clients on {ranks} ranks") from None
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    largest: dict[str, tuple[float, int, int]] = {}
    for name, *values in found:
        ms, memory, received = map(max, zip(values, largest.get(name, values), strict=True))
        largest[name] = (ms, int(memory), int(received))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[6, 18, 100], metavar="K", help="(6 18 100)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8], metavar="W", help="(2 4 8)")
    parser.add_argument("--repeats", type=int, default=3, help="timed after a warm-up; the median counts (3)")
    options = parser.parse_args()
    print(f"adapter of ViT-B, rank {RANK}, with head: {LAYOUT.length:,} numbers, {4 * LAYOUT.length / 1e6:.1f} MB")
    print("K | ranks | collective | MB received by the busiest rank | ms | MB of memory beyond the rank's rows")
    for clients in options.clients:
        for ranks in options.ranks:
            needed, free = BUFFERS * 4 * clients * LAYOUT.length * ranks, available()
            if needed > free:
                print(f"{clients} | {ranks} | needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")
                continue
            for name, (ms, memory, received) in run(ranks, clients, options.repeats).items():
                numbers = f"{received / 1e6:.1f} | {ms:.0f} | {memory / 1e6:.0f}"
                print(f"{clients} | {ranks} | {name} | {numbers}", flush=True)


if __name__ == "__main__":
    main()

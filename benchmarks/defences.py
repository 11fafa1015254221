"""Seconds of the server with each defence beside FedIT without one, measured in turns in one process.

Clients are made up as in server_step.py: the layers that the paper adapts in ViT-B, LoRA rank 16. The server's time is
what a round of FedIT takes there: the means and the bias of every layer. A defence comes on top.

    python benchmarks/defences.py --clients 20 100
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from server_step import make_clients
from torch import Tensor

from lorafair.aggregation.base import aggregate
from lorafair.aggregation.bias import bias_metrics
from lorafair.aggregation.defences.base import ByEntry, Selection, Shortening, make_defence
from lorafair.aggregation.registry import build_aggregator
from lorafair.aggregation.update_geometry import products_by_layer, shortened_norm
from lorafair.config import DefenceConfig
from lorafair.model.adapter import AdapterState, LoRAFactors, row
from lorafair.registry import DEFENCES

BLOCKS = 12


def worked(action: Callable[..., object], *arguments: object) -> float:
    """Seconds of the core."""
    began = time.process_time()
    action(*arguments)
    return time.process_time() - began


def fedit(clients: AdapterState, weights: Tensor) -> None:
    """A round's server step: the means of the factors, and what is left of the update."""
    bias_metrics(clients, weights, aggregate(build_aggregator({"name": "fedit"}), clients, weights))


def defend(name: str, clients: AdapterState, start: AdapterState, weights: Tensor) -> None:
    """What a defence does for one block of layers; choosing from the sums takes no time worth measuring."""
    defence = make_defence(DefenceConfig(name=name, share=0.2))
    if isinstance(defence, ByEntry):
        for factors in clients.factors.values():
            defence.rows(factors.A.flatten(1))
            defence.rows(factors.B.flatten(1))
    elif isinstance(defence, Shortening):
        defence.fractions(torch.stack([part for _, part in shortened_norm(clients, start, 1.0)]).sum(0))
    elif isinstance(defence, Selection):
        products = torch.stack([part for _, part in products_by_layer(clients, start, 1.0)]).sum(0)
        defence.weights(products, weights.double())


def main() -> None:
    """Print a line a defence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(f"ViT-B, rank 16, {torch.get_num_threads()} threads; core-seconds, medians of {given.repeats}")
    print("| clients | defence | FedIT's server | the defence | both / FedIT's |\n|---|---|---|---|---|")
    for count in given.clients:
        clients, weights = make_clients("vit_base", count, 0.05, blocks=1)
        first = row(clients, 0)
        start = AdapterState({p: LoRAFactors(f.A * 0.9, f.B * 0.5) for p, f in first.factors.items()}, {})
        alone: list[float] = []
        taken: dict[str, list[float]] = {name: [] for name in DEFENCES.names}
        for _ in range(given.repeats):
            alone.append(worked(fedit, clients, weights))
            for name, times in taken.items():
                times.append(worked(defend, name, clients, start, weights))
        base = BLOCKS * statistics.median(alone)
        for name, times in taken.items():
            more = BLOCKS * statistics.median(times)
            print(f"| {count} | {name} | {base:.2f} | {more:.2f} | {(base + more) / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()

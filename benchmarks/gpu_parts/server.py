"""Part d: the server step of every method for K = 6, 18, 100 clients, on the device and on the CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from server_step import METHODS, METRICS, WIDTHS, make_clients
from torch import Tensor

from lorafair.aggregation.base import ServerUpdate, aggregate
from lorafair.aggregation.bias import bias_metrics
from lorafair.aggregation.registry import build_aggregator
from lorafair.model.adapter import AdapterState, LoRAFactors, row

from .record import Part
from .timing import seconds_of

GOAL_SECONDS = 0.1
TOLERANCE = 1e-4
LONGEST_ALL = 2.0  # seconds that all layers may take; a method that is slower is timed on one block
FIRST = ("lora_fair", "fedit", METRICS, "flex_lora", "fedex_lora")  # what to know if the time ends early
SLOW = "fedrpca"


def moved(state: AdapterState, device: torch.device) -> AdapterState:
    factors = {path: LoRAFactors(A=f.A.to(device), B=f.B.to(device)) for path, f in state.factors.items()}
    return AdapterState(factors=factors, head={name: t.to(device) for name, t in state.head.items()})


def block_of(state: AdapterState) -> AdapterState:
    """The two layers of the first block."""
    return AdapterState({path: state.factors[path] for path in list(state.factors)[:2]}, head={})


def stepper(method: str, clients: AdapterState, weights: Tensor) -> Callable[[], Any]:
    """One server step, or the metrics of what it leaves, which are part of every round."""
    start = row(clients, 0)
    aggregator = build_aggregator({"name": "fedit" if method == METRICS else method})
    if method == METRICS:
        mean = aggregate(aggregator, clients, weights, start)
        return lambda: bias_metrics(clients, weights, mean)
    return lambda: aggregate(aggregator, clients, weights, start)


def products(update: ServerUpdate) -> Tensor:
    """All layers' B·A, what is folded among it: factors themselves may differ by signs and rotations."""
    found = []
    for path, factors in update.factors.items():
        product = factors.B.double() @ factors.A.double()
        if path in update.folded:
            product = product + update.folded[path].B.double() @ update.folded[path].A.double()
        found.append(product.flatten().cpu())
    return torch.cat(found)


def difference(method: str, clients: AdapterState, weights: Tensor, device: torch.device) -> float:
    """Of the device's step from the CPU's, relative."""
    here, there = (stepper(method, moved(clients, d), weights.to(d))() for d in (torch.device("cpu"), device))
    expected = products(here)
    return float((products(there) - expected).norm() / expected.norm())


def run(part: Part) -> None:
    table = part.table(
        "Server step, all layers of ViT-B (LoRA rank 16, attn.proj and mlp.fc2), float32 rows, float64 inside",
        "K", "method", "s on the device", "s on the CPU, from one block", "times as fast", "difference",
    )  # fmt: skip
    model, repeats = "vit_base", 2 if part.tiny else 5
    blocks = 1 if part.tiny else WIDTHS[model][1]

    @cache
    def of_count(count: int) -> tuple[AdapterState, AdapterState, Tensor]:
        clients, weights = make_clients(model, count, size_b=0.01, blocks=blocks)
        return clients, moved(clients, part.device), weights.double()

    for count, methods in turns(part.tiny):
        clients, there, weights = of_count(count)
        for method in methods:
            part.attempt(f"{method}, K = {count}", lambda method=method, clients=clients, there=there, weights=weights:
                         line(part, table, method, clients, there, weights, repeats))  # fmt: skip


def turns(tiny: bool) -> list[tuple[int, list[str]]]:
    """K and its methods: the first of all for the most clients, then the others, the slow one last; each once."""
    if tiny:
        return [(2, ["lora_fair", METRICS])]
    most, fewer = 100, (6, 18)
    others = [name for name in METHODS if name not in (*FIRST, SLOW)]
    rest = [*((count, [*FIRST, *others]) for count in fewer), (most, others)]
    return [(most, list(FIRST)), *rest, *((count, [SLOW]) for count in (*fewer, most))]


def line(
    part: Part, table: Any, method: str, clients: AdapterState, there: AdapterState, weights: Tensor, repeats: int
) -> None:
    """One method for one K: on the device all layers, unless one block takes too long; on the CPU one block."""
    blocks, count, on_device = len(clients.factors) // 2, len(weights), weights.to(part.device)
    block = stepper(method, block_of(there), on_device)
    block()  # warms up
    seconds = blocks * seconds_of(part.device, block)
    is_slow = seconds > LONGEST_ALL
    taken: Any = f"{seconds:.1f}, from one block"
    if not is_slow:
        layers = stepper(method, there, on_device)
        layers()
        taken = [seconds_of(part.device, layers) for _ in range(repeats)]
        seconds = statistics.median(taken)
    cpu: float | None = None
    if seconds < 10 * LONGEST_ALL:  # one that takes so long is far worse on the CPU
        cpu = blocks * seconds_of(torch.device("cpu"), stepper(method, block_of(clients), weights))
    gap = None
    if method != METRICS and not is_slow:
        gap = difference(method, block_of(clients), weights, part.device)
        if gap > TOLERANCE:
            part.check(f"{method}, K = {count}", False, f"differs from the CPU's by {gap:.1e} ({TOLERANCE:g})")
    table.row(count, method, taken, cpu, None if cpu is None else cpu / seconds, gap)
    if method == "lora_fair" and (part.tiny or count == 100):
        part.goal(f"server step of LoRA-FAIR, ViT-B, K = {count}, seconds", seconds, GOAL_SECONDS, at_least=False)

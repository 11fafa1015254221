"""Time and memory of every method's server step, from 6 to 10,000 clients, and what LoRA-FAIR's exact solver saves.

Clients are made up: factors around a common start, B small, as after a round of local training. Layers are those the
paper adapts (attn.proj and mlp.fc2 of every block), rank 16. Every case is a process of its own, which works on one
block of the model at a time, again and again with the same clients; memory is what it needs beyond their rows. With
--solvers instead: LoRA-FAIR's exact solver against the paper's 1000 steps of dense gradient descent. Examples:

    python benchmarks/server_step.py --clients 100 1000 --methods fedit lora_fair
    python benchmarks/server_step.py --solvers --models vit_base --clients 6 18
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafair import registry
from lorafair.aggregation.base import aggregate
from lorafair.aggregation.bias import bias_metrics
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.registry import build_aggregator
from lorafair.model.adapter import AdapterState, LoRAFactors, row
from lorafair.seeding import seeded

WIDTHS = {"vit_base": (768, 12), "vit_large": (1024, 24)}  # embedding width, blocks
RANK = 16
SGD_STEPS, LEARNING_RATE, REGULARIZATION = 1000, 0.01, 0.01  # the paper's
SPREAD_A, SPREAD_B = 0.3, 0.7  # clients' deviations from what they share, relative to it


def make_clients(model: str, clients: int, size_b: float, blocks: int | None = None) -> tuple[AdapterState, Tensor]:
    """K clients of a model in float32, and equal weights: one common A0 as LoRA draws it, small changes on top."""
    width, depth = WIDTHS[model]
    generator = seeded(0, "server_step", model, clients)
    factors = {}
    for block in range(blocks or depth):
        for name, inputs in (("attn.proj", width), ("mlp.fc2", 4 * width)):
            bound = inputs**-0.5
            shared_a = (2 * torch.rand(RANK, inputs, generator=generator) - 1) * bound
            A = torch.randn(clients, RANK, inputs, generator=generator).mul_(SPREAD_A * bound / 3**0.5).add_(shared_a)
            shared_b = torch.randn(width, RANK, generator=generator)
            B = torch.randn(clients, width, RANK, generator=generator).mul_(SPREAD_B).add_(shared_b).mul_(size_b)
            factors[f"blocks.{block}.{name}"] = LoRAFactors(A=A, B=B)
    return AdapterState(factors=factors, head={}), torch.full((clients,), 1 / clients)


def dense_sgd_seconds(clients: AdapterState, weights: Tensor, steps: int) -> float:
    """Seconds a step of the paper's procedure, all layers jointly: autograd on (O, I) matrices in float32."""
    layers = []
    for stacked in clients.factors.values():
        mean_a = torch.einsum("k,kri->ri", weights, stacked.A)
        mean_b = torch.einsum("k,kor->or", weights, stacked.B)
        # One client at a time: K dense products at once would not fit.
        ideal = torch.zeros(mean_b.shape[0], mean_a.shape[1])
        for weight, A, B in zip(weights, stacked.A, stacked.B, strict=True):
            ideal.addmm_(weight * B, A)
        layers.append((ideal, mean_a, mean_b, torch.zeros_like(mean_b, requires_grad=True)))
    optimizer = torch.optim.SGD([change for *_, change in layers], lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        losses = []
        for ideal, mean_a, mean_b, change in layers:
            product = (mean_b + change) @ mean_a
            cosine = torch.nn.functional.cosine_similarity(ideal.flatten(), product.flatten(), dim=0)
            losses.append(1 - cosine + REGULARIZATION * change.square().sum())
        torch.stack(losses).sum().backward()
        optimizer.step()

    def run(count: int) -> None:
        for _ in range(count):
            step()

    run(1)  # warm-up
    return seconds(lambda: run(steps)) / steps


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def mean_objective(method: LoRAFair, clients: AdapterState, weights: Tensor, factors: dict[str, LoRAFactors]) -> float:
    return statistics.mean(
        float(method.objective(stacked, weights)(factors[path].to(torch.float64)))
        for path, stacked in clients.factors.items()
    )


def measure(model: str, count: int, options: argparse.Namespace) -> list[str]:
    """One line of the table."""
    clients, weights = make_clients(model, count, options.size_b)
    exact = LoRAFair(regularization=REGULARIZATION)
    descent = dataclasses.replace(exact, solver="sgd", sgd_steps=SGD_STEPS, sgd_learning_rate=LEARNING_RATE)

    update = aggregate(exact, clients, weights)
    exact_seconds = statistics.median(
        seconds(lambda: aggregate(exact, clients, weights)) for _ in range(options.repeats)
    )
    steps = SGD_STEPS if options.full_sgd else options.sgd_steps
    step_seconds = dense_sgd_seconds(clients, weights, steps)
    dense_seconds = step_seconds * SGD_STEPS

    # A few layers show what the solutions are like.
    some = AdapterState({path: clients.factors[path] for path in list(clients.factors)[:4]}, head={})
    descended = aggregate(descent, some, weights)
    metrics = {name: float(values.mean()) for name, values in bias_metrics(some, weights, update).items()}
    objective = mean_objective(exact, some, weights, update.factors)
    inflated = bias_metrics(some, weights, descended)
    return [
        model,
        str(count),
        f"{exact_seconds * 1e3:.0f} ms",
        f"{step_seconds * 1e3:.0f} ms",
        f"{dense_seconds:.0f} s{'' if options.full_sgd else '*'}",
        f"{exact_seconds / dense_seconds:.4%}",
        f"{objective:.6f}",
        f"{mean_objective(exact, some, weights, descended.factors) - objective:+.1e}",
        f"{metrics['error_before']:.4f}",
        f"{metrics['error_after']:.4f}",
        f"{float(inflated['error_after'].mean()):.4f}",
        f"{metrics['norm_ratio']:.4f}",
        f"{float(inflated['norm_ratio'].mean()):.4f}",
    ]


HEADINGS = [
    "model", "K", "exact", "SGD step", "1000 steps", "ratio", "objective", "SGD's − exact",
    "error before", "after", "after SGD", "‖B'‖/‖B̄‖", "of SGD",
]  # fmt: skip


METRICS = "bias_metrics"  # no method, but part of every round
WITHOUT_A_STEP = ("centralized", "local_only")
METHODS = [*(name for name in registry.METHODS.names if name not in WITHOUT_A_STEP), METRICS]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one method's server step on a block of the model."""

    seconds: float  # mean of the blocks done
    blocks: int
    peak: int  # bytes beyond the clients' rows


def cost_of(
    method: str, clients: AdapterState, weights: Tensor, blocks: int, options: argparse.Namespace
) -> Cost | str:
    """The cost in a process of its own, or why there is none."""
    context = multiprocessing.get_context("fork")  # the clients are shared
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_step, args=(sender, method, clients, weights, blocks, options))
    process.start()
    sender.close()
    found: Cost | str = f"over {options.limit:g} s a block"
    if receiver.poll(options.limit):
        try:
            found = receiver.recv()
        except EOFError:
            found = "ended without a result"
    process.kill()
    process.join()
    return found


def _step(
    sender: Any, method: str, clients: AdapterState, weights: Tensor, blocks: int, options: argparse.Namespace
) -> None:
    torch.set_num_threads(options.threads)
    start = row(clients, 0)
    aggregator = build_aggregator({"name": "fedit" if method == METRICS else method})
    update = aggregate(aggregator, clients, weights, start) if method == METRICS else None
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would not count
    held, libraries = _status("VmRSS"), _status("RssFile")
    limit = _status("VmSize") + int(options.memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the largest size so far counts anew
    taken: list[float] = []
    try:
        while len(taken) < blocks and sum(taken) < options.seconds:
            taken.append(
                seconds(lambda: bias_metrics(clients, weights, update))
                if update is not None
                else seconds(lambda: aggregate(aggregator, clients, weights, start))
            )
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        sender.send(f"needs over {options.memory:g} GB")
        return
    peak = _status("VmHWM") - held - max(0, _status("RssFile") - libraries)  # what is read of libraries meanwhile
    sender.send(Cost(statistics.mean(taken), len(taken), peak))


def _status(name: str) -> int:
    """A size of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def print_costs(options: argparse.Namespace) -> None:
    print(f"{options.threads} CPU threads, rank {RANK}, float32 factors, entries of B about {options.size_b}")
    print("model | K | rows of all layers | method | all layers | beyond the rows of a block")
    for model in options.models:
        blocks = WIDTHS[model][1]
        for count in options.clients:
            clients, weights = make_clients(model, count, options.size_b, blocks=1)
            size = 4 * blocks * sum(f.A.numel() + f.B.numel() for f in clients.factors.values())
            for method in options.methods:
                cost = cost_of(method, clients, weights, blocks, options)
                found = f"{cost} |"
                if isinstance(cost, Cost):
                    star = "" if cost.blocks == blocks else f"* ({cost.blocks} of {blocks} blocks)"
                    found = f"{cost.seconds * blocks:.2f} s{star} | {cost.peak / 1e6:.0f} MB"
                print(f"{model} | {count} | {size / 1e9:.2f} GB | {method} | {found}", flush=True)
    print("Block by block. LoRA-FAIR's solver is faster on all layers at once, as a run does it.")
    print("* extrapolated from so many blocks")


def print_solvers(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    print(
        f"{options.threads} CPU threads, rank {RANK}, float32 factors, entries of B about {options.size_b}, "
        f"λ = {REGULARIZATION}, lr {LEARNING_RATE}"
    )
    print(" | ".join(HEADINGS))
    for model in options.models:
        for count in options.clients:
            print(" | ".join(measure(model, count, options)), flush=True)
    if not options.full_sgd:
        print(f"* extrapolated from {options.sgd_steps} measured steps")
    print(
        "Objectives, errors and norm ratios: means over the first 4 layers; SGD by the same iterates in factor space."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), help="(vit_base; with --solvers all)")
    parser.add_argument(
        "--clients", nargs="+", type=int, metavar="K", help="(6 18 100 1000 10000; with --solvers 6 18 100)"
    )
    parser.add_argument("--size-b", type=float, default=0.01, help="order of the entries of B (0.01)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="(all)")
    parser.add_argument("--seconds", type=float, default=30, help="begin no further block after so many (30)")
    parser.add_argument("--limit", type=float, default=150, help="give a method up after so many seconds (150)")
    parser.add_argument("--memory", type=float, default=8, help="gigabytes a method may use beyond the rows (8)")
    parser.add_argument("--solvers", action="store_true", help="compare LoRA-FAIR's solvers")
    parser.add_argument(
        "--repeats", type=int, default=5, help="exact steps timed with --solvers; the median counts (5)"
    )
    parser.add_argument("--sgd-steps", type=int, default=3, help="dense steps timed with --solvers (3)")
    parser.add_argument("--full-sgd", action="store_true", help="time all 1000 dense steps with --solvers")
    options = parser.parse_args()
    options.models = options.models or (list(WIDTHS) if options.solvers else ["vit_base"])
    options.clients = options.clients or ([6, 18, 100] if options.solvers else [6, 18, 100, 1000, 10_000])
    if options.solvers:
        print_solvers(options)
    else:
        print_costs(options)


if __name__ == "__main__":
    main()

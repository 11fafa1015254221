"""Time of LoRA-FAIR's server step: the exact solver against the paper's 1000 steps of dense gradient descent.

Clients are made up: factors around a common start, B small, as after a round of local training. Layers are those the
paper adapts (attn.proj and mlp.fc2 of every block), rank 16. Example:

    python benchmarks/server_step.py --models vit_base --clients 6 18 --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lorafair.adapter import AdapterState, LoRAFactors
from lorafair.aggregation import aggregate, bias_metrics
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.seeding import seeded

WIDTHS = {"vit_base": (768, 12), "vit_large": (1024, 24)}  # embedding width, blocks
RANK = 16
SGD_STEPS, LEARNING_RATE, REGULARIZATION = 1000, 0.01, 0.01  # the paper's
SPREAD_A, SPREAD_B = 0.3, 0.7  # clients' deviations from what they share, relative to it


def make_clients(model: str, clients: int, size_b: float) -> tuple[AdapterState, Tensor]:
    """K clients of a model in float32, and equal weights: one common A0 as LoRA draws it, small changes on top."""
    width, blocks = WIDTHS[model]
    generator = seeded(0, "server_step", model, clients)
    factors = {}
    for block in range(blocks):
        for name, inputs in (("attn.proj", width), ("mlp.fc2", 4 * width)):
            bound = inputs**-0.5
            shared_a = (2 * torch.rand(RANK, inputs, generator=generator) - 1) * bound
            own_a = torch.randn(clients, RANK, inputs, generator=generator) * (SPREAD_A * bound / 3**0.5)
            shared_b = torch.randn(width, RANK, generator=generator)
            own_b = torch.randn(clients, width, RANK, generator=generator) * SPREAD_B
            factors[f"blocks.{block}.{name}"] = LoRAFactors(A=shared_a + own_a, B=size_b * (shared_b + own_b))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--clients", nargs="+", type=int, default=[6, 18, 100], metavar="K")
    parser.add_argument("--size-b", type=float, default=0.01, help="order of the entries of B (0.01)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--repeats", type=int, default=5, help="exact steps timed; the median counts (5)")
    parser.add_argument("--sgd-steps", type=int, default=3, help="dense steps timed after a warm-up (3)")
    parser.add_argument("--full-sgd", action="store_true", help="time all 1000 dense steps")
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()

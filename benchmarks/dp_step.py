"""A training step with DP-SGD against the same step without it, side by side: time and memory.

Both train one client with the same images; the private step clips the gradient of each image and adds noise. The ratio
is the median over pairs of steps. Memory is the largest of a process of its own. Example:

    python benchmarks/dp_step.py --model test_vit deit_tiny_patch16_224 --batch-size 32
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lorafair.client.cohort import GradientRule, LocalTraining, make_optimizer
from lorafair.client.private_step import ExamplePrivacy, PrivateGradient
from lorafair.config.schema import ClientConfig, LoRAConfig, ModelConfig
from lorafair.data.loading import CohortStep
from lorafair.model.adapter import PARTS
from lorafair.model.backbone import build_model
from lorafair.seeding import seeded

LOCAL = ClientConfig(optimizer="sgd", learning_rate=0.01, momentum=0.9, batch_size=32, clip_norm=10.0)


def steps_of(name: str, options: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], int]:
    """A step without and one with privacy on the same images, and the numbers that a client trains."""
    lora = LoRAConfig(rank=options.rank, alpha=float(options.rank))
    config = ModelConfig(name=name, weights="random", image_size=options.size, lora=lora)
    model = build_model(config, options.classes, 0).attach(options.device, options.clients)
    device, clients, count = model.mean.device, options.clients, options.clients * options.batch_size
    model.adapters.resize(clients)
    model.adapters.write(model.adapters.draw(0, 0).to(device))
    shape = (count, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(0, "images")).to(device)
    labels = torch.randint(0, options.classes, (count,), generator=seeded(0, "labels")).to(device)
    step = CohortStep(np.arange(count).reshape(clients, -1), (options.batch_size,) * clients)
    training = LocalTraining(model, labels, LOCAL)
    optimizer = make_optimizer(model.adapters.train_only(PARTS), LOCAL)
    generators = [seeded(0, "noise", client, device=device) for client in range(clients)]
    privacy = ExamplePrivacy(1.0, 1.0, [float(options.batch_size)] * clients, generators)
    private = PrivateGradient(model, privacy, PARTS)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def plain_step() -> None:
        training.step(optimizer, GradientRule(LOCAL.clip_norm), images, step)
        wait()

    def private_step() -> None:
        training.step(optimizer, GradientRule(LOCAL.clip_norm), images, step, private)
        wait()

    def after_private() -> None:
        model.adapters.show()

    return {"plain": plain_step, "private": private_step, "restore": after_private}, model.adapters.layout.length


def seconds(action: Callable[[], Any]) -> tuple[float, float]:
    """By the clock, and of the processor: the latter means something on a busy machine, too."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def memory(name: str, kind: str, options: argparse.Namespace, sent: Any) -> None:
    """The most that a process takes for three steps of a kind, in MB."""
    torch.set_num_threads(options.threads)
    steps, _ = steps_of(name, options)
    for _ in range(3):
        steps[kind]()
    if options.device == "cuda":
        sent.put(torch.cuda.max_memory_allocated() / 1e6)
    else:
        sent.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def peak(name: str, kind: str, options: argparse.Namespace) -> float:
    context = multiprocessing.get_context("spawn")
    received = context.Queue()
    process = context.Process(target=memory, args=(name, kind, options, received))
    process.start()
    found = float(received.get(timeout=600))
    process.join()
    return found


def measure(name: str, options: argparse.Namespace) -> str:
    """A line of the table."""
    steps, length = steps_of(name, options)
    pairs = []
    for turn in range(options.repeats + 2):
        plain = seconds(steps["plain"])
        private = seconds(steps["private"])
        steps["restore"]()
        if turn >= 2:  # warm
            pairs.append((plain, private))
    walls = [statistics.median(pair[kind][0] for pair in pairs) for kind in (0, 1)]
    ratios = [statistics.median(private[i] / plain[i] for plain, private in pairs) for i in (0, 1)]
    held = options.clients * options.batch_size * length * 4 / 1e6
    megabytes = [peak(name, kind, options) for kind in ("plain", "private")] if options.memory else []
    cells = [name, f"{length:,}", *(f"{1000 * wall:.1f}" for wall in walls), *(f"{r:.2f}" for r in ratios)]
    return " | ".join([*cells, f"{held:,.1f}", *(f"{m:,.0f}" for m in megabytes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["test_vit"], help="timm models (test_vit)")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels (96)")
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank (8)")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--clients", type=int, default=1, help="side by side (1)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of steps timed; medians count (9)")
    parser.add_argument("--memory", action="store_true", help="also the most memory of a process of each kind")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.size} px, LoRA rank {options.rank}, {options.clients} client(s) of {options.batch_size} images, "
        f"{options.device}, {options.threads} thread(s), torch {torch.__version__}"
    )
    print(
        "model | numbers trained | ms a step | ms with privacy | ratio of time | of processor time | MB of images' "
        "gradients" + (" | peak MB | with privacy" if options.memory else "")
    )
    for name in options.model:
        print(measure(name, options), flush=True)


if __name__ == "__main__":
    main()

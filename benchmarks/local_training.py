"""Local training of one round against a bare PyTorch loop on the same work, side by side; the final weights must agree.

The bare loop knows nothing of federations: a timm model whose adapted layers are y = W0 x + s·B(Ax), one optimiser a
client, the same batches in the same order. What the package takes beyond it is its overhead. Example:

    python benchmarks/local_training.py --clients 6 60 --images 64 --cohort 1
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from bare_loop import open_experiment, read_row, replace_adapters, take_step, trained_parameters, write_row
from torch import Tensor

from lorafair.config import Config, FabricConfig, load_config
from lorafair.data.loading import local_batches
from lorafair.experiment import Experiment
from lorafair.launch import in_place
from lorafair.model.backbone import build_model
from lorafair.seeding import seeded


class BareLoop:
    """One round of local training without the package's round, client or loader."""

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        adapted = build_model(config.model, len(experiment.data.classes), config.seed)
        self.mean, self.std, self.backbone = adapted.mean, adapted.std, adapted.backbone
        replace_adapters(self.backbone)
        self.trained = trained_parameters(self.backbone, experiment.layout)
        self.experiment = experiment
        size = config.model.image_size
        assert size is not None
        images = experiment.data.train.images
        pixels = torch.stack([torch.from_numpy(images.read(i, size)) for i in range(len(images))])
        self.images = pixels.permute(0, 3, 1, 2).contiguous()

    def round(self, start: Tensor) -> Tensor:
        """The packed adapters (N, P) after training every client from `start` (P,)."""
        config, labels, rows = self.experiment.local, self.experiment.labels, []
        for number, client in enumerate(self.experiment.clients):
            write_row(self.trained, start)
            optimizer = torch.optim.AdamW(
                self.trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
            generator = seeded(self.experiment.config.seed, 0, number)
            for batch in local_batches(client.indices, config, generator):
                inputs = (self.images[batch].float() - self.mean) / self.std
                take_step(self.backbone, optimizer, self.trained, inputs, labels[batch], config.clip_norm)
            rows.append(read_row(self.trained))
        return torch.stack(rows)


def configuration(clients: int, options: argparse.Namespace, run_dir: str) -> Config:
    """A federation of equal clients on made-up images."""
    return load_config([
        "data.source=synthetic", f"data.train_images={-(-clients * options.images // 3)}", "data.test_images=6",
        "partition.scheme=iid", f"partition.clients={clients}", f"model.name={options.model}", "model.weights=random",
        f"model.image_size={options.size}", "model.prefix_cache=never", "model.lora.rank=4", "method.name=fedit",
        "client.optimizer=adamw", "client.learning_rate=0.001", f"client.batch_size={options.batch_size}",
        f"client.cohort={options.cohort}", "fabric.accelerator=cpu", f"run_dir={run_dir}", "checkpoint.every=1000",
    ])  # fmt: skip


def seconds(action: Callable[[], Any]) -> tuple[float, float]:
    """By the clock, and of the processor: the latter means something on a busy machine, too."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(fabric: Any, clients: int, options: argparse.Namespace) -> list[str]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        experiment, state, train = open_experiment(fabric, configuration(clients, options, folder))
        bare = BareLoop(experiment)
        order = list(experiment.scheduler.plan(0, measured={}).clients_of_rank[0])
        ours = train()[:, :-2]  # and a warm-up
        gap = (ours - bare.round(state.adapter)[order]).abs().max() / ours.abs().max()
        pairs = [(seconds(train), seconds(lambda: bare.round(state.adapter))) for _ in range(options.repeats)]
    mine, theirs = (statistics.median(wall for wall, _ in column) for column in zip(*pairs, strict=True))
    ratios = [statistics.median(ours[i] / bare[i] for ours, bare in pairs) for i in (0, 1)]
    extra = statistics.median(1000 * (ours[1] - bare[1]) / clients for ours, bare in pairs)
    images = clients * options.images
    return [
        str(clients), f"{images / mine:,.0f}", f"{images / theirs:,.0f}", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}",
        f"{extra:+.2f}", f"{gap:.1e}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_vit", help="a timm model (test_vit)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (32)")
    parser.add_argument("--clients", nargs="+", type=int, default=[6, 60], metavar="N")
    parser.add_argument("--images", type=int, default=64, help="of a client (64)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--cohort", type=int, default=1, help="clients side by side (1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="pairs of rounds timed; medians count (7)")
    options = parser.parse_args()
    with in_place(FabricConfig(accelerator="cpu", threads=options.threads)) as fabric:
        lines = [measure(fabric, clients, options) for clients in options.clients]
    print(
        f"\n{options.model} at {options.size} px, {options.images} images a client, batch {options.batch_size}, cohort "
        f"{options.cohort}, {options.threads} CPU threads, torch {torch.__version__}"
    )
    print(
        "clients | images/s | of the bare loop | time ours / bare | processor time ours / bare | "
        "processor ms more a client | largest relative difference"
    )
    for line in lines:
        print(" | ".join(line))


if __name__ == "__main__":
    main()

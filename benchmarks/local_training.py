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
from torch import Tensor, nn
from torch.nn import functional as F

from lorafair.client.training import train_clients
from lorafair.communication.agreement import StopRequest
from lorafair.config import Config, FabricConfig, load_config
from lorafair.data.loading import local_batches
from lorafair.experiment import Experiment, build_experiment
from lorafair.federation import begin_round
from lorafair.launch import in_place
from lorafair.model.backbone import build_model
from lorafair.model.lora import ClientHead, LoRALinear
from lorafair.seeding import seeded
from lorafair.server.state import start_or_resume


class PlainLoRA(nn.Module):
    """y = W0 x + s·B(Ax), as one would write it for a single client."""

    def __init__(self, wrapped: LoRALinear) -> None:
        super().__init__()
        self.base, self.scaling = wrapped.base, wrapped.scaling
        self.A = nn.Parameter(wrapped.A.detach()[0].clone())
        self.B = nn.Parameter(wrapped.B.detach()[0].clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.A), self.B)


class BareLoop:
    """One round of local training without the package's round, client or loader."""

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        adapted = build_model(config.model, len(experiment.data.classes), config.seed)
        self.mean, self.std, self.backbone = adapted.mean, adapted.std, adapted.backbone
        for path, module in list(self.backbone.named_modules()):
            parent, _, name = path.rpartition(".")
            if isinstance(module, LoRALinear):
                setattr(self.backbone.get_submodule(parent), name, PlainLoRA(module))
            elif isinstance(module, ClientHead):
                linear = nn.Linear(module.weight.shape[2], module.weight.shape[1])
                setattr(self.backbone.get_submodule(parent), name, linear)
        layout, plain = experiment.layout, dict(self.backbone.named_parameters())
        names = [f"{path}.A" for path in layout.factors] + [f"{path}.B" for path in layout.factors]
        self.trained = [plain[name] for name in [*names, *layout.head]]  # in the order of a packed row
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
            with torch.no_grad():
                for parameter, values in zip(self.trained, self._split(start), strict=True):
                    parameter.copy_(values)
            optimizer = torch.optim.AdamW(
                self.trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
            generator = seeded(self.experiment.config.seed, 0, number)
            for batch in local_batches(client.indices, config, generator):
                inputs = (self.images[batch].float() - self.mean) / self.std
                optimizer.zero_grad()
                F.cross_entropy(self.backbone(inputs), labels[batch]).backward()
                torch.nn.utils.clip_grad_norm_(self.trained, config.clip_norm or torch.inf)
                optimizer.step()
            rows.append(torch.cat([parameter.detach().flatten() for parameter in self.trained]))
        return torch.stack(rows)

    def _split(self, row: Tensor) -> list[Tensor]:
        parts = row.split([parameter.numel() for parameter in self.trained])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.trained, strict=True)]


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
        experiment, _ = build_experiment(fabric, configuration(clients, options, folder))
        experiment.open_inputs()
        state, stop, bare = start_or_resume(experiment, None), StopRequest(fabric), BareLoop(experiment)

        def train() -> Tensor:
            partial, plan = begin_round(experiment, state)
            return train_clients(experiment, state, plan, partial, stop)

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

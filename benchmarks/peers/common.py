"""What the runners share: the work as plain PyTorch, read from a file, and the stopwatch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from processes import cpu_seconds
from torch import Tensor, nn
from torch.nn import functional as F

from lorafair.third_party import make_torchvision_importable

make_torchvision_importable()  # timm imports it

import timm  # noqa: E402


class PlainLoRA(nn.Module):
    """y = W0 x + s·B(Ax), as one would write it for a single client."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.A), self.B)


class Work(nn.Module):
    """The model with its start values, every client's batches of every round, and how to train on them.

    `images` (I, 3, S, S) uint8, `labels` (I,), `order[round][client]` indices of the client's images as they are
    visited; only `trained`, by name, has gradients.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        held: dict[str, Any] = torch.load(path, weights_only=True)
        self.images, self.labels, self.order = held["images"], held["labels"], held["order"]
        self.mean, self.std = held["mean"], held["std"]
        self.rounds, self.clients, self.batch_size = len(self.order), len(self.order[0]), held["batch_size"]
        self.learning_rate, self.weight_decay, self.clip_norm = (
            held[name] for name in ("learning_rate", "weight_decay", "clip_norm")
        )
        self.backbone = timm.create_model(held["model"], img_size=held["size"], num_classes=held["classes"]).eval()
        self.backbone.requires_grad_(False)
        for layer, rank in held["lora"].items():
            parent, _, name = layer.rpartition(".")
            linear = self.backbone.get_submodule(layer)
            setattr(self.backbone.get_submodule(parent), name, PlainLoRA(linear, rank, held["scaling"]))
        self.backbone.load_state_dict(held["backbone"])
        named = dict(self.backbone.named_parameters())
        self.trained = {name: named[name].requires_grad_() for name in held["trained"]}

    def client(self, round_index: int, client: int) -> tuple[Tensor, Tensor]:
        """A client's images and labels of one round, in the order of its batches."""
        order = self.order[round_index][client]
        return self.images[order], self.labels[order]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.backbone((images.float() - self.mean) / self.std), labels)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.trained.values(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )

    def train_client(self, round_index: int, client: int) -> None:
        """The plain loop: one epoch from the values that `trained` has now."""
        optimizer = self.optimizer()
        images, labels = self.client(round_index, client)
        for x, y in zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True):
            optimizer.zero_grad()
            self.loss(x, y).backward()
            nn.utils.clip_grad_norm_(self.trained.values(), self.clip_norm)
            optimizer.step()

    def read(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])


class Stopwatch:
    """When each round began (seconds since the epoch, seconds of CPU) and how long each client trained, in order."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.cpu: list[float] = []
        self.training: list[float] = []

    def begin_round(self) -> None:
        self.began.append(time.time())
        self.cpu.append(cpu_seconds(os.getpid()))

    def timed(self, train: Any) -> Any:
        """The function, with the seconds of every call added to `training`."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = train(*arguments, **options)
            self.training.append(time.perf_counter() - start)
            return result

        return wrapped

    def save(self, path: str | Path, weights: Tensor) -> None:
        """`weights` (P,) are the final ones, in the order of lorafair's packed row."""
        Path(path).write_text(
            json.dumps(
                {"began": self.began, "cpu": self.cpu, "training": self.training, "weights": weights.double().tolist()}
            )
        )


def packed(values: dict[str, Tensor]) -> Tensor:
    """(P,) all trained numbers in their order."""
    return torch.cat([tensor.detach().flatten() for tensor in values.values()])

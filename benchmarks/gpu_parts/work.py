"""Local training on images that lie on the device: the package's, a bare loop's, peft's, and as a CUDA graph."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from bare_loop import read_row, replace_adapters, take_step, trained_parameters, write_row
from torch import Tensor

from lorafair.client.cohort import Cohort, GradientRule, LocalTraining, client_losses, make_optimizer
from lorafair.config import ClientConfig, FabricConfig, LoRAConfig, ModelConfig
from lorafair.data.loading import CohortStep, cohort_steps
from lorafair.launch import in_place
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import build_model
from lorafair.seeding import seeded

from .timing import flop_of_an_image

CLASSES = 100
CLIENT = ClientConfig(optimizer="sgd", learning_rate=0.01, momentum=0.9, batch_size=128)
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Size:
    """What is trained: a model, its images, and how many of them."""

    model: str
    pixels: int
    lora_rank: int
    batch: int
    steps: int  # of a client
    clients: int = 1
    dropout: float = 0.0


def autocast_of(device: torch.device, precision: str) -> Autocast:
    """The one that a run with fabric.precision has."""
    accelerator: Any = "cuda" if device.type == "cuda" else "cpu"
    with in_place(FabricConfig(accelerator=accelerator, precision=precision)) as fabric:  # type: ignore[arg-type]
        return fabric.autocast


def build(size: Size) -> AdaptedModel:
    """The package's model on the CPU."""
    lora = LoRAConfig(rank=size.lora_rank, alpha=size.lora_rank, dropout=size.dropout)
    config = ModelConfig(name=size.model, weights="random", image_size=size.pixels, lora=lora)
    return build_model(config, CLASSES, seed=0)


class Work:
    """The same images and start for all ways of training on them."""

    def __init__(self, size: Size, device: torch.device, widest: int = 1, precision: str = "bf16-mixed") -> None:
        """`widest` is the largest cohort; the model is that of a run with this fabric.precision."""
        self.size, self.device = size, device
        self.model = build(size)
        self.flop = flop_of_an_image(self.model, size.pixels)
        self.plain = copy.deepcopy(self.model.backbone)
        self.model.attach(device, widest)
        self.model.set_precision(precision)
        self.autocast = autocast_of(device, precision)
        self.is_true_half = precision == "bf16-true"
        generator = seeded(0, "images", device=device)
        count = size.batch * widest
        shape = (count, 3, size.pixels, size.pixels)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
        self.labels = torch.arange(count, device=device) % CLASSES
        self.start = self.model.adapters.draw(0, 0).to(device)

    @property
    def images_of_a_pass(self) -> int:
        return self.size.batch * self.size.steps * self.size.clients

    def steps(self, cohort: int) -> list[CohortStep]:
        """Of one cohort: every client has `batch` images of its own, which come again in every step."""
        own = torch.arange(cohort * self.size.batch).view(cohort, -1).numpy()
        return cohort_steps([[images] * self.size.steps for images in own])

    def package(self, cohort: int = 1) -> Callable[[], Tensor]:
        """All clients, `cohort` of them side by side, by the package's LocalTraining; returns the last one's row."""
        training = LocalTraining(self.model, self.labels, CLIENT, autocast=self.autocast)
        steps, inputs = self.steps(cohort), self.images[: cohort * self.size.batch]

        def train() -> Tensor:
            for first in range(0, self.size.clients, cohort):
                generators = [seeded(0, c, device=self.device) for c in range(first, first + cohort)]
                start = self.start.expand(cohort, -1)
                result = training.train(Cohort(start, steps, generators), itertools.repeat(inputs, len(steps)))
            return result.rows[-1]

        return train

    def bare(self, compiled: str | None = None) -> Callable[[], Tensor]:
        """One client by a plain loop: y = W0 x + s·B(Ax), the fused optimiser of PyTorch.

        In bf16-true all that is not trained is bfloat16, as one would write it: weights of adapted layers, too.
        """
        backbone = copy.deepcopy(self.plain)
        replace_adapters(backbone)
        backbone.to(self.device)
        layout = self.model.adapters.layout
        parameters = trained_parameters(backbone, layout)
        if self.is_true_half:
            for tensor in {*backbone.parameters(), *backbone.buffers()} - set(parameters):
                tensor.data = tensor.data.to(torch.bfloat16) if tensor.is_floating_point() else tensor.data
            head = backbone.get_submodule(next(iter(layout.head)).rpartition(".")[0])
            head.register_forward_pre_hook(lambda _, given: (given[0].float(),))
        return self._loop(backbone, parameters, self.start, compiled)

    def peft(self) -> Callable[[], Tensor]:
        """One client by the same loop on a model of peft."""
        from peft import LoraConfig, get_peft_model

        backbone = copy.deepcopy(self.plain)
        replace_adapters(backbone, lambda layer: layer.base)
        paths, (head, *_) = list(self.model.adapters.layout.factors), self.model.adapters.layout.head
        config = LoraConfig(
            r=self.size.lora_rank, lora_alpha=self.size.lora_rank, target_modules=paths, lora_dropout=self.size.dropout,
            modules_to_save=[head.rpartition(".")[0]],
        )  # fmt: skip
        wrapped: Any = get_peft_model(backbone, config).to(self.device)
        return self._loop(wrapped, [p for p in wrapped.parameters() if p.requires_grad])

    def _loop(
        self, backbone: Any, parameters: list[torch.nn.Parameter],
        start: Tensor | None = None, compiled: str | None = None,
    ) -> Callable[[], Tensor]:  # fmt: skip
        forward = torch.compile(backbone, backend=compiled) if compiled else backbone

        def train() -> Tensor:
            if start is not None:
                write_row(parameters, start)
            optimizer = torch.optim.SGD(
                parameters, lr=CLIENT.learning_rate, momentum=CLIENT.momentum or 0.0,
                weight_decay=CLIENT.weight_decay, fused=True,
            )  # fmt: skip
            for _ in range(self.size.steps):
                inputs = (self.images.float() - self.model.mean) / self.model.std
                inputs = inputs.bfloat16() if self.is_true_half else inputs
                take_step(forward, optimizer, parameters, inputs, self.labels, CLIENT.clip_norm, self.autocast)
            return read_row(parameters)

        return train

    def as_graph(self) -> Callable[[], None]:
        """The package's step of one client, in bf16-true, captured once as a CUDA graph and replayed.

        As https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs asks: steps on a side stream first, inputs
        that stay where they are, no autocast, whose cache does not outlive a step, SGD, which needs no `capturable`. A
        graph keeps addresses and no tensors: what was made before it, as the momentum, has to live as long as it.
        """
        adapters, rule = self.model.adapters, GradientRule(CLIENT.clip_norm)
        adapters.resize(1)
        adapters.write(self.start)
        columns = adapters.train_only(("A", "B", "head"))
        optimizer, gradient = make_optimizer(columns, CLIENT), adapters.flat.grad
        weights = torch.full((1, self.size.batch), 1 / self.size.batch, device=self.device)
        assert gradient is not None

        def step() -> None:
            gradient.zero_()
            with self.autocast():
                logits = self.model(self.images)
            client_losses(logits, self.labels.unsqueeze(0), weights).sum().backward()
            rule.apply(gradient, adapters.flat.data)
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay(_used: object = step) -> None:  # the graph reads what `step` holds, after this function has returned
            adapters.write(self.start)
            for _ in range(self.size.steps):
                graph.replay()

        return replay

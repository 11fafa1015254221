"""Local training of a cohort of clients. A client is its images, a start and a generator; nothing outlives the round.

Letters: C clients in the cohort, N images of the largest batch, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from lorafair.adapter import PARTS, Part
from lorafair.config import ClientConfig
from lorafair.data.loading import CohortStep
from lorafair.lora import DropoutStreams, TrainedColumns
from lorafair.models import AdaptedModel


@dataclass(frozen=True)
class CohortResult:
    """What a cohort leaves, on the training device."""

    rows: Tensor  # (C, P) packed adapters
    losses: Tensor  # (C,) mean training loss over a client's steps


def train_cohort(
    model: AdaptedModel,
    start: Tensor,
    steps: Sequence[CohortStep],
    inputs: Iterable[Tensor],
    labels: Tensor,
    config: ClientConfig,
    *,
    generators: Sequence[torch.Generator],
    autocast: Callable[[], AbstractContextManager[object]],
    parts: Sequence[Part] = PARTS,
    corrections: Tensor | None = None,
    loss_scale: float = 1.0,
) -> CohortResult:
    """Train `parts` of C clients from the packed adapters `start` (C, P), each on its own batches.

    `inputs` yields one (C*N, ...) tensor a step; `labels` are those of all training images, on the device;
    `generators` (C,) are the clients' own, for dropout; `corrections` (C, P) are added to every gradient (SCAFFOLD);
    `loss_scale` keeps gradients within the range of half precision. A client whose batches end earlier leaves the
    cohort: its row stays as it is. No step waits for the device. The model still has the cohort's size afterwards.
    """
    adapters = model.adapters
    adapters.resize(len(start))
    adapters.write(start)
    optimizer = make_optimizer(adapters.train_only(parts, separately=config.b_learning_rate_ratio != 1), config)
    rule = GradientRule(config.clip_norm, config.proximal, start, corrections, loss_scale)
    trained = adapters.flat.data  # (C, P) all rows, also those that leave
    losses = torch.zeros(len(start), device=trained.device)  # (C,)
    taken = torch.tensor([sum(c < len(step.counts) for step in steps) for c in range(len(start))])
    for step, batch in zip(steps, inputs, strict=True):
        active = len(step.counts)
        if active < len(adapters.flat):
            adapters.resize(active)
            _keep_rows(optimizer, active)
        adapters.use_dropout(DropoutStreams(generators[:active], step.counts))
        targets = labels[torch.from_numpy(step.indices).to(labels.device, non_blocking=True)]  # (C, N)
        weights = _sample_weights(step.counts, step.indices.shape[1], targets.device)
        losses[:active] += train_step(model, optimizer, batch, targets, weights, rule, autocast)
    adapters.use_dropout(None)
    return CohortResult(rows=trained.clone(), losses=losses / taken.to(losses.device))


@dataclass(frozen=True)
class GradientRule:
    """What clients make of the gradient of their loss before the optimiser's step."""

    clip_norm: float | None = None  # largest norm of a client's whole gradient
    proximal: float = 0.0  # μ of FedProx, whose objective adds μ/2·‖w − start‖² (arXiv 1812.06127, equation 2)
    start: Tensor | None = None  # (C, P) where the clients started
    corrections: Tensor | None = None  # (C, P) c − c_k of SCAFFOLD (arXiv 1910.06378, equation 3), not clipped
    loss_scale: float = 1.0  # by which the gradient is too large

    def apply(self, gradient: Tensor, values: Tensor) -> None:
        """Change `gradient` (c, P) at the parameters `values` (c, P) in place; the first c clients are at work."""
        active = len(gradient)
        if self.loss_scale != 1:  # half precision: what overflows counts as zero
            gradient.div_(self.loss_scale)
            gradient.masked_fill_(~gradient.isfinite().all(dim=1, keepdim=True), 0.0)
        if self.proximal:
            assert self.start is not None
            gradient.add_(values - self.start[:active], alpha=self.proximal)
        if self.clip_norm is not None:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # (c, 1): each client is clipped by itself
            gradient.mul_((self.clip_norm / (norms + 1e-6)).clamp(max=1.0))
        if self.corrections is not None:
            gradient.add_(self.corrections[:active])


def train_step(
    model: AdaptedModel,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    weights: Tensor,
    rule: GradientRule,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """One optimiser step of every client of the cohort; returns their losses (C,) without waiting for the device.

    inputs (C*N, ...), targets (C, N) class indices, weights (C, N) summing to 1 for each client, 0 for padding.
    """
    gradient = model.adapters.flat.grad
    assert gradient is not None
    gradient.zero_()
    with autocast():
        logits = model(inputs)  # (C*N, classes)
    losses = client_losses(logits, targets, weights)
    (losses.sum() * rule.loss_scale).backward()
    rule.apply(gradient, model.adapters.flat.data)
    optimizer.step()
    return losses.detach()


def client_losses(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of each client (C,) from logits (C*N, classes), targets (C, N) and sample weights (C, N)."""
    of_images = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
    return (of_images.view_as(weights) * weights).sum(1)


def make_optimizer(trained: Sequence[TrainedColumns], config: ClientConfig) -> Optimizer:
    """A fresh optimiser over columns (C, n); every operation is element-wise, so clients do not mix."""
    # PyTorch's fused steps take every tensor for contiguous, which some columns of several clients' rows are not.
    fused = all(t.parameter.device.type in ("cpu", "cuda") and t.parameter.is_contiguous() for t in trained)
    groups = [{"params": [t.parameter], "lr": part_learning_rate(config, t.parts[0])} for t in trained]
    if config.optimizer == "adamw":
        return AdamW(groups, weight_decay=config.weight_decay, fused=fused)
    return SGD(groups, lr=0.0, momentum=config.momentum or 0.0, weight_decay=config.weight_decay, fused=fused)


def part_learning_rate(config: ClientConfig, part: Part) -> float:
    """The learning rate of a part: LoRA+ trains B faster than A (arXiv 2402.12354)."""
    return config.learning_rate * (config.b_learning_rate_ratio if part == "B" else 1.0)


def in_round(config: ClientConfig, round_index: int) -> ClientConfig:
    """The local training of one round (from 0): its learning rate follows the schedule."""
    share = 1.0
    if config.schedule == "exponential":
        assert config.decay is not None
        share = config.decay**round_index
    elif config.schedule != "constant":
        assert config.schedule_rounds is not None
        assert config.final_share is not None
        done = min(round_index / config.schedule_rounds, 1.0)
        left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        share = config.final_share + (1 - config.final_share) * left
    return replace(config, learning_rate=share * config.learning_rate)


def reach(config: ClientConfig, part: Part, steps: int) -> float:
    """How far a constant gradient of 1 moves a parameter in so many SGD steps: Σ_j lr·(1 − m^j)/(1 − m)."""
    momentum = config.momentum or 0.0
    units = sum((1 - momentum**step) / (1 - momentum) for step in range(1, steps + 1))
    return part_learning_rate(config, part) * units


def _keep_rows(optimizer: Optimizer, rows: int) -> None:
    """Drop the optimiser state of the clients that have left the cohort."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim == 2:
                state[name] = value[:rows]


@lru_cache(maxsize=64)  # most steps are alike
def _sample_weights(counts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """What each of N = `width` images of C clients counts for in its client's loss, (C, N); not to be changed."""
    images = torch.tensor(counts).unsqueeze(1)  # (C, 1)
    return ((torch.arange(width) < images) / images).to(device)

"""Local training of a cohort of clients. A client is its images, a start and a generator; nothing outlives the round.

Letters: C clients in the cohort, N images of the largest batch, P packed length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from lorafair.adapter import PARTS, Part
from lorafair.config import ClientConfig
from lorafair.data.loading import CohortStep
from lorafair.lora import DropoutStreams
from lorafair.models import AdaptedModel


@dataclass(frozen=True)
class CohortResult:
    """What a cohort sends to the server, on the training device."""

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
) -> CohortResult:
    """Train `parts` of C clients from the packed adapters `start` (C, P), each on its own batches.

    `inputs` yields one (C*N, ...) tensor a step; `labels` are those of all training images, on the device;
    `generators` (C,) are the clients' own, for dropout. A client whose batches end earlier leaves the cohort: its row
    stays as it is. No step waits for the device.
    """
    adapters = model.adapters
    adapters.resize(len(start))
    adapters.write(start)
    optimizer = make_optimizer(adapters.train_only(parts), config)
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
        weights = _sample_weights(step, targets.device)
        losses[:active] += train_step(model, optimizer, batch, targets, weights, config.clip_norm, autocast)
    adapters.use_dropout(None)
    result = CohortResult(rows=trained.clone(), losses=losses / taken.to(losses.device))
    adapters.resize(1)
    return result


def train_step(
    model: AdaptedModel,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    weights: Tensor,
    clip_norm: float | None,
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
    losses.sum().backward()
    if clip_norm is not None:
        norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # (C, 1): each client is clipped by itself
        gradient.mul_((clip_norm / (norms + 1e-6)).clamp(max=1.0))
    optimizer.step()
    return losses.detach()


def client_losses(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of each client (C,) from logits (C*N, classes), targets (C, N) and sample weights (C, N)."""
    of_images = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
    return (of_images.view_as(weights) * weights).sum(1)


def make_optimizer(trained: Sequence[Tensor], config: ClientConfig) -> Optimizer:
    """A fresh optimiser over parameters (C, n); every operation is element-wise, so clients do not mix."""
    # PyTorch's fused steps take every tensor for contiguous, which some columns of several clients' rows are not.
    fused = trained[0].device.type in ("cpu", "cuda") and all(parameter.is_contiguous() for parameter in trained)
    if config.optimizer == "adamw":
        return AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    momentum = config.momentum or 0.0
    return SGD(trained, lr=config.learning_rate, momentum=momentum, weight_decay=config.weight_decay, fused=fused)


def _keep_rows(optimizer: Optimizer, rows: int) -> None:
    """Drop the optimiser state of the clients that have left the cohort."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim == 2:
                state[name] = value[:rows]


def _sample_weights(step: CohortStep, device: torch.device) -> Tensor:
    counts = torch.tensor(step.counts).unsqueeze(1)  # (C, 1)
    position = torch.arange(step.indices.shape[1]).unsqueeze(0)  # (1, N)
    return ((position < counts) / counts).to(device, non_blocking=True)  # (C, N)

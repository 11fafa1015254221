"""Local training of a cohort of clients. A client is its images, a start and a generator; nothing outlives the round.

Letters: C clients in the cohort, N images of the largest batch, P packed length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from lorafair.aggregation.smoothing import Smoothing
from lorafair.client.private_step import ExamplePrivacy, PrivateGradient, dropout_of_images
from lorafair.config.schema import ClientConfig
from lorafair.data.loading import CohortStep, index_on
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import PARTS, AdapterLayout, Part
from lorafair.model.lora import DropoutStreams
from lorafair.model.parameters import TrainedColumns
from lorafair.schedule import part_learning_rate


@dataclass(frozen=True)
class Cohort:
    """C clients that train side by side: where they start and what they see."""

    start: Tensor  # (C, P) packed adapters
    steps: Sequence[CohortStep]
    generators: Sequence[torch.Generator]  # (C,) each client's own, for dropout
    corrections: Tensor | None = None  # (C, P) added to every gradient (SCAFFOLD)
    fixed: Tensor | None = None  # (C, P) bool: what stays as it is, of clients that train some directions only
    penalty: Callable[[Tensor, Tensor], None] | None = None  # adds to gradients (c, P), in place, at values (c, P)
    scales: Tensor | None = None  # (C,) s_k / s of clients whose update has a scaling of its own; `start` has it in B
    privacy: ExamplePrivacy | None = None  # of DP-SGD, whose steps are random samples


@dataclass(frozen=True)
class CohortResult:
    """What a cohort leaves, on the training device."""

    rows: Tensor  # (C, P) packed adapters
    losses: Tensor  # (C,) mean training loss over a client's steps; with privacy over the images of its samples
    first_losses: Tensor  # (C,) of the first step, before the optimiser moves anything
    measures: Tensor | None = None  # (C, M) of DP-SGD


@dataclass(frozen=True)
class LocalTraining:
    """How the clients of a round train on one rank."""

    model: AdaptedModel
    labels: Tensor  # of all training images, on the device
    config: ClientConfig
    parts: Sequence[Part] = PARTS  # what is trained
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    loss_scale: float = 1.0  # keeps gradients within the range of half precision
    parts_of_step: Callable[[int], Sequence[Part]] | None = None  # in a step (from 0), where not all in each
    smoothing: Smoothing | None = None  # of the factors' gradients

    def train(self, cohort: Cohort, inputs: Iterable[Tensor]) -> CohortResult:
        """Train C clients, each on its own batches; `inputs` yields one (C*N, ...) tensor a step.

        A client whose batches end earlier leaves the cohort: its row stays as it is. No step waits for the device. The
        model still has the cohort's size afterwards.
        """
        adapters, config = self.model.adapters, self.config
        start = cohort.start if cohort.scales is None else _b_times(adapters.layout, cohort.start, 1 / cohort.scales)
        adapters.resize(len(start))
        adapters.write(start)
        adapters.scale_clients(cohort.scales)
        separately = config.b_learning_rate_ratio != 1 or self.parts_of_step is not None
        columns = adapters.train_only(self.parts, separately=separately)
        optimizer = make_optimizer(columns, config)
        private = self._private_gradient(cohort)
        scale = self.loss_scale if private is None else 1.0
        rule = GradientRule(config.clip_norm, config.proximal, start, cohort.corrections, scale, cohort.fixed)
        rule = replace(rule, penalty=cohort.penalty)
        trained = adapters.flat.data  # (C, P) all rows, also those that leave
        losses = torch.zeros(len(start), device=trained.device)  # (C,)
        first = losses
        for index, (step, batch) in enumerate(zip(cohort.steps, inputs, strict=True)):
            active = len(step.counts)
            if active < len(adapters.flat):
                adapters.resize(active)
                _keep_rows(optimizer, active)
            if adapters.drops:
                adapters.use_dropout(_dropout_of(cohort, step, index))
            rule = self.rule_of_step(rule, index)
            with _without_gradient(column for column in columns if column.span in rule.idle):
                losses[:active] += self.step(optimizer, rule, batch, step, private)
            if first is losses:
                first = losses.clone()
        adapters.use_dropout(None)
        adapters.scale_clients(None)
        if private is not None:
            adapters.show()
        taken = torch.tensor([_weight_of(c, cohort) for c in range(len(start))])
        rows = trained.clone() if cohort.scales is None else _b_times(adapters.layout, trained, cohort.scales)
        losses = losses / taken.to(losses.device, non_blocking=True)
        return CohortResult(rows, losses, first, measures=None if private is None else private.tally.rows)

    def _private_gradient(self, cohort: Cohort) -> PrivateGradient | None:
        """What makes the gradients of a cohort with privacy."""
        if cohort.privacy is None:
            return None
        more = {"fixed": cohort.fixed, "scales": cohort.scales}
        return PrivateGradient(self.model, cohort.privacy, self.parts, **more, loss_scale=self.loss_scale)

    def rule_of_step(self, rule: GradientRule, index: int) -> GradientRule:
        """The rule with what this step (from 0) leaves as it is, and how it smooths gradients."""
        if self.parts_of_step is None and self.smoothing is None:
            return rule
        layout, smoothing = self.model.adapters.layout, self.smoothing
        parts = self.parts if self.parts_of_step is None else self.parts_of_step(index)
        idle = tuple(layout.slices[part] for part in self.parts if part not in parts)
        if smoothing is None:
            return replace(rule, idle=idle)

        def smooth(gradient: Tensor) -> None:
            smoothing.apply(layout.unpack(gradient).factors, parts)

        return replace(rule, idle=idle, smooth=smooth)

    def step(
        self,
        optimizer: Optimizer,
        rule: GradientRule,
        inputs: Tensor,
        step: CohortStep,
        private: PrivateGradient | None = None,
    ) -> Tensor:
        """One optimiser step of every client of `step`; returns their losses (C,) without waiting for the device."""
        targets = self.labels[index_on(step.indices, self.labels.device)]  # (C, N)
        gradient = self.model.adapters.flat.grad
        assert gradient is not None
        if private is not None:
            losses = private(inputs, targets, step.counts, self.autocast, rule.idle)
        else:
            weights = _sample_weights(step.counts, step.indices.shape[1], targets.device)
            gradient.zero_()
            with self.autocast():
                logits = self.model(inputs)  # (C*N, classes)
            losses = client_losses(logits, targets, weights)
            (losses.sum() * rule.loss_scale).backward()
        rule.apply(gradient, self.model.adapters.flat.data)
        optimizer.step()
        rule.restore(self.model.adapters.flat.data)
        return losses.detach()


def _dropout_of(cohort: Cohort, step: CohortStep, number: int) -> DropoutStreams:
    """Where the clients of a step (from 0) draw its masks."""
    generators = cohort.generators[: len(step.counts)]
    if cohort.privacy is not None:
        return dropout_of_images(generators, step, number)
    return DropoutStreams(generators, step.counts)


def _weight_of(client: int, cohort: Cohort) -> int:
    """What the sum of a client's losses is divided by: its steps, or the images of its random samples."""
    counts = [step.counts[client] for step in cohort.steps if client < len(step.counts)]
    return len(counts) if cohort.privacy is None else max(1, sum(counts))


@contextmanager
def _without_gradient(columns: Iterable[TrainedColumns]) -> Iterator[None]:
    """In the block, an optimiser's step leaves these columns and its state of them alone."""
    gradients = {column.parameter: column.parameter.grad for column in columns}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _b_times(layout: AdapterLayout, rows: Tensor, scales: Tensor) -> Tensor:
    """A copy of packed adapters (C, P) with B of all layers times `scales` (C,)."""
    result = rows.clone()
    result[:, layout.slices["B"]] *= scales.unsqueeze(1)
    return result


@dataclass(frozen=True)
class GradientRule:
    """What clients make of the gradient of their loss before the optimiser's step."""

    clip_norm: float | None = None  # largest norm of a client's whole gradient
    proximal: float = 0.0  # μ of FedProx, whose objective adds μ/2·‖w − start‖² (arXiv 1812.06127, equation 2)
    start: Tensor | None = None  # (C, P) where the clients started
    corrections: Tensor | None = None  # (C, P) c − c_k of SCAFFOLD (arXiv 1910.06378, equation 3), not clipped
    loss_scale: float = 1.0  # by which the gradient is too large
    fixed: Tensor | None = None  # (C, P) what has no gradient and stays as it is at the start
    penalty: Callable[[Tensor, Tensor], None] | None = None  # of the method, added to the loss
    idle: tuple[slice, ...] = ()  # columns that this step does not train
    smooth: Callable[[Tensor], None] | None = None  # of the method, in place: the last that is done to a gradient

    def apply(self, gradient: Tensor, values: Tensor) -> None:
        """Change `gradient` (c, P) at the parameters `values` (c, P) in place; the first c clients are at work."""
        active = len(gradient)
        if self.loss_scale != 1:  # half precision: what overflows counts as zero
            gradient.div_(self.loss_scale)
            gradient.masked_fill_(~gradient.isfinite().all(dim=1, keepdim=True), 0.0)
        if self.penalty is not None:
            self.penalty(gradient, values)
        if self.fixed is not None:
            gradient.masked_fill_(self.fixed[:active], 0.0)
        if self.proximal:
            assert self.start is not None
            gradient.add_(values - self.start[:active], alpha=self.proximal)
        for columns in self.idle:
            gradient[:, columns] = 0
        if self.clip_norm is not None:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # (c, 1): each client is clipped by itself
            gradient.mul_((self.clip_norm / (norms + 1e-6)).clamp(max=1.0))
        if self.corrections is not None:
            gradient.add_(self.corrections[:active])
        if self.smooth is not None:
            self.smooth(gradient)

    def restore(self, values: Tensor) -> None:
        """Take back what an optimiser's step has done to values (c, P) that stay: it may have decayed them."""
        if self.fixed is not None:
            assert self.start is not None
            active = len(values)
            torch.where(self.fixed[:active], self.start[:active], values, out=values)


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
    return ((torch.arange(width) < images) / images).to(device, non_blocking=True)

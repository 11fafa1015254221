"""DP-SGD of the clients of a cohort: each image's gradient is clipped, and noise is added to their sum.

Letters: C clients in the cohort, N images of the largest batch, P packed length, M measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafair.data.loading import CohortStep
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import Part
from lorafair.model.lora import DropoutStreams
from lorafair.model.per_sample import ImageGradients, spread
from lorafair.privacy.measures import Tally
from lorafair.privacy.noise import standard_normal
from lorafair.seeding import seeded


@dataclass(frozen=True)
class ExamplePrivacy:
    """The mechanism of the C clients of a cohort."""

    clip_norm: float  # of an image's gradient
    noise_multiplier: float
    expected: Sequence[float]  # (C,) images of a random sample on average
    generators: Sequence[torch.Generator | None]  # (C,) of each client's noise; None: the operating system's


def dropout_of_images(generators: Sequence[torch.Generator], step: CohortStep, number: int) -> DropoutStreams:
    """The masks of a step (from 0): each image has a stream of its own, which follows from its client's (C,).

    Were they drawn for a client's images one after the other, an image more would give all that come after it other
    masks, and the sum of gradients would change by more than the clipping norm.
    """
    of_images = [
        seeded(generator.initial_seed(), int(image), number, device=generator.device)
        for generator, images in zip(generators, step.indices, strict=False)
        for image in images
    ]
    return DropoutStreams(of_images, (1,) * len(of_images))


class PrivateGradient:
    """Makes the gradients of a cohort's steps, and measures them."""

    def __init__(
        self,
        model: AdaptedModel,
        privacy: ExamplePrivacy,
        parts: Sequence[Part],
        *,
        fixed: Tensor | None = None,
        scales: Tensor | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """`parts` are trained, but for what is `fixed` (C, P); `scales` (C,) are of the clients' updates."""
        self._model, self._privacy, self._loss_scale = model, privacy, loss_scale
        slices = model.adapters.layout.slices
        self._columns = {part: slices[part] for part in parts if slices[part].stop > slices[part].start}
        self._fixed, self._scales = fixed, scales
        device = model.adapters.flat.device
        self._expected = torch.tensor(privacy.expected, device=device).unsqueeze(1)  # (C, 1)
        self.tally = Tally(len(privacy.expected), device)

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        counts: Sequence[int],
        autocast: Callable[[], AbstractContextManager[object]],
        idle: Sequence[slice] = (),
    ) -> Tensor:
        """Leave the gradients of the first c clients in the model's adapters; returns sums (c,) of their losses.

        `inputs` (c*N, ...) and `targets` (c, N); of a client's N images only so many as `counts` says are not padding.
        Columns that are `idle` in this step have no gradient, count for no norm and get no noise.
        """
        clients, images = targets.shape
        is_real = torch.arange(images) < torch.tensor(counts).unsqueeze(1)
        is_real = is_real.to(targets.device, non_blocking=True)  # (c, N)
        scales = None if self._scales is None else self._scales[:clients]
        spread(self._model.adapters, images, scales)
        with autocast():
            logits = self._model(inputs)  # (c*N, classes)
        losses = F.cross_entropy(logits.float(), targets.flatten(), reduction="none").view_as(targets)
        losses = torch.where(is_real, losses, 0.0)
        (losses.sum() * self._loss_scale).backward()
        rows = self._model.adapters.flat.grad
        assert rows is not None
        rows.zero_()
        gradients = ImageGradients.of(self._model.adapters, images).outside(idle)
        self._put_clipped_sums(gradients, is_real, rows)
        self._add_noise(rows, idle)
        rows.div_(self._expected[:clients])
        return losses.detach().sum(1)

    def _put_clipped_sums(self, gradients: ImageGradients, is_real: Tensor, rows: Tensor) -> None:
        """Sums of gradients, each at most `clip_norm` long, into rows (c, P). What is not finite counts as zero."""
        if self._fixed is not None:
            gradients.without(self._fixed)
        squares = gradients.squared_norms()
        norms = torch.stack(list(squares.values())).sum(0).sqrt()  # (c, N)
        is_finite = norms.isfinite()
        if norms.device.type != "cpu" or not bool(is_finite.all()):  # without waiting for a GPU
            gradients.drop(~is_finite)
            norms = torch.where(is_finite, norms, 0.0)
            squares = {part: torch.where(is_finite, square, 0.0) for part, square in squares.items()}
        bound = self._privacy.clip_norm * self._loss_scale
        weights = (bound / norms).clamp(max=1.0) / self._loss_scale  # of a gradient of zero, too
        gradients.put_weighted_sums(weights * is_real, rows)
        tally = self.tally
        tally.add("images", is_real.sum(1))
        tally.add("clipped", ((norms > bound) & is_real).sum(1))
        tally.add("norm", (norms * is_real).sum(1) / self._loss_scale)
        for part, square in squares.items():
            tally.add(f"norm/{part}", (square.sqrt() * is_real).sum(1) / self._loss_scale)
            tally.add(f"signal/{part}", rows[:, self._columns[part]].square().sum(1))

    def _add_noise(self, rows: Tensor, idle: Sequence[slice]) -> None:
        """Gaussian noise on the sums (c, P), of each client from its own generator."""
        deviation = self._privacy.clip_norm * self._privacy.noise_multiplier
        if not deviation:
            return
        for part, columns in self._columns.items():
            if columns in idle:
                continue
            sums = rows[:, columns]
            noise = torch.stack(
                [
                    standard_normal(row, generator)
                    for row, generator in zip(sums, self._privacy.generators, strict=False)
                ]
            ).mul_(deviation)
            if self._fixed is not None:
                noise.masked_fill_(self._fixed[: len(rows), columns], 0.0)
            sums.add_(noise)
            self.tally.add(f"noise/{part}", noise.square().sum(1))

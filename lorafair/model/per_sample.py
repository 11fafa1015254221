"""Gradients of every single image: each image becomes a client of its own, with the factors of its client.

A layer computes the updates of clients side by side by two batched products, and their gradients come out apart. So
the gradients of images do, too, at the same arithmetic; no second pass, no hook.

Letters: C clients in the cohort, N images of one client, P packed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.model.adapter import PARTS, Part
from lorafair.model.parameters import AdapterParameters


def spread(adapters: AdapterParameters, images: int, scales: Tensor | None = None) -> None:
    """Let the model hold the factors of each of N images of the C clients in use, until `adapters.show`.

    `scales` (C,) are those of the clients' updates, as for `scale_clients`. One client's factors are not copied.
    """
    for span, parameter in adapters.tensors():
        shape, rows = parameter.shape[1:], adapters.flat.data[:, span]  # (C, p)
        of_images = rows.unsqueeze(1).expand(-1, images, -1).reshape(len(rows) * images, *shape)
        parameter.grad = None  # autograd checks a gradient's shape against the parameter's, so this order matters
        parameter.data = of_images
    if scales is not None:
        adapters.scale_clients(scales.repeat_interleave(images))


@dataclass(frozen=True)
class ImageGradients:
    """What a backward pass has left in a model that was `spread`: a gradient of every tensor for every image."""

    clients: int  # C
    images: int  # N
    tensors: Sequence[tuple[Part, slice, Tensor]]  # part, columns of a packed row, (C*N, p)

    @classmethod
    def of(cls, adapters: AdapterParameters, images: int) -> ImageGradients:
        """Take the gradients out of the model."""
        parts, found = adapters.layout.slices, []
        for span, parameter in adapters.tensors():
            if parameter.grad is not None:
                part = next(part for part in PARTS if parts[part].start <= span.start < parts[part].stop)
                found.append((part, span, parameter.grad.reshape(len(parameter), -1)))
                parameter.grad = None
        return cls(len(adapters.flat), images, found)

    def outside(self, idle: Sequence[slice]) -> ImageGradients:
        """Those of the tensors that do not lie in these columns of a packed row."""
        kept = [t for t in self.tensors if not any(span.start <= t[1].start < span.stop for span in idle)]
        return ImageGradients(self.clients, self.images, kept)

    def without(self, columns: Tensor) -> None:
        """Set the gradients of some columns of each client, (C, P) bool, to zero."""
        for _, span, gradient in self.tensors:
            fixed = columns[: self.clients, span].repeat_interleave(self.images, dim=0)
            gradient.masked_fill_(fixed, 0.0)

    def squared_norms(self) -> dict[Part, Tensor]:
        """Of the gradient of each image, (C, N), for each part that has one."""
        squares: dict[Part, Tensor] = {}
        for part, _, gradient in self.tensors:
            square = torch.linalg.vector_norm(gradient, dim=1).square().view(self.clients, self.images)
            squares[part] = squares[part] + square if part in squares else square
        return squares

    def drop(self, images: Tensor) -> None:
        """Set all of the gradients of some images, (C, N) bool, to zero."""
        for _, _, gradient in self.tensors:
            gradient.masked_fill_(images.view(-1, 1), 0.0)

    def put_weighted_sums(self, weights: Tensor, rows: Tensor) -> None:
        """Put the sum of each client's gradients, each times its weight (C, N), into rows (C, P)."""
        of_clients = weights.unsqueeze(1)  # (C, 1, N)
        for _, span, gradient in self.tensors:
            rows[:, span] = torch.bmm(of_clients, gradient.reshape(self.clients, self.images, -1)).squeeze(1)

"""The mean of the clients' heads, which all methods share: one weight a client, or one a client and class.

Letters: K clients, Q classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafair.aggregation.factor_algebra import clients_at_a_time, total, weighted_mean


def mean_head(heads: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Σ p_k H_k of each parameter (K, ...), weights (K,); in float64."""
    return {name: weighted_mean(stack, weights) for name, stack in heads.items()}


def class_mean_head(
    heads: Mapping[str, Tensor], class_counts: Tensor, start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Row c is Σ n_kc H_kc / Σ n_kc, or that of `start` (Q, ...) where nobody has an image of class c; in float64.

    `heads` are the head's parameters after training (K, Q, ...), whose rows are classes, and `class_counts` (K, Q) the
    training images of each class at each client. Where all classes have the same weights, it is `mean_head` with them,
    to the bit. (Compare arXiv 2406.07800, 2209.00189.)
    """
    return {name: _class_mean(stack, class_counts, start[name]) for name, stack in heads.items()}


def _class_mean(stack: Tensor, class_counts: Tensor, start: Tensor) -> Tensor:
    counts = class_counts.to(torch.float64)
    images = counts.sum(0)  # (Q,)
    weights = counts / images.clamp_min(1)
    if images.all() and torch.equal(weights, weights[:, :1].expand_as(weights)):
        return weighted_mean(stack, weights[:, 0])  # of sums in another order the last bits differ
    images, weights = images.to(stack.device), weights.to(stack.device)
    size = clients_at_a_time(stack.shape[1:].numel())
    blocks = zip(weights.split(size), stack.split(size), strict=True)
    mean = total((_rows(own, block) * block.to(torch.float64)).sum(0) for own, block in blocks)
    return torch.where(_rows(images, start) > 0, mean, start.to(torch.float64))


def _rows(of_rows: Tensor, like: Tensor) -> Tensor:
    """A number for each row, to be multiplied with the rows of `like`."""
    return of_rows.view(*of_rows.shape, *(1,) * (like.ndim - of_rows.ndim))

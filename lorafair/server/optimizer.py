"""Server optimisers on the change that an aggregation method makes: FedAvgM, FedAdam, FedYogi.

"Adaptive Federated Optimization" (arXiv 2003.00295, algorithm 2), momentum without damping as in arXiv 1909.06335.

Letters: P packed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.config.schema import ServerConfig


@dataclass
class Moments:
    """What a server optimiser remembers of earlier rounds."""

    first: Tensor  # (P,) m
    second: Tensor  # (P,) v; unused by FedAvgM

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.first, self.second

    @classmethod
    def at_start(cls, config: ServerConfig, like: Tensor) -> Moments:
        """Before the first round: m = 0, v = τ²."""
        return cls(torch.zeros_like(like), torch.full_like(like, (config.adaptivity or 0.0) ** 2))


def server_step(
    config: ServerConfig, moments: Moments, start: Tensor, proposed: Tensor, columns: Sequence[slice]
) -> Tensor:
    """Where clients start instead of `proposed`, and `moments` moved on, in some columns of the packed row.

    `start` (P,) is what the clients were sent and `proposed` (P,) what the method made of their answers; their
    difference Δ is the step that plain averaging takes. Other columns are those of `proposed`.
    """
    assert config.learning_rate is not None
    assert config.momentum is not None
    moved = proposed.clone()
    for span in columns:
        change, m, v = proposed[span] - start[span], moments.first[span], moments.second[span]
        if config.optimizer == "fedavgm":
            m.mul_(config.momentum).add_(change)
            step = m
        else:
            assert config.second_momentum is not None
            assert config.adaptivity is not None
            m.mul_(config.momentum).add_(change, alpha=1 - config.momentum)
            square = change.square()
            if config.optimizer == "fedadam":
                v.mul_(config.second_momentum).add_(square, alpha=1 - config.second_momentum)
            else:
                v.sub_(square * (v - square).sign(), alpha=1 - config.second_momentum)
            step = m / (v.sqrt() + config.adaptivity)
        moved[span] = start[span] + config.learning_rate * step
    return moved

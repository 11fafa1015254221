"""What is evaluated and exported: the global adapter, or the mean of those of the last rounds.

Letters: n rounds, P packed length, p numbers averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.config.schema import EvaluationConfig
from lorafair.model.adapter import PARTS, AdapterLayout, Part

RECENT = "recent"  # its name in a checkpoint


@dataclass
class RecentAdapters:
    """The averaged parts of the adapters of the last n rounds; the same on every rank. Training never reads them."""

    rows: Tensor  # (n, p): that of round t, from 1, is in row (t - 1) mod n

    @classmethod
    def at_start(cls, config: EvaluationConfig, layout: AdapterLayout, device: torch.device) -> RecentAdapters | None:
        """Before the first round; None where the last adapter alone counts."""
        rounds = config.average_rounds or 1
        if rounds == 1:
            return None
        return cls(torch.zeros(rounds, layout.length_of(averaged_parts(config)), device=device))

    def add(self, numbers: Tensor, completed_rounds: int) -> None:
        """The numbers (p,) of the round just completed; those of n rounds before go."""
        self.rows[(completed_rounds - 1) % len(self.rows)] = numbers

    def mean(self, completed_rounds: int) -> Tensor:
        """(p,) over the last n rounds, or over as many as there are."""
        return self.rows[:completed_rounds].mean(0, dtype=torch.float64).to(self.rows.dtype)


def averaged_parts(config: EvaluationConfig) -> tuple[Part, ...]:
    """What evaluation.average_parts names."""
    return PARTS if config.average_parts == "all" else ("head",)


def evaluated_adapter(
    config: EvaluationConfig, layout: AdapterLayout, adapter: Tensor, recent: RecentAdapters | None, rounds: int
) -> Tensor:
    """The packed adapter (P,) that is evaluated after so many rounds, from the global one and those of the last."""
    if recent is None or not rounds:
        return adapter
    return layout.replaced(adapter, averaged_parts(config), recent.mean(rounds))

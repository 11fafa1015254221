"""What is measured of a mechanism while it works: how much it clips, how long gradients are, how loud its noise is.

These numbers come from the data without noise. They are for the person who makes the experiment, not for release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorafair.model.adapter import PARTS, AdapterLayout, Part

_OF_PARTS = ("norm", "signal", "noise")  # sum of norms before clipping; squared norms of clipped sums, and of noise
MEASURES = ("images", "clipped", "norm", *(f"{what}/{part}" for what in _OF_PARTS for part in PARTS))
"""The columns of what a client measures in a round; all of them are sums over its steps."""


class Tally:
    """The measures of C clients (C, M), on a device."""

    def __init__(self, clients: int, device: torch.device) -> None:
        self.rows = torch.zeros(clients, len(MEASURES), device=device)

    def add(self, what: str, values: Tensor) -> None:
        """Add a number for each of the first c clients (c,)."""
        self.rows[: len(values), MEASURES.index(what)] += values


def measured_scalars(rows: Tensor) -> dict[str, float]:
    """The curves of a round from the measures (K, M) of its clients, by name.

    Parts without a gradient have none, and there is no ratio where there is no noise.
    """
    sums: dict[str, float] = dict(zip(MEASURES, rows.double().sum(0).tolist(), strict=True))
    images = max(sums["images"], 1.0)
    scalars = {"privacy/clip_fraction": sums["clipped"] / images, "privacy/norm": sums["norm"] / images}
    for part in PARTS:
        if sums[f"noise/{part}"] or sums[f"signal/{part}"]:
            scalars[f"privacy/norm/{part}"] = sums[f"norm/{part}"] / images
        if sums[f"noise/{part}"]:
            ratio = sums[f"signal/{part}"] / sums[f"noise/{part}"]
            scalars[f"privacy/signal_to_noise/{part}"] = math.sqrt(ratio)
    return scalars


def unmoved_parts(rows: Tensor, trained: Sequence[Part], layout: AdapterLayout) -> tuple[Part, ...]:
    """The parts that are trained and had no gradient at all in the round with these measures (K, M)."""
    signal = {part: float(rows[:, MEASURES.index(f"signal/{part}")].sum()) for part in trained}
    return tuple(part for part in trained if signal[part] == 0 and layout.length_of([part]))


class Watch:
    """Says once when a mechanism has been without use for many rounds in a row."""

    ROUNDS = 5  # in a row
    LOWEST_RATIO = 0.01  # of signal to noise

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}

    def lines(self, scalars: Mapping[str, float], unmoved: tuple[Part, ...] = ()) -> list[str]:
        """Warnings after a round with these curves, whose parts `unmoved` are as they were before it."""
        fraction = scalars.get("privacy/clip_fraction", 0.5)
        found = {
            "every contribution is clipped: all are longer than privacy.clip_norm, so only their directions count; "
            "privacy/norm says how long they are": fraction > 0.999,
            "nothing is clipped: privacy.clip_norm is above every contribution, and the noise grows with it; set a "
            "smaller one": fraction < 0.001,
        }
        for part in PARTS:
            ratio = scalars.get(f"privacy/signal_to_noise/{part}")
            found[
                f"the noise on {part} is over {1 / self.LOWEST_RATIO:g} times as large as its signal: what is trained "
                "is noise; use more units in a step, fewer parameters, or a larger privacy.epsilon"
            ] = ratio is not None and ratio < self.LOWEST_RATIO
            found[f"{part} is trained and has no gradient: what it becomes is noise"] = part in unmoved
        lines = []
        for line, holds in found.items():
            self._in_a_row[line] = self._in_a_row.get(line, 0) + 1 if holds else 0
            if self._in_a_row[line] == self.ROUNDS:
                lines.append(f"privacy: for {self.ROUNDS} rounds {line}")
        return lines

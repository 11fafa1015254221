"""Trimmed mean and median of every number of the factors and the head (Yin et al., ICML 2018, arXiv 1803.01498).

As published for the parameters of a model. Here the parameters are factors, whose basis is arbitrary, so that these two
depend on it; the defences on products do not. Clients keep their own numbers where these are among the middle ones, and
get the mean of the middle ones elsewhere: the plain mean of the result is the trimmed mean, and a method that looks at
products sees clients without their extreme numbers.

Letters: K clients of the round, P packed length, f clients that may lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.defences.base import ByEntry

_NUMBERS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class TrimmedMeanByEntry(ByEntry):
    """Of every number, the f largest and the f smallest are left out."""

    def trimmed(self, clients: int) -> int:
        """How many are left out on each side."""
        return self.suspects(clients)

    def rows(self, rows: Tensor) -> Tensor:
        """(K, P) with the mean of the middle numbers in the place of the others."""
        cut, result = self.trimmed(len(rows)), rows.clone()
        for block in result.split(max(1, _NUMBERS_AT_A_TIME // max(1, len(rows))), dim=1):
            values, order = block.sort(dim=0, stable=True)
            middle = values[cut : len(rows) - cut].double().mean(0).to(block)
            outside = torch.cat([order[:cut], order[len(rows) - cut :]])
            block.scatter_(0, outside, middle.expand(len(outside), -1))
        return result


@dataclass(frozen=True)
class MedianByEntry(TrimmedMeanByEntry):
    """Every number is its median over the clients; of an even number of them, the mean of the two in the middle."""

    def trimmed(self, clients: int) -> int:
        """All but the one or two in the middle."""
        return (clients - 1) // 2

    def rows(self, rows: Tensor) -> Tensor:
        """(K, P), the same row for all."""
        trimmed = super().rows(rows)
        return trimmed.double().mean(0).to(rows).expand_as(rows).clone()

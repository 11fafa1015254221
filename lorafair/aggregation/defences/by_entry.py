"""Trimmed mean and median of every number of the factors and the head (Yin et al., ICML 2018, arXiv 1803.01498).

As published for the parameters of a model. Here the parameters are factors, whose basis is arbitrary, so that these two
depend on it; the defences on products do not. Clients keep their own numbers where these are among the middle ones, and
get the mean of the middle ones elsewhere: the plain mean of the result is the trimmed mean, and a method that looks at
products sees clients without their extreme numbers.

Letters: K clients of the round, P packed length, f clients that may lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
            ordered = _in_order(block)  # (n, K)
            low, high = ordered[:, cut], ordered[:, len(rows) - 1 - cut]
            middle = ordered[:, cut : len(rows) - cut].double().mean(1).to(block)
            outside = (block < low) | (block > high)
            tied = outside.sum(0) != 2 * cut  # of equal numbers some are outside: their places decide
            block.copy_(torch.where(outside & ~tied, middle, block))
            if tied.any():
                columns = block[:, tied]
                order = columns.sort(dim=0, stable=True).indices
                columns.scatter_(
                    0, torch.cat([order[:cut], order[len(rows) - cut :]]), middle[tied].expand(2 * cut, -1)
                )
                block[:, tied] = columns
        return result


def _in_order(block: Tensor) -> Tensor:
    """The numbers of every column of (K, n) in ascending order, (n, K); NumPy sorts short rows 20 times as fast."""
    turned = block.T.contiguous()
    return turned.sort(dim=1).values if turned.is_cuda else torch.from_numpy(np.sort(turned.numpy(), axis=1))


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

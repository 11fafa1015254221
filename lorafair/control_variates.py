"""SCAFFOLD on adapters: every client corrects its gradient by what the others' gradients were (arXiv 1910.06378).

Letters: K clients of the round, N clients of the run, P packed length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.adapter import Part


@dataclass
class ControlVariates:
    """Estimates of the clients' gradients and of their weighted mean; the same on every rank."""

    server: Tensor  # (P,) c = Σ_k q_k c_k over all clients of the run
    clients: Tensor  # (N, P) c_k

    @classmethod
    def at_start(cls, clients: int, like: Tensor) -> ControlVariates:
        """Before the first round: all zero."""
        return cls(torch.zeros_like(like), torch.zeros(clients, len(like), dtype=like.dtype, device=like.device))

    def corrections(self, clients: Sequence[int]) -> Tensor:
        """What these clients add to their gradients, c − c_k, (C, P)."""
        return self.server - self.clients[list(clients)]

    def update(
        self,
        clients: Sequence[int],
        shares: Sequence[float],
        moved: Tensor,
        columns: Mapping[Part, slice],
        reaches: Mapping[Part, Sequence[float]],
    ) -> None:
        """Take in a round of K clients: c_k ← c_k − c + (x − y_k)/reach (option II), c ← c + Σ q_k (change of c_k).

        `moved` (K, P) is x − y_k, the clients' way from their start; `shares` (K,) are q_k, the clients' weights among
        all N (the paper's are 1/N); `columns` are those that were trained, and `reaches` how far a constant gradient of
        1 moves a parameter of that part in each client's steps: the paper's number of steps times the learning rate,
        and more with momentum.
        """
        index = torch.tensor(clients, device=moved.device)
        weights = torch.tensor(shares, dtype=moved.dtype, device=moved.device).unsqueeze(1)  # (K, 1)
        for part, span in columns.items():
            reach = torch.tensor(reaches[part], dtype=moved.dtype, device=moved.device).unsqueeze(1)  # (K, 1)
            change = moved[:, span] / reach - self.server[span]
            self.clients[index, span] += change
            self.server[span] += (weights * change).sum(0)

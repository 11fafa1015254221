"""SCAFFOLD on adapters: every client corrects its gradient by what the others' gradients were (arXiv 1910.06378).

Letters: K clients of the round, N clients of the run, P packed length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.model.adapter import Part


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
        return self.server - self.clients[torch.tensor(clients).to(self.clients.device, non_blocking=True)]

    def update(
        self,
        clients: Sequence[int],
        weights: Sequence[float],
        moved: Tensor,
        columns: Mapping[Part, slice],
        step_sizes: Mapping[Part, Sequence[float]],
    ) -> None:
        """Take in a round of K clients: c_k ← c_k − c + (x − y_k)/step size (option II), c ← c + Σ q_k (change of c_k).

        `moved` (K, P) is x − y_k, the clients' way from their start; `weights` (K,) are q_k, those of the clients among
        all N (the paper's are 1/N); `columns` are those that were trained, and `step_sizes` how far a constant gradient
        of 1 moves a parameter of that part in each client's steps: the paper's number of steps times the learning rate,
        and more with momentum.
        """
        index = torch.tensor(clients, device=moved.device)
        of_client = torch.tensor(weights, dtype=moved.dtype, device=moved.device).unsqueeze(1)  # (K, 1)
        for part, span in columns.items():
            step_size = torch.tensor(step_sizes[part], dtype=moved.dtype, device=moved.device).unsqueeze(1)  # (K, 1)
            change = moved[:, span] / step_size - self.server[span]
            self.clients[index, span] += change
            self.server[span] += (of_client * change).sum(0)

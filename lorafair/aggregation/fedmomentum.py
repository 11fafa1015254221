"""FedMomentum: the SVD of the average of the products, shared out to both factors, and the rest of it folded.

Letters: K clients, R LoRA rank, I in_features, O out_features, M singular values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import svd, weighted_sum
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors

_NOTHING = 1e-12  # of the largest singular value: what is smaller is rounding


@dataclass(frozen=True)
class FedMomentum(Aggregator):
    """ΔW = UΣVᵀ: B = U√Σ, A = √ΣVᵀ of the first R triples, the next ones folded (arXiv 2603.08014).

    The paper uses a randomised SVD, whose sketch has as many columns as ΔW has directions; here the SVD is exact.
    """

    decomposes: ClassVar[bool] = True

    energy: float = option(
        0.9999,
        "τ, the fraction of ‖ΔW‖² that is kept; triples beyond R are folded until it is reached.",
        at_least=0,
        at_most=1,
    )

    @property
    def folds(self) -> bool:
        """Always."""
        return True

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The first R triples as factors; the next, up to the energy, to merge.

        A direction without a singular value keeps the row of A that clients have: from zeros it could never be trained.
        """
        U, values, Vt = svd(weighted_sum(clients, weights))
        energies = values.square().cumsum(0)
        real = int((values > _NOTHING * values[0]).sum())  # triples that are more than rounding
        enough = min(int((energies < self.energy * energies[-1]).sum()) + 1, real)
        found = min(clients.rank, real)
        roots = values[:found].sqrt()
        A = Vt.new_zeros(clients.rank, Vt.shape[1]) if start is None else start.A.to(Vt, copy=True)
        B = torch.zeros(U.shape[0], clients.rank, dtype=U.dtype, device=U.device)
        A[:found], B[:, :found] = roots.unsqueeze(1) * Vt[:found], U[:, :found] * roots
        update = LayerUpdate(factors=LoRAFactors(A=A, B=B))
        if enough <= clients.rank:
            return update
        rest = slice(clients.rank, enough)
        folded = LoRAFactors(A=Vt[rest], B=U[:, rest] * values[rest])
        return LayerUpdate(factors=update.factors, folded=folded)

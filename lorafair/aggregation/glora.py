"""GLoRA: average the updates in the column space that the clients have most in common.

Letters: K clients, R LoRA rank, I in_features, O out_features, S server_rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.factor_algebra import add, blocks_of, first_triples, svd, weighted_sum
from lorafair.config.options import option
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class GLoRA(Aggregator):
    """ΔW projected on the S leading eigenvectors of Σ p_k P_k, where P_k projects on the columns of B_kA_k.

    It depends on the products B_kA_k alone, not on how clients factorise them. Where S reaches the dimension that all
    these columns span, it is the best approximation of rank R (arXiv 2605.06733; docs/howto/limits.md says what was
    available of the paper).
    """

    decomposes: ClassVar[bool] = True
    lora_initializations: ClassVar[tuple[str, ...]] = ("kaiming",)  # what is dropped would be a part of W0

    server_rank: int | None = option(
        None, "Dimension S of the common column space on the server; null: model.lora.rank.", at_least=1
    )

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """The first R singular triples of QQᵀΔW, B = UΣ and A = Vᵀ; a client of LoRA rank r uses the first r of them.

        Q (O, S) is the reference, and QᵀΔW (S, I) are the coordinates in it. Where S is below R, the other rows of A
        are those that clients have.
        """
        projectors = add(*(weighted_sum(_projectors(block), own) for block, own in blocks_of(clients, weights)))
        reference = svd(projectors)[0][:, : self.server_rank or clients.rank]
        ideal = weighted_sum(clients, weights)
        U, values, Vt = svd(LoRAFactors(A=(reference.mT @ ideal.B) @ ideal.A, B=reference))
        kept = min(clients.rank, len(values))
        return LayerUpdate(factors=first_triples(U, values, Vt, kept, clients.rank, None if start is None else start.A))


def _projectors(clients: LoRAFactors) -> LoRAFactors:
    """P_k = U_kU_kᵀ as products, A (K, R, O) and B (K, O, R), where U_k is an orthonormal basis of B_kA_k's columns."""
    left, left_core = torch.linalg.qr(clients.B.to(torch.float64))
    right_core = torch.linalg.qr(clients.A.to(torch.float64).mT, mode="r")[1]
    U, values, _ = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    rounding = values.amax(1, keepdim=True) * clients.B.shape[1] * torch.finfo(torch.float64).eps
    bases = (left @ U) * (values > rounding).unsqueeze(1)  # zero where the update has fewer than R directions
    return LoRAFactors(A=bases.mT, B=bases)

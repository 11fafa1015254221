"""What LoRA-FAIR needs beyond the mean: a second sum over clients, seen through the rows of the released mean of A.

With B_k = B0 + b_k and A_k = A0 + a_k, the aggregation bias is ΔR = S − b̄ā with S = Σ p_k b_k a_k. Let Q (I, r) be an
orthonormal basis of the rows of the released Ã. S·Q is a sum over clients whose terms are bounded because the b_k and
a_k are; docs/concepts/privacy_client.md proves it. Then ΔR·Q follows from what was released, and LoRA-FAIR never asks
for more of ΔR.

Letters: K clients, R LoRA rank, r its part that Ã has, I in_features, O out_features, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.config.schema import PrivacyConfig
from lorafair.model.adapter import LoRAFactors
from lorafair.privacy.clipped_updates import TOGETHER, Clipping

_CLIP = 0.3


def products_fraction(privacy: PrivacyConfig, layers: int) -> float:
    """The bound of the second release as a fraction of the largest norm.

    By default 0.3/√L: an update that is spread evenly over L layers has at most 1/√L of it, and 0.05 to 0.25 of that
    if A and B have several directions.
    """
    return min(1.0, _CLIP / math.sqrt(max(1, layers))) if privacy.products_clip is None else privacy.products_clip


def largest_norm(clipping: Clipping) -> float:
    """What ‖(b_k a_k Q of all layers)‖ cannot exceed: C²/2, or C_A·C_B with a bound for each part."""
    if TOGETHER in clipping.bounds:
        return clipping.bounds[TOGETHER] ** 2 / 2
    return clipping.bounds["A"] * clipping.bounds["B"]


def row_basis(A: Tensor) -> Tensor:
    """An orthonormal basis Q (I, r) of the rows of A (R, I), r = min(R, I)."""
    basis: Tensor = torch.linalg.qr(A.to(torch.float64).mT)[0]
    return basis


def seen_products(changes: LoRAFactors, basis: Tensor) -> Tensor:
    """b_k a_k Q of one layer (K, O, r), from clipped changes a (K, R, I) and b (K, O, R)."""
    return changes.B @ (changes.A @ basis)


@dataclass(frozen=True)
class ReleasedLayer:
    """What was released of one layer: the mean factors Ã (R, I), B̃ (O, R), and S·Q with its noise."""

    mean: LoRAFactors
    change: LoRAFactors  # ã, b̃: the mean less where the clients started
    basis: Tensor  # Q (I, r)
    products: Tensor  # (O, r)
    noise_std: float  # of each number of `products`

    def bias(self) -> Tensor:
        """ΔR·Q = S·Q − b̃ã·Q (O, r), shrunk towards zero, which is FedIT, by the noise known to be in S·Q."""
        return shrunk(self.products - self.change.B @ (self.change.A @ self.basis), self.noise_std)

    def pair(self) -> LoRAFactors:
        """Two clients of equal weight, A (2, R, I) and B (2, O, R), with the mean Ã, B̃ and the bias ΔR·Q·Qᵀ."""
        bias, A, B = self.bias(), self.mean.A, self.mean.B
        length = bias.norm().sqrt()
        size = torch.where(length > 0, length, 1.0)  # shared out to both factors
        right, left = torch.zeros_like(A), torch.zeros_like(B)
        found = self.basis.shape[1]
        right[:found], left[:, :found] = size * self.basis.mT, bias / size
        return LoRAFactors(A=torch.stack([A + right, A - right]), B=torch.stack([B + left, B - left]))


def shrunk(noisy: Tensor, noise_std: float) -> Tensor:
    """James and Stein's estimate, positive part: the noise's expected share of the squared norm is taken off."""
    square = noisy.square().sum()
    expected = noisy.numel() * noise_std**2
    return noisy * torch.where(square > expected, 1 - expected / torch.where(square > 0, square, 1.0), 0.0)


def paired(layers: Mapping[str, ReleasedLayer]) -> dict[str, LoRAFactors]:
    """The pairs of all layers by path."""
    return {path: layer.pair() for path, layer in layers.items()}

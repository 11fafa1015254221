"""How far the server's update is from the ideal one.

Letters: K clients, R LoRA rank, I in_features, O out_features, L adapted layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafair import third_party
from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.factor_algebra import (
    IdealUpdate,
    inner,
    split_ideal_update,
    square_of_sum,
    squared_norm,
)
from lorafair.model.adapter import AdapterState, LoRAFactors


def bias_metrics(clients: AdapterState, weights: Tensor, update: ServerUpdate) -> dict[str, Tensor]:
    """How far the server's update is from the ideal one, ΔW = Σ p_k B_k A_k: metric -> (L,) float64, layers in order.

    error_before, cosine_before: ‖ΔW − X‖/‖ΔW‖ and the cosine of ΔW and X, for X = B̄Ā (plain averaging of the factors).
    error_after, cosine_after: the same for what the method leaves the clients with, folded part included.
    norm_ratio, correction_ratio: ‖B'‖/‖B̄‖ and ‖B' − B̄‖/‖B̄‖; cosine alone does not show an inflated B.
    A ratio is 0 where its denominator is. Errors below about 1e-8, of float32 factors below 3e-4, may be rounding.
    Stays on the clients' device.
    """
    paths = list(clients.factors)
    if not paths:
        return {}
    clients, update = clients.with_cores_in_b(), replace(update, factors=update.adapter.with_cores_in_b().factors)
    ideals = [split_ideal_update(clients.factors[path], weights) for path in paths]
    new = [update.factors[path].to(torch.float64) for path in paths]
    layers = zip(ideals, new, (update.folded.get(path) for path in paths), strict=True)
    products = _Products(torch.stack([_inner_products(*layer) for layer in layers]))
    ideal_square = square_of_sum(products.square(_MEAN), products.inner(_MEAN, _BIAS), products.square(_BIAS))
    error_square = square_of_sum(products.square(_GAP), products.inner(_GAP, _BIAS), products.square(_BIAS))
    return {
        "error_before": _ratio(products.square(_BIAS), ideal_square).sqrt(),
        "error_after": _ratio(error_square, ideal_square).sqrt(),
        "cosine_before": products.cosine_with_ideal(_MEAN, ideal_square),
        "cosine_after": products.cosine_with_ideal(_APPLIED, ideal_square),
    } | _norm_ratios([ideal.mean.B for ideal in ideals], [factors.B for factors in new])


def _norm_ratios(mean_b: list[Tensor], new_b: list[Tensor]) -> dict[str, Tensor]:
    """‖B'‖/‖B̄‖ and ‖B' − B̄‖/‖B̄‖ of L layers."""
    size, new_size = third_party.norms_of(mean_b), third_party.norms_of(new_b)
    change = third_party.norms_of(third_party.differences_of(new_b, mean_b))
    return {"norm_ratio": _ratio(new_size, size), "correction_ratio": _ratio(change, size)}


_Sum = tuple[int, int, int, int, int, int]  # of the products that `_inner_products` lists, each with its sign
_MEAN: _Sum = (1, 0, 0, 0, 0, 0)
_APPLIED: _Sum = (0, 0, 0, 1, 0, 1)
_BIAS: _Sum = (0, 0, 0, 0, 1, 0)
_GAP: _Sum = (0, 1, 1, 0, 0, -1)  # B̄Ā − B'A' from differences of factors: close products would cancel


@dataclass(frozen=True)
class _Products:
    """Inner products of sums of the six matrices that `_inner_products` lists, layer by layer."""

    of_layers: Tensor  # (L, 6, 6)

    def inner(self, left: _Sum, right: _Sum) -> Tensor:
        """⟨left, right⟩, (L,)."""
        products = self.of_layers.flatten(1).unbind(1)  # 36 of (L,)
        terms = [a * b * products[6 * i + j] for i, a in enumerate(left) if a for j, b in enumerate(right) if b]
        return torch.stack(terms).sum(0)

    def square(self, of: _Sum) -> Tensor:
        """‖of‖², (L,): of terms that cancel, rounding may leave less than nothing."""
        return self.inner(of, of).clamp_min(0.0)

    def cosine_with_ideal(self, of: _Sum, ideal_square: Tensor) -> Tensor:
        """The cosine of a sum and ΔW, (L,)."""
        return _ratio(self.inner(_MEAN, of) + self.inner(_BIAS, of), (ideal_square * self.square(of)).sqrt())


def _inner_products(ideal: IdealUpdate, new: LoRAFactors, folded: LoRAFactors | None) -> Tensor:
    """⟨X, Y⟩ (6, 6) of B̄Ā, (B̄ − B')Ā, B'(Ā − A'), B'A', ΔR and the folded part. All of few ranks in one product."""
    mean, bias = ideal.mean, ideal.bias
    A = torch.cat([mean.A, mean.A, mean.A - new.A, new.A])  # (4R, I)
    B = torch.cat([mean.B, mean.B - new.B, new.B, new.B], dim=1)  # (O, 4R)

    def with_few(other: LoRAFactors) -> Tensor:
        return ((B.mT @ other.B) * (A @ other.A.mT)).view(4, -1).sum(1)

    few = ((B.mT @ B) * (A @ A.mT)).view(4, mean.rank, 4, mean.rank).sum((1, 3))
    bias_square = ideal.bias_square()
    if folded is None:
        edge = torch.stack([with_few(bias), few.new_zeros(4)])
        corner = torch.stack([bias_square, *few.new_zeros(3).unbind()])
    else:
        merged = folded.to(torch.float64)
        edge, cross = torch.stack([with_few(bias), with_few(merged)]), inner(merged, bias)
        corner = torch.stack([bias_square, cross, cross, squared_norm(merged)])
    return torch.cat([torch.cat([few, edge.mT], dim=1), torch.cat([edge, corner.view(2, 2)], dim=1)])


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)

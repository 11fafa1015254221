"""What a correction of the averaged factors minimises: S(ΔW, BA) + λ_A‖A − Ā‖² + λ_B‖B − B̄‖².

S depends on h = ⟨ΔW, BA⟩ and ν = ‖BA‖² alone, of the flattened matrices or of each of their I columns, so value and
gradient cost a few products with factors; no (O, I) matrix is formed.

Letters: K clients, R LoRA rank, I in_features, O out_features, N = K·R.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorafair.aggregation.factor_algebra import mean_factors, squared_norm, squared_row_norms, transpose, weighted_sum
from lorafair.model.adapter import LoRAFactors

Similarity = Literal["cosine", "cosine_columns", "frobenius"]
Residual = Literal["B", "A", "both"]


@dataclass(frozen=True)
class LayerObjective:
    """The objective of one layer, in float64; callable."""

    similarity: Similarity
    ideal: LoRAFactors  # ΔW, A (N, I), B (O, N)
    ideal_square: Tensor  # ‖ΔW‖², () or of each column (I,)
    mean: LoRAFactors  # Ā (R, I), B̄ (O, R)
    penalty_a: Tensor  # λ_A, ()
    penalty_b: Tensor  # λ_B, ()

    def __call__(self, factors: LoRAFactors) -> Tensor:
        """The value at A (R, I), B (O, R), a scalar tensor. The cosine with a zero matrix or column is 0."""
        return self._value(factors, *self._products(factors))

    def gradient(self, factors: LoRAFactors) -> LoRAFactors:
        """The derivatives in A (R, I) and B (O, R)."""
        return self.value_and_gradient(factors)[1]

    def value_and_gradient(self, factors: LoRAFactors) -> tuple[Tensor, LoRAFactors]:
        """Both, for little more than one of them."""
        A, B = factors.A, factors.B
        cross, image = self._times_ideal(B), (B.mT @ B) @ A  # the large products
        h, nu = self._total(A * cross), self._total(A * image).clamp(min=0)
        by_h, by_nu, _, _ = self._slopes(h, nu)
        slope = LoRAFactors(
            A=cross * by_h + 2 * image * by_nu + 2 * self.penalty_a * (A - self.mean.A),
            B=self._ideal_times(A * by_h) + 2 * B @ (A * by_nu @ A.mT) + 2 * self.penalty_b * (B - self.mean.B),
        )
        return self._value(factors, h, nu), slope

    def hessian(self, factors: LoRAFactors) -> Callable[[LoRAFactors], LoRAFactors]:
        """The derivative of the gradient at `factors` along a change of both factors."""
        A, B, (h, nu) = factors.A, factors.B, self._products(factors)
        by_h, by_nu, by_h_nu, by_nu_nu = self._slopes(h, nu)
        cross, gram = self._times_ideal(B), B.mT @ B

        def along(change: LoRAFactors) -> LoRAFactors:
            dA, dB = change.A, change.B
            d_cross, d_gram = self._times_ideal(dB), dB.mT @ B + B.mT @ dB
            d_h = self._total(dA * cross + A * d_cross)
            d_nu = self._total(A * (d_gram @ A) + 2 * dA * (gram @ A))
            d_by_h, d_by_nu = by_h_nu * d_nu, by_h_nu * d_h + by_nu_nu * d_nu
            d_outer = dA * by_nu @ A.mT + A * by_nu @ dA.mT + A * d_by_nu @ A.mT
            d_norm_a = (d_gram @ A + gram @ dA) * by_nu + gram @ A * d_by_nu
            d_norm_b = dB @ (A * by_nu @ A.mT) + B @ d_outer
            return LoRAFactors(
                A=d_cross * by_h + cross * d_by_h + 2 * d_norm_a + 2 * self.penalty_a * dA,
                B=self._ideal_times(dA * by_h + A * d_by_h) + 2 * d_norm_b + 2 * self.penalty_b * dB,
            )

        return along

    def curvature(self, factors: LoRAFactors) -> Tensor:
        """The order of the second derivative of S in the entries of BA, () or for each column (I,)."""
        _, nu = self._products(factors)
        if self.similarity == "frobenius":
            return torch.full_like(nu, 2.0)
        return torch.where(nu > 0, 1 / torch.where(nu > 0, nu, 1.0), 0.0) / nu.numel()

    def _value(self, factors: LoRAFactors, h: Tensor, nu: Tensor) -> Tensor:
        if self.similarity == "frobenius":
            distance = self.ideal_square - 2 * h + nu
        else:
            distance = 1 - (h * self._inverse_norms(nu)).mean()
        change_a, change_b = (factors.A - self.mean.A).square().sum(), (factors.B - self.mean.B).square().sum()
        return distance + self.penalty_a * change_a + self.penalty_b * change_b

    def _times_ideal(self, B: Tensor) -> Tensor:
        """BᵀΔW, (R, I)."""
        return (B.mT @ self.ideal.B) @ self.ideal.A

    def _ideal_times(self, A: Tensor) -> Tensor:
        """ΔWAᵀ, (O, R)."""
        return self.ideal.B @ (self.ideal.A @ A.mT)

    def _products(self, factors: LoRAFactors) -> tuple[Tensor, Tensor]:
        """⟨ΔW, BA⟩ and ‖BA‖², () or of each column (I,)."""
        A, B = factors.A, factors.B
        return self._total(A * self._times_ideal(B)), self._total(A * ((B.mT @ B) @ A)).clamp(min=0)

    def _total(self, terms: Tensor) -> Tensor:
        """The sum over (R, I), or over R."""
        return terms.sum(0) if self.similarity == "cosine_columns" else terms.sum()

    def _slopes(self, h: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """∂S/∂h, ∂S/∂ν, ∂²S/∂h∂ν and ∂²S/∂ν²; ∂²S/∂h² is 0."""
        if self.similarity == "frobenius":
            return torch.full_like(h, -2.0), torch.ones_like(nu), torch.zeros_like(h), torch.zeros_like(h)
        inverse = self._inverse_norms(nu) / h.numel()
        per_nu = inverse / (2 * torch.where(nu > 0, nu, 1.0))
        return -inverse, h * per_nu, per_nu, -1.5 * h * per_nu / torch.where(nu > 0, nu, 1.0)

    def _inverse_norms(self, nu: Tensor) -> Tensor:
        defined = (self.ideal_square > 0) & (nu > 0)
        return torch.where(defined, torch.where(defined, self.ideal_square * nu, 1.0).rsqrt(), 0.0)


def layer_objective(
    clients: LoRAFactors, weights: Tensor, *, similarity: Similarity, regularization: float
) -> LayerObjective:
    """The objective of a layer from its clients' A (K, R, I), B (K, O, R) and weights (K,)."""
    mean, ideal = mean_factors(clients, weights), weighted_sum(clients, weights)
    by_column = similarity == "cosine_columns"
    return LayerObjective(
        similarity=similarity,
        ideal=ideal,
        ideal_square=squared_row_norms(transpose(ideal)) if by_column else squared_norm(ideal),
        mean=mean,
        penalty_a=penalty_of_b(transpose(mean), similarity=similarity, regularization=regularization),
        penalty_b=penalty_of_b(mean, similarity=similarity, regularization=regularization),
    )


def penalty_of_b(mean: LoRAFactors, *, similarity: Similarity, regularization: float) -> Tensor:
    """λ_B from the mean factors, a scalar tensor; λ_A from the transposed ones.

    The regularisation itself for the cosine. For the Frobenius similarity λ tr(ĀĀᵀ)/R, so that it does not depend on
    the scale of the factors.
    """
    if similarity == "frobenius":
        return regularization * mean.A.square().sum() / mean.rank
    return mean.A.new_full((), regularization)

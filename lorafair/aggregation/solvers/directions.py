"""One factor corrected in the eigenbasis of the other's Gram matrix: two numbers for each of R directions.

With D = ΔR Āᵀ and ĀĀᵀ = U diag(e) Uᵀ, the minimiser of S(ΔW, (B̄ + ΔB)Ā) + λ‖ΔB‖² and every iterate of gradient
descent have the columns ΔBu_r = x_r B̄u_r + y_r Du_r. So what is solved is a batch of small problems in the R-vectors
e_r, ‖B̄u_r‖², ⟨B̄u_r, Du_r⟩ and ‖Du_r‖²: one problem a layer, or one a row where the similarity is taken row by row.

Letters: R LoRA rank, N problems, S scales tried.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.factor_algebra import square_of_sum

SCALES = 72  # log-spaced values of ‖XĀ‖ tried, from _SMALLEST_SCALE to 1 times its upper bound
_SMALLEST_SCALE = 1e-9
_SECULAR_STEPS = 10  # Newton from a bound within √R of the root: 8 leave 1e-7, 10 leave rounding
_SECTIONS = 64  # into which the interval of a scale is cut, again and again
_CUT_STEPS = (10, 5, 3, 2, 2, 2, 2, 2)  # of Newton from a root of the interval before, closer with every cut
# Below it, rounding of the cosine drowns the penalty, which alone decides the scale of X. The minimiser is here next to
# its limit for λ → 0, and not next to X = 0.
_LEAST_PENALTY = 1e-14


@dataclass(frozen=True)
class Problems:
    """N problems min over X of weight·S(ΔW, X) + penalty·‖X − B̄‖², in the eigenbasis of ĀĀᵀ."""

    eigenvalues: Tensor  # (N, R), 0 where Ā does not see the direction
    mean: Tensor  # (N, R), ‖B̄u_r‖²
    overlap: Tensor  # (N, R), ⟨B̄u_r, Du_r⟩
    bias: Tensor  # (N, R), ‖Du_r‖²
    residual: Tensor  # (N,), ‖ΔR‖²
    weight: Tensor  # (N,)
    penalty: Tensor  # (N,)

    def ideal_square(self) -> Tensor:
        """‖ΔW‖², (N,)."""
        return square_of_sum((self.eigenvalues * self.mean).sum(-1), self.overlap.sum(-1), self.residual)

    def product(self, x: Tensor, y: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
        """⟨xB̄u_r + yDu_r, x₂B̄u_r + y₂Du_r⟩ for every direction, (..., N, R)."""
        return x * x2 * self.mean + (x * y2 + y * x2) * self.overlap + y * y2 * self.bias

    def split(self, size: int) -> list[Problems]:
        """The problems in chunks of `size`."""
        columns = [torch.split(getattr(self, field.name), size) for field in dataclasses.fields(self)]
        return [Problems(*chunk) for chunk in zip(*columns, strict=True)]

    @staticmethod
    def concatenate(parts: Sequence[Problems]) -> Problems:
        """All problems of `parts`, in their order."""
        return Problems(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Problems)))


@dataclass(frozen=True)
class Correction:
    """ΔB u_r = along_mean_r · B̄u_r + along_bias_r · Du_r."""

    along_mean: Tensor  # (..., N, R)
    along_bias: Tensor  # (..., N, R)


def solve_frobenius(problems: Problems) -> Correction:
    """The minimiser of ‖ΔW − XĀ‖² + μ‖X − B̄‖², ΔB = D(ĀĀᵀ + μI)⁻¹; for μ = 0 the one of least norm."""
    curvature = problems.eigenvalues + problems.penalty.unsqueeze(-1)
    solvable = problems.eigenvalues > 0
    along_bias = torch.where(solvable, 1 / torch.where(solvable, curvature, 1.0), 0.0)
    return Correction(torch.zeros_like(along_bias), along_bias)


def solve_cosine(problems: Problems) -> Correction:
    """The global minimiser of 1 − cos(ΔW, XĀ) + λ‖X − B̄‖².

    Where λ‖B̄‖² = 0 the scale is free and the least-squares solution is taken; where it is below 1e-14, it counts as
    1e-14. Never worse than ΔB = 0, which is kept where ΔW = 0. Where the infimum is only approached as X shrinks to 0
    (⟨ΔW, B̄Ā⟩ < 0 and a small λ), X stops at about 1e-9 of B̄. No step depends on the data, so nothing waits for the
    device.
    """
    largest, size = problems.eigenvalues.amax(-1), problems.mean.sum(-1)
    largest, size = _or_one(largest), _or_one(size)
    unit = _rescale(problems, largest, size)
    free = (problems.penalty == 0) | (problems.mean.sum(-1) == 0)
    penalty = torch.where(free, 1.0, unit.penalty.clamp(min=_LEAST_PENALTY))
    searched = _search_scales(dataclasses.replace(unit, penalty=penalty))
    fitted = solve_frobenius(dataclasses.replace(unit, penalty=torch.zeros_like(unit.penalty)))
    best = Correction(
        torch.where(free.unsqueeze(-1), fitted.along_mean, searched.along_mean),
        torch.where(free.unsqueeze(-1), fitted.along_bias, searched.along_bias),
    )
    nothing = Correction(torch.zeros_like(unit.mean), torch.zeros_like(unit.mean))
    useful = (cosine_loss(unit, best) <= cosine_loss(unit, nothing)) & (unit.ideal_square() > 0)
    return Correction(
        torch.where(useful.unsqueeze(-1), best.along_mean, 0.0),
        torch.where(useful.unsqueeze(-1), best.along_bias / largest.unsqueeze(-1), 0.0),
    )


def rescaled(problems: Problems, correction: Correction) -> Correction:
    """The correction of one layer after which X is as long as ΔW is in its direction: X times ⟨ΔW, XĀ⟩/‖XĀ‖².

    With a cosine that is no smaller than that of B̄Ā, ‖ΔW − XĀ‖ is then no larger than without any correction: where
    ⟨ΔW, XĀ⟩ is not positive, there is none. `problems` are those of the layer, one or one a row.
    """
    x, y = 1 + correction.along_mean, correction.along_bias
    square = (problems.eigenvalues * problems.product(x, y, x, y)).sum()
    along = problems.product(x, y, problems.eigenvalues, torch.ones_like(y)).sum()  # Mu_r = e_rB̄u_r + Du_r
    opposed = along <= 0  # not a descent that has diverged: its NaN are to be seen
    scale = along / torch.where(opposed, 1.0, square)
    return Correction(torch.where(opposed, 0.0, scale * x - 1), torch.where(opposed, 0.0, scale * y))


def cosine_loss(problems: Problems, correction: Correction) -> Tensor:
    """1 − cos(ΔW, XĀ) + (penalty / weight)‖X − B̄‖², (..., N); the cosine with a zero matrix is 0.

    As ‖ΔW − cXĀ‖² / 2‖ΔW‖² with c = ‖ΔW‖/‖XĀ‖, which keeps its digits where the cosine is close to 1.
    """
    x, y = 1 + correction.along_mean, correction.along_bias
    square = (problems.eigenvalues * problems.product(x, y, x, y)).sum(-1)
    ideal = problems.ideal_square()
    defined = (square > 0) & (ideal > 0)
    c = torch.where(defined, ideal / torch.where(defined, square, 1.0), 0.0).sqrt().unsqueeze(-1)
    u, v = 1 - c * x, -c * y  # B̄ − cX
    gap = (problems.eigenvalues * problems.product(u, v, u, v)).sum(-1)
    gap = gap + 2 * (u * problems.overlap + v * problems.bias).sum(-1) + problems.residual
    distance = torch.where(defined, gap / (2 * torch.where(defined, ideal, 1.0)), 1.0)
    change = problems.product(correction.along_mean, y, correction.along_mean, y).sum(-1)
    return distance + problems.penalty / problems.weight * change


def _or_one(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)


def _rescale(problems: Problems, largest: Tensor, size: Tensor) -> Problems:
    """The same problems with ‖B̄‖ = 1, largest eigenvalue 1 and weight 1: only λ‖B̄‖² matters."""
    column, scale = largest.unsqueeze(-1), size.unsqueeze(-1)
    return Problems(
        eigenvalues=problems.eigenvalues / column,
        mean=problems.mean / scale,
        overlap=problems.overlap / (column * scale),
        bias=problems.bias / (column.square() * scale),
        residual=problems.residual / (largest * size),
        weight=torch.ones_like(problems.weight),
        penalty=problems.penalty / problems.weight * size,
    )


def _search_scales(unit: Problems) -> Correction:
    """Minimise over the scale s = ‖XĀ‖, for each of which `_solve_at_scale` knows the best X.

    That minimum as a function of s has the slope 2λ⟨X, X − B̄⟩/s, whose sign does not suffer from a small λ. At an
    optimum ⟨X, X − B̄⟩ = 0, hence ‖X‖ ≤ ‖B̄‖ and s ≤ 1. A coarse search finds the valley, finer ones in it its bottom.
    """
    scales = torch.logspace(
        math.log10(_SMALLEST_SCALE), 0, SCALES, dtype=unit.mean.dtype, device=unit.mean.device
    )  # (S,)
    tried, roots = _solve_at_scale(unit, scales.unsqueeze(-1), _SECULAR_STEPS)
    best = cosine_loss(unit, tried).argmin(0)  # (N,)
    rising = _slope_sign(unit, tried).gather(0, best.unsqueeze(0)).squeeze(0) > 0
    first = torch.where(rising, best - 1, best).clamp(min=0)
    last = torch.where(rising, best, best + 1).clamp(max=SCALES - 1)
    low, high = scales.take(first), scales.take(last)
    root = roots.squeeze(-1).gather(0, last.unsqueeze(0))  # (1, N)
    places = torch.arange(_SECTIONS + 1, dtype=low.dtype, device=low.device).unsqueeze(-1) / _SECTIONS  # (S, 1)
    for steps in _CUT_STEPS:
        cuts = low * (high / low) ** places  # (S, N), with both ends
        inner, roots = _solve_at_scale(unit, cuts.narrow(0, 1, _SECTIONS - 1), steps, root.unsqueeze(-1))
        rises = _slope_sign(unit, inner) > 0
        falling = rises.logical_not().long().cumprod(0).sum(0, keepdim=True)  # (1, N) cuts before the first that rises
        low, high = cuts.gather(0, falling).squeeze(0), cuts.gather(0, falling + 1).squeeze(0)
        root = torch.cat([roots.squeeze(-1), root]).gather(0, falling)
    found, _ = _solve_at_scale(unit, (low * high).sqrt(), _CUT_STEPS[-1], root.squeeze(0).unsqueeze(-1))
    return found


def _slope_sign(unit: Problems, correction: Correction) -> Tensor:
    """⟨X, X − B̄⟩, (..., N)."""
    x, y = correction.along_mean, correction.along_bias
    return unit.product(1 + x, y, x, y).sum(-1)


def _solve_at_scale(unit: Problems, scale: Tensor, steps: int, near: Tensor | None = None) -> tuple[Correction, Tensor]:
    """The best X with ‖XĀ‖ = s, for `scale` (N,), (S, 1) or (S, N), and the root q (..., N, 1) it belongs to.

    Xu_r = (α Mu_r + B̄u_r)/(1 + τe_r) with M = ΔWĀᵀ, α = 1/(2λ‖ΔW‖s) and the multiplier τ > −1 that gives X its scale:
    Σ e_r‖αMu_r + B̄u_r‖²/(1 + τe_r)² = s², as in a trust-region step. With q = 1 + τ, the reciprocal root of the left
    side is concave and increasing in q, so Newton's method rises to the root from any lower bound, which it reaches in
    one step from above. Here e_r ≤ 1. `near` (..., N, 1) is where to start, such as the root of a scale close by.
    """
    e = unit.eigenvalues
    alpha = (1 / (2 * unit.penalty * _or_one(unit.ideal_square()).sqrt() * scale)).unsqueeze(-1)
    target = (1 / scale).unsqueeze(-1)
    along = alpha * e + 1
    weight = (e * unit.product(along, alpha, along, alpha)).clamp(min=0)  # (..., N, R)
    seen = e > 0
    tiny = torch.finfo(e.dtype).tiny
    flat = 1 - e
    bound = torch.where(seen, (weight.sqrt() * target - flat) / torch.where(seen, e, 1.0), 0.0)
    least = bound.amax(-1, keepdim=True).clamp(min=tiny)  # each term alone stays below s²
    q = least if near is None else torch.maximum(near, least)
    for _ in range(steps):
        spread = torch.addcmul(flat, q, e)
        terms = weight / spread.square()
        total, slope = terms.sum(-1, keepdim=True), (terms * e / spread).sum(-1, keepdim=True)
        q = torch.maximum(q + total * (total.sqrt() * target - 1) / slope.clamp(min=tiny), least)
    spread = torch.addcmul(flat, q, e)
    return Correction(
        along_mean=(alpha - (q - 1)) * e / spread,
        along_bias=torch.where(seen, alpha / spread, 0.0),
    ), q


def descend(problems: Problems, *, cosine: bool, steps: int, learning_rate: float) -> Correction:
    """The iterate after `steps` of gradient descent from ΔB = 0, for the cosine or the Frobenius objective.

    The same numbers, up to rounding, as descending on the dense (O, I) matrices.
    """
    e, penalty, weight = problems.eigenvalues, problems.penalty.unsqueeze(-1), problems.weight.unsqueeze(-1)
    norm = problems.ideal_square().sqrt()
    x, y = torch.zeros_like(e), torch.zeros_like(e)
    pull = push = torch.full_like(weight, 2.0)  # the gradient in X is push·XĀĀᵀ − pull·M
    for _ in range(steps):
        if cosine:
            pull, push = _cosine_gradient(problems, Correction(x, y), norm)
        x_step = weight * e * (push * (1 + x) - pull) + 2 * penalty * x
        y_step = weight * (push * e * y - pull) + 2 * penalty * y
        x, y = x - learning_rate * x_step, y - learning_rate * y_step
    return Correction(x, torch.where(e > 0, y, 0.0))


def descend_rows(problems: Problems, *, steps: int, learning_rate: float) -> Correction:
    """`descend` for problems of a single row each, under the cosine: B̄u_r and Du_r are then numbers b_r and d_r.

    What moves is the number z_r = Xu_r itself. In two coefficients of b_r and d_r, what cancels in z_r would drown a
    row that passes zero, where the step is divided by its length.
    """
    e, weight, penalty = problems.eigenvalues, problems.weight.unsqueeze(-1), problems.penalty.unsqueeze(-1)
    b = problems.mean.sqrt()
    d = torch.where(b > 0, problems.overlap / torch.where(b > 0, b, 1.0), problems.bias.sqrt())
    ideal, norm, z = e * b + d, problems.ideal_square().sqrt().unsqueeze(-1), b  # ideal: Mu_r
    for _ in range(steps):
        square = (e * z * z).sum(-1, keepdim=True)
        defined = (square > 0) & (norm > 0)
        pull = torch.where(defined, 1 / torch.where(defined, norm * square.sqrt(), 1.0), 0.0)
        push = pull * (z * ideal).sum(-1, keepdim=True) / torch.where(defined, square, 1.0)
        z = z - learning_rate * (weight * (push * e * z - pull * ideal) + 2 * penalty * (z - b))
    along_b = b >= d.abs()
    change = torch.where(e > 0, z - b, 0.0) / torch.where(along_b, torch.where(b > 0, b, 1.0), d)
    return Correction(torch.where(along_b, change, 0.0), torch.where(along_b, 0.0, change))


def _cosine_gradient(problems: Problems, correction: Correction, norm: Tensor) -> tuple[Tensor, Tensor]:
    """1/(ws) and cos/s², each (N, 1): the gradient of 1 − cos in X is (cos/s²)XĀĀᵀ − M/(ws)."""
    x, y = 1 + correction.along_mean, correction.along_bias
    square = (problems.eigenvalues * problems.product(x, y, x, y)).sum(-1)
    along = problems.product(x, y, problems.eigenvalues, torch.ones_like(y)).sum(-1)  # ⟨X, M⟩, as Mu_r = e_rB̄u_r + Du_r
    defined = (square > 0) & (norm > 0)
    pull = torch.where(defined, 1 / torch.where(defined, norm * square.sqrt(), 1.0), 0.0)
    push = torch.where(defined, pull * along / torch.where(defined, square, 1.0), 0.0)
    return pull.unsqueeze(-1), push.unsqueeze(-1)

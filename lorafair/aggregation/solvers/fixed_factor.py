"""Correct B of every layer while A stays the clients' mean, without a matrix larger than a factor.

To correct A with B fixed, transpose the layers.

Letters: K clients, R LoRA rank (the largest of the layers), I in_features, O out_features, L layers, N problems (L, or
the sum of O over layers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafair.aggregation.factor_algebra import split_ideal_update, squared_row_norms
from lorafair.aggregation.solvers.directions import SCALES, Correction, Problems, rescaled
from lorafair.model.adapter import LoRAFactors

_CHUNK = 2**21  # numbers in the largest temporary of a solver, (SCALES, N, R)


def correct_b(
    layers: Mapping[str, LoRAFactors],
    weights: Tensor,
    solve: Callable[[Problems], Correction],
    *,
    penalty: Callable[[LoRAFactors], Tensor],
    by_row: bool,
    rescales: Mapping[str, Tensor] | None = None,
) -> dict[str, LoRAFactors]:
    """(Ā, B̄ + ΔB) of every layer, all layers solved in one batch.

    `layers` holds A (K, R, I) and B (K, O, R), `penalty` gives λ from a layer's mean factors, `by_row` takes the
    similarity as the mean over the rows of (O, I), and `rescales` says, a scalar tensor a layer, whether B̄ + ΔB is then
    made as long as fits best (none). Needs one eigendecomposition, which waits for a CUDA device once.
    """
    parts = [_project(factors, weights, by_row=by_row) for factors in layers.values()]
    width = max(part.mean.rank for part in parts)
    grams = [part.mean.A @ part.mean.A.mT for part in parts]
    grams = [pad(gram, (0, width - len(gram), 0, width - len(gram))) for gram in grams]
    eigenvalues, bases = torch.linalg.eigh(torch.stack(grams))  # (L, R), (L, R, R)
    turned = [
        (pad(part.mean.B, (0, width - part.mean.rank)) @ basis, pad(part.pulled, (0, width - part.mean.rank)) @ basis)
        for part, basis in zip(parts, bases, strict=True)
    ]  # (B̄U, DU) of every layer, each (O, R)
    problems = [
        _pose(e, mean, pulled, part.residual, penalty(part.mean))
        for e, (mean, pulled), part in zip(eigenvalues, turned, parts, strict=True)
    ]
    found = _solve_in_chunks(Problems.concatenate(problems), solve)

    counts = [len(part.residual) for part in parts]
    along_mean, along_bias = torch.split(found.along_mean, counts), torch.split(found.along_bias, counts)
    corrected = {}
    for path, part, basis, (mean, pulled), problem, x, y in zip(
        layers, parts, bases, turned, problems, along_mean, along_bias, strict=True
    ):
        if rescales is not None:
            fitted = rescaled(problem, Correction(x, y))
            x = torch.where(rescales[path], fitted.along_mean, x)
            y = torch.where(rescales[path], fitted.along_bias, y)
        change = ((x * mean + y * pulled) @ basis.mT).narrow(1, 0, part.mean.rank)
        corrected[path] = LoRAFactors(A=part.mean.A, B=part.mean.B + change)
    return corrected


@dataclass(frozen=True)
class _Projection:
    mean: LoRAFactors
    pulled: Tensor  # D = ΔR Āᵀ, (O, R)
    residual: Tensor  # ‖ΔR‖² of the layer (1,) or of every row (O,)


def _project(clients: LoRAFactors, weights: Tensor, *, by_row: bool) -> _Projection:
    ideal = split_ideal_update(clients, weights)
    residual = squared_row_norms(ideal.bias) if by_row else ideal.bias_square().unsqueeze(0)
    return _Projection(mean=ideal.mean, pulled=ideal.bias.B @ (ideal.bias.A @ ideal.mean.A.mT), residual=residual)


def _pose(eigenvalues: Tensor, mean: Tensor, pulled: Tensor, residual: Tensor, penalty: Tensor) -> Problems:
    """The problems of one layer: one, or as many as `residual` has rows."""
    count, rank = len(residual), len(eigenvalues)
    seen = eigenvalues > rank * torch.finfo(torch.float64).eps * eigenvalues.amax()
    pulled = torch.where(seen, pulled, 0.0)

    def sum_rows(squares: Tensor) -> Tensor:
        return squares if count == len(mean) else squares.sum(0, keepdim=True)

    return Problems(
        eigenvalues=torch.where(seen, eigenvalues, 0.0).expand(count, rank),
        mean=sum_rows(mean.square()),
        overlap=sum_rows(mean * pulled),
        bias=sum_rows(pulled.square()),
        residual=residual,
        weight=torch.full_like(residual, 1 / count),
        penalty=penalty.expand(count),
    )


def _solve_in_chunks(problems: Problems, solve: Callable[[Problems], Correction]) -> Correction:
    size = max(1, _CHUNK // (SCALES * problems.eigenvalues.shape[1]))
    parts = [solve(chunk) for chunk in problems.split(size)]
    return Correction(torch.cat([p.along_mean for p in parts]), torch.cat([p.along_bias for p in parts]))

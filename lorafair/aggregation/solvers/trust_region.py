"""Local minimisation of a smooth function: trust-region Newton with conjugate gradients (Steihaug 1983).

Letters: N unknowns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NOISE = 100 * torch.finfo(torch.float64).eps  # rounding of a function value of order 1
_ACCEPT, _SHRINK, _GROW = 1e-4, 0.25, 0.75  # ratios of actual to predicted decrease


def minimize(
    value: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Callable[[Tensor], Tensor]],
    start: Tensor,
    *,
    tolerance: float = 1e-14,
    iterations: int = 300,
) -> Tensor:
    """A local minimiser (N,) reached from `start` (N,) without ever going up by more than rounding.

    `hessian` gives, for a point, the product with a direction. The function should be of order 1, as rounding decides
    when to stop: at a gradient norm of `tolerance`, or once a step changes the value by rounding only and no longer
    shrinks the gradient.
    """
    point, height, slope = start, float(value(start)), gradient(start)
    radius = 1.0
    for _ in range(iterations):
        if slope.norm() <= tolerance:
            break
        step, predicted = _steihaug(hessian(point), slope, radius)
        new_height, new_slope = float(value(point + step)), gradient(point + step)
        # Noise added to both decreases lets a step be taken that is too small for the values to judge.
        noise = _NOISE * max(1.0, abs(height))
        if predicted < noise and not new_slope.norm() < slope.norm():
            break
        ratio = (height - new_height + noise) / (predicted + noise)
        if not ratio >= _SHRINK:
            radius = 0.25 * float(step.norm())
        elif ratio > _GROW and step.norm() > 0.9 * radius:
            radius *= 2
        if ratio > _ACCEPT:
            point, height, slope = point + step, new_height, new_slope
    return point


def _steihaug(hessian: Callable[[Tensor], Tensor], gradient: Tensor, radius: float) -> tuple[Tensor, float]:
    """A step of at most `radius` that decreases the quadratic model, and by how much it does."""
    step, curved = torch.zeros_like(gradient), torch.zeros_like(gradient)  # curved = Hessian · step
    residual, direction = -gradient, -gradient
    square = residual @ residual
    target = square * min(0.01, float(square))  # a relative residual of min(0.1, ‖g‖): quadratic convergence
    for _ in range(2 * len(gradient)):
        bent = hessian(direction)
        curvature = direction @ bent
        length = square / curvature
        if curvature <= 0 or (step + length * direction).norm() >= radius:
            length = _to_boundary(step, direction, radius)
            step, curved = step + length * direction, curved + length * bent
            break
        step, curved = step + length * direction, curved + length * bent
        residual = residual - length * bent
        previous, square = square, residual @ residual
        if square <= target:
            break
        direction = residual + (square / previous) * direction
    return step, -float(gradient @ step + 0.5 * step @ curved)


def _to_boundary(step: Tensor, direction: Tensor, radius: float) -> Tensor:
    """The positive t with ‖step + t·direction‖ = radius."""
    a, b, c = direction @ direction, step @ direction, step @ step - radius**2
    return (-b + (b * b - a * c).clamp(min=0).sqrt()) / a

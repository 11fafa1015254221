"""Noise: standard normal from either source, repeatable from a seed alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lorafair.privacy.gaussian import GaussianNoise


@pytest.mark.parametrize("seed", [3, None])
def test_numbers_are_standard_normal(seed: int | None) -> None:
    drawn = GaussianNoise(seed).draw([200, 501], 0, "A")
    assert drawn.shape == (200, 501)
    assert drawn.dtype == torch.float64
    numbers = drawn.flatten().numpy()
    count = len(numbers)
    assert abs(numbers.mean()) < 5 / math.sqrt(count)
    assert abs(numbers.var() - 1) < 5 * math.sqrt(2 / count)
    assert stats.kstest(numbers, "norm").pvalue > 1e-5
    assert abs((drawn[:, :-1] * drawn[:, 1:]).mean()) < 5 / math.sqrt(count)


def test_a_seed_gives_the_same_numbers_for_the_same_purpose_only() -> None:
    noise = GaussianNoise(3)
    first = noise.draw([5], 0, "A", "layer")
    assert torch.equal(first, GaussianNoise(3).draw([5], 0, "A", "layer"))
    others = [noise.draw([5], *purpose) for purpose in ((1, "A", "layer"), (0, "B", "layer"), (0, "A", "other"))]
    assert not any(torch.equal(first, other) for other in [*others, GaussianNoise(4).draw([5], 0, "A", "layer")])


def test_the_system_repeats_nothing() -> None:
    noise = GaussianNoise(None)
    assert not torch.equal(noise.draw([5], 0, "A"), noise.draw([5], 0, "A"))
    assert noise.draw([], 0).shape == ()
    assert noise.draw([0], 0).shape == (0,)

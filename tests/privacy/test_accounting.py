"""ε against another accountant and closed forms; noise for a target; the extra."""

from __future__ import annotations

import importlib.util
import math
import warnings

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from lorafair.config import load_config
from lorafair.errors import ConfigError
from lorafair.privacy.accounting import (
    Releases,
    _bound_without_sampling,
    epsilon_of,
    noise_multiplier_for,
    require_accountant,
)

pytest.importorskip("dp_accounting", reason="pip install 'lorafair[privacy]'")


def gaussian_epsilon(noise_multiplier: float, count: int, delta: float) -> float:
    """Of Gaussian mechanisms on all data (Balle and Wang, arXiv 1805.06530, theorem 8): they compose to one."""
    ratio = math.sqrt(count) / noise_multiplier

    def excess(epsilon: float) -> float:
        beyond = norm.cdf(ratio / 2 - epsilon / ratio)
        return float(beyond - math.exp(epsilon) * norm.cdf(-ratio / 2 - epsilon / ratio) - delta)

    return float(brentq(excess, 0, 200)) if excess(0) > 0 else 0.0


@pytest.mark.parametrize(
    ("noise", "count", "delta"), [(1, 1, 1e-5), (4, 50, 1e-5), (0.7, 3, 1e-6), (30, 10, 1e-3), (100, 1, 1e-5)]
)
def test_gaussian_mechanisms_have_the_epsilon_of_the_closed_form(noise: float, count: int, delta: float) -> None:
    exact = gaussian_epsilon(noise, count, delta)
    assert exact <= epsilon_of([Releases(noise, 1.0, count)], delta) <= 1.005 * exact + 1e-6


GRID = [
    (0.8, 0.005, 500, 1e-5), (1.0, 0.01, 1000, 1e-5), (2.0, 0.05, 500, 1e-6), (0.6, 0.1, 50, 1e-5),
    (1.5, 0.3, 30, 1e-4), (5.0, 0.5, 100, 1e-5), (10.0, 0.02, 400, 1e-5), (0.5, 0.02, 30, 1e-5), (3.0, 1.0, 20, 1e-5),
]  # fmt: skip


@pytest.mark.parametrize(("noise", "probability", "count", "delta"), GRID)
def test_agrees_with_the_accountant_of_opacus(noise: float, probability: float, count: int, delta: float) -> None:
    accountants = pytest.importorskip("opacus.accountants", reason="pip install opacus")
    mine = epsilon_of([Releases(noise, probability, count)], delta)
    other = accountants.PRVAccountant()
    other.history = [(noise, probability, count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = other.get_epsilon(delta, eps_error=0.005 * mine)
    assert mine == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("noise", [1e-200, 1e-9, 5e-4])
def test_an_epsilon_of_millions_is_a_bound_and_takes_no_memory(noise: float) -> None:
    epsilon = epsilon_of([Releases(noise, 0.3, 7), Releases(2 * noise, 1.0, 4)], 1e-5)
    assert epsilon >= 8 / noise / noise / 2  # without sampling; grids of so many places would fill the memory
    assert epsilon == math.inf or epsilon < 1.1 * 8 / noise / noise / 2


def test_the_bound_without_sampling_is_above_the_epsilon_of_a_gaussian_mechanism() -> None:
    for noise, count, delta in [(1, 1, 1e-5), (0.5, 20, 1e-6), (5.0, 2, 1e-3), (0.3, 9, 0.6)]:
        bound = _bound_without_sampling([Releases(noise, 0.2, count)], delta)
        assert gaussian_epsilon(noise, count, delta) <= bound


def test_releases_compose_in_any_order_and_split() -> None:
    first, second = Releases(1.2, 0.1, 40), Releases(3.0, 0.5, 5)
    together = epsilon_of([first, second], 1e-5)
    split = [Releases(3.0, 0.5, 2), Releases(1.2, 0.1, 40), Releases(3.0, 0.5, 3)]
    assert epsilon_of(split, 1e-5) == pytest.approx(together, rel=1e-6)
    assert together > max(epsilon_of([first], 1e-5), epsilon_of([second], 1e-5))
    # two Gaussian mechanisms of a round: as one whose noise multiplier is smaller
    pair = epsilon_of([Releases(2.0), Releases(3.0)], 1e-5)
    assert pair == pytest.approx(gaussian_epsilon((2.0**-2 + 3.0**-2) ** -0.5, 1, 1e-5), rel=0.005)


def test_what_releases_nothing_costs_nothing_and_what_has_no_noise_everything() -> None:
    assert epsilon_of([], 1e-5) == epsilon_of([Releases(1.0, 0.5, 0)], 1e-5) == epsilon_of([Releases(1, 0)], 1e-5) == 0
    assert epsilon_of([Releases(1.0, 0.5, 10), Releases(0.0, 0.1, 1)], 1e-5) == math.inf


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_noise_for_a_target_keeps_it_and_is_no_larger_than_needed(target: float) -> None:
    def releases(noise: float) -> list[Releases]:
        return [Releases(noise, 0.05, 100)]

    noise = noise_multiplier_for(target, 1e-5, releases)
    assert 0.99 * target < epsilon_of(releases(noise), 1e-5) <= target


def test_a_target_out_of_reach_is_one_line() -> None:
    with pytest.raises(ConfigError, match="would need a noise multiplier above"):
        noise_multiplier_for(1e-9, 1e-12, lambda noise: [Releases(noise, 1.0, 100)])


def test_a_large_target_needs_hardly_any_noise() -> None:
    assert noise_multiplier_for(1e6, 1e-5, lambda noise: [Releases(noise, 1.0, 1)]) < 0.05


def test_without_the_extra_the_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'lorafair\[privacy\]'"):
        require_accountant()


def test_options_of_privacy_belong_together() -> None:
    given = load_config("synthetic.yaml", "privacy.unit=example", "privacy.noise_multiplier=1").privacy
    assert (given.clip_norm, given.delta, given.noise_source, given.epsilon) == (1.0, 1e-5, "seeded", None)
    with pytest.raises(ConfigError, match="neither is given"):
        load_config("synthetic.yaml", "privacy.unit=example")
    with pytest.raises(ConfigError, match="both are given"):
        load_config("synthetic.yaml", "privacy.unit=example", "privacy.noise_multiplier=1", "privacy.epsilon=3")
    with pytest.raises(ConfigError, match=r"needs privacy\.unit=client or example"):
        load_config("synthetic.yaml", "privacy.clip_norm=1")

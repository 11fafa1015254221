"""ε of what a run releases, by the privacy loss distributions of dp-accounting (Koskela et al., arXiv 1906.03049).

dp-accounting is an extra and takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

from lorafair.errors import ConfigError

# Widths of the grid of privacy losses, coarse ones first: a fine one would fill the memory where ε is in the thousands.
# dp-accounting rounds to the safe side, so ε is never too small.
_GRIDS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# A grid is fine enough if its width times the root of the number of releases is below this part of ε: ε is then too
# large by about the square of it, 0.25 %.
_FINE = 0.05
_LARGEST = 1e6  # of an ε that is computed so: the widest grid would have too many places beyond it
_BISECTION = 1.0005  # ratio of the two ends at which the search for a noise multiplier stops
_NOISE = (2.0**-6, 2.0**20)  # where it looks


@dataclass(frozen=True)
class Releases:
    """Gaussian mechanisms, one after the other: each on a sample that holds every unit independently of the others.

    Noise has the standard deviation `noise_multiplier` times what one unit can change (add-or-remove neighbours).
    """

    noise_multiplier: float
    sampling_probability: float = 1.0
    count: int = 1


def require_accountant() -> None:
    """Raise ConfigError where dp-accounting is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError("privacy.unit needs the package dp-accounting: pip install 'lorafair[privacy]'")


def epsilon_of(releases: Sequence[Releases], delta: float) -> float:
    """The ε of all these releases together at this δ; infinite where one of them has no noise.

    The result is an upper bound, and at most about 0.3 % above the exact value. Where the noise is so small that ε
    would be above a million if every unit were in every sample, it is that ε.
    """
    counts: dict[Releases, int] = {}
    for release in releases:
        kind = replace(release, count=1)
        counts[kind] = counts.get(kind, 0) + release.count
    merged = tuple(
        replace(kind, count=count) for kind, count in counts.items() if count and kind.sampling_probability > 0
    )
    if any(release.noise_multiplier == 0 for release in merged):
        return math.inf
    if (bound := _bound_without_sampling(merged, delta)) > _LARGEST:
        return bound
    return _epsilon(merged, delta) if merged else 0.0


def noise_multiplier_for(epsilon: float, delta: float, releases_of: Callable[[float], Sequence[Releases]]) -> float:
    """The smallest noise multiplier, to 0.05 %, at which what `releases_of` it gives has at most this ε.

    ε must fall with the noise multiplier. Raises ConfigError where none has so small an ε.
    """

    def is_enough(noise_multiplier: float) -> bool:
        return epsilon_of(releases_of(noise_multiplier), delta) <= epsilon

    low, high = 1.0, 1.0
    while not is_enough(high):
        low, high = high, 2 * high
        if high > _NOISE[1]:
            raise ConfigError(
                f"privacy.epsilon={epsilon:g} at privacy.delta={delta:g} would need a noise multiplier above "
                f"{_NOISE[1]:g}; set a larger privacy.epsilon, or fewer rounds or steps"
            )
    while low == high or is_enough(low):
        high, low = low, low / 2
        if low < _NOISE[0]:
            return high
    while high / low > _BISECTION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _bound_without_sampling(releases: Sequence[Releases], delta: float) -> float:
    """An upper bound, μ²/2 + μ·z of the quantile z of 1 − δ: the releases are μ-GDP with μ² = Σ count/σ²."""
    square = sum(release.count / release.noise_multiplier / release.noise_multiplier for release in releases)
    return square / 2 + math.sqrt(square) * max(0.0, NormalDist().inv_cdf(1 - delta))


@lru_cache(maxsize=4096)
def _epsilon(releases: tuple[Releases, ...], delta: float) -> float:
    root = math.sqrt(sum(release.count for release in releases))
    for grid in _GRIDS:
        epsilon = _epsilon_on(grid, releases, delta)
        if grid * root <= _FINE * epsilon:
            break
    return epsilon


def _epsilon_on(grid: float, releases: Sequence[Releases], delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    for release in releases:
        event = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        if release.sampling_probability < 1:
            event = dp_accounting.PoissonSampledDpEvent(release.sampling_probability, event)
        accountant.compose(event, release.count)
    return float(accountant.get_epsilon(delta))

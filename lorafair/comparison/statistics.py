"""What paired outcomes tell: where their variance comes from, how sure a ranking is, and when enough has been seen.

Outcomes are in points of accuracy. A draw is one repetition of all methods on equal terms; a design of draws varies
the partition (with the images) and the training (initial factors and head, clients of a round, batches, dropout) apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorafair.seeding import seeded_numpy

Layout = Literal["independent", "crossed", "nested"]
Values = NDArray[np.float64]

EFFECT_SCALE = 0.7  # standard deviation, of the prior of mean/deviation in `evidence`: near-ties and clear gains alike
_PIVOTS = 8192  # draws for an interval of a component of variance


@dataclass(frozen=True)
class Component:
    """A component of variance and its interval."""

    name: str
    variance: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean of paired differences and what is known about it."""

    mean: float
    error: float  # the standard error of the mean
    freedom: float  # degrees of freedom of the error
    spread: float  # the standard deviation of one draw with a partition and a training of its own

    def interval(self, confidence: float) -> tuple[float, float]:
        """By Student's t."""
        from scipy.stats import t

        half = float(t.ppf((1 + confidence) / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p_value(self) -> float | None:
        """Of the two-sided t-test against zero; None without spread, where there is no statistic."""
        from scipy.stats import t

        return None if self.error <= 0 else float(2 * t.sf(abs(self.mean) / self.error, self.freedom))

    def reversal(self, draws: int) -> float | None:
        """The probability that the mean of this many new draws has the other sign.

        By the predictive distribution (Student's t), so the uncertainty of the estimate itself counts: the end of the
        one-sided prediction interval of this probability is zero. None without spread.
        """
        from scipy.stats import t

        scale = math.hypot(self.spread / math.sqrt(draws), self.error)
        return None if scale <= 0 else float(t.cdf(-abs(self.mean) / scale, self.freedom))


def estimate(values: Values, layout: Layout = "independent") -> Estimate | None:
    """The mean of the differences; None where there are too few draws to know its error.

    Args:
        values: One number a draw, or of a design (partitions, trainings), with every cell.
        layout: How the draws were made. The cells of a design are not independent: nested ones count by partition,
            crossed ones by the mean squares of both factors, with the degrees of freedom of Satterthwaite (1946).
    """
    if layout == "independent" or values.ndim == 1:
        flat = values.ravel()
        if flat.size < 2:
            return None
        spread = 0.0 if is_constant(flat) else float(flat.std(ddof=1))
        return Estimate(float(flat.mean()), spread / math.sqrt(flat.size), flat.size - 1, spread)
    partitions, trainings = values.shape
    if partitions < 2 or (layout == "crossed" and trainings < 2):
        return None
    if is_constant(values):
        return Estimate(float(values.flat[0]), 0.0, partitions - 1, 0.0)
    spread = math.sqrt(sum(part.variance for part in components(values, layout)))
    if layout == "nested":
        means = values.mean(1)
        error = float(means.std(ddof=1)) / math.sqrt(partitions)
        return Estimate(float(values.mean()), error, partitions - 1, spread)
    squares = _crossed_squares(values[:, :, None])
    rows, columns, cells = (squares[name] for name in ("partition", "training", "interaction"))
    # Without one of the two effects its mean square estimates that of the cells, and the sum can come out too small.
    square, parts = max(
        (rows[0] + columns[0] - cells[0], (rows, columns, cells)), (rows[0], (rows,)), (columns[0], (columns,)),
        key=lambda candidate: candidate[0],
    )  # fmt: skip
    below = sum(value**2 / freedom for value, freedom in parts)
    freedom = min(square**2 / below if below else 1.0, values.size - 1)
    return Estimate(float(values.mean()), math.sqrt(square / values.size), max(freedom, 1.0), spread)


def is_constant(values: Values) -> bool:
    """Without any spread. By rounding, the mean of equal numbers may be another one, and their deviation above zero."""
    return float(np.ptp(values)) == 0


def components(values: Values, layout: Layout, confidence: float = 0.95) -> tuple[Component, ...]:
    """Components of variance by the method of moments (ANOVA), negative ones taken as zero.

    Args:
        values: (partitions, trainings) or (partitions, trainings, repetitions), with every cell. Nested trainings are
            others in each partition. Without repetitions a crossed interaction holds the residual, too.
        layout: crossed or nested.
        confidence: Of the intervals, which are generalised confidence intervals: the mean squares over chi-square
            pivots (Weerahandi 1993; Hannig, Iyer and Patterson 2006), so they cover about as often as they say.
    """
    table = values if values.ndim == 3 else values[:, :, None]
    trainings, repetitions = table.shape[1:]
    if layout == "nested":
        squares = _nested_squares(table)
        weights = {
            "partition": {"partition": 1.0, "training": -1.0},
            "training": {"training": 1.0, "residual": -1.0} if repetitions > 1 else {"training": 1.0},
            "residual": {"residual": 1.0},
        }
        counts = {"partition": trainings * repetitions, "training": repetitions, "residual": 1}
    else:
        squares = _crossed_squares(table)
        weights = {
            "partition": {"partition": 1.0, "interaction": -1.0},
            "training": {"training": 1.0, "interaction": -1.0},
            "interaction": {"interaction": 1.0, "residual": -1.0} if repetitions > 1 else {"interaction": 1.0},
            "residual": {"residual": 1.0},
        }
        counts = {"partition": trainings * repetitions, "training": len(table) * repetitions,
                  "interaction": repetitions, "residual": 1}  # fmt: skip
    pivots = _pivots(squares)
    names = [name for name in weights if name in squares]
    return tuple(_component(name, weights[name], counts[name], squares, pivots, confidence) for name in names)


def _component(
    name: str, weights: Mapping[str, float], count: int, squares: Mapping[str, tuple[float, float]],
    pivots: Mapping[str, Values], confidence: float,
) -> Component:  # fmt: skip
    """From the mean squares that are weighted so that their sum estimates `count` times the component."""
    variance = max(0.0, sum(weight * squares[part][0] for part, weight in weights.items()) / count)
    drawn = np.maximum(0.0, sum(weight * pivots[part] for part, weight in weights.items()) / count)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Component(name, variance, float(low), float(high))


def _pivots(squares: Mapping[str, tuple[float, float]]) -> dict[str, Values]:
    """Draws of what the expected mean squares may be; the same every time."""
    generator = seeded_numpy(0, "components of variance")
    return {name: value * freedom / generator.chisquare(freedom, _PIVOTS) for name, (value, freedom) in squares.items()}


def _crossed_squares(table: Values) -> dict[str, tuple[float, float]]:
    """Mean square and degrees of freedom of each effect of (partitions, trainings, repetitions)."""
    rows, columns, repetitions = table.shape
    mean, cells = table.mean(), table.mean(2)
    by_row, by_column = cells.mean(1), cells.mean(0)
    inner = cells - by_row[:, None] - by_column + mean
    squares = {
        "partition": _square(((by_row - mean) ** 2).sum() * columns * repetitions, rows - 1),
        "training": _square(((by_column - mean) ** 2).sum() * rows * repetitions, columns - 1),
        "interaction": _square((inner**2).sum() * repetitions, (rows - 1) * (columns - 1)),
    }
    if repetitions > 1:
        squares["residual"] = _square(((table - cells[:, :, None]) ** 2).sum(), rows * columns * (repetitions - 1))
    return squares


def _nested_squares(table: Values) -> dict[str, tuple[float, float]]:
    rows, columns, repetitions = table.shape
    cells = table.mean(2)
    by_row = cells.mean(1)
    squares = {
        "partition": _square(((by_row - table.mean()) ** 2).sum() * columns * repetitions, rows - 1),
        "training": _square(((cells - by_row[:, None]) ** 2).sum() * repetitions, rows * (columns - 1)),
    }
    if repetitions > 1:
        squares["residual"] = _square(((table - cells[:, :, None]) ** 2).sum(), rows * columns * (repetitions - 1))
    return squares


def _square(total: Any, freedom: int) -> tuple[float, float]:
    return float(total) / freedom, float(freedom)


def draws_needed(difference: float, spread: float, power: float = 0.8, level: float = 0.05) -> int | None:
    """The fewest independent paired draws with which a two-sided t-test finds the difference at this power.

    None where there is no difference to find, or more than ten million draws are needed.
    """
    if difference == 0 or not math.isfinite(difference):
        return None
    if spread == 0:
        return 2
    low, high = 1, 2  # `low` is too few
    while paired_power(difference / spread, high, level) < power:
        low, high = high, 2 * high
        if high > 10_000_000:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = paired_power(difference / spread, middle, level) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def paired_power(effect: float, draws: int, level: float = 0.05) -> float:
    """The power of the two-sided t-test of paired draws; `effect` is the difference over its deviation."""
    from scipy.stats import nct, norm, t

    critical, shift = float(t.ppf(1 - level / 2, draws - 1)), abs(effect) * math.sqrt(draws)
    if shift > 30 or draws > 100_000:  # the noncentral t loses digits there, and is normal
        return float(norm.sf(critical - shift) + norm.cdf(-critical - shift))
    return float(nct.sf(critical, draws - 1, shift) + nct.cdf(-critical, draws - 1, shift))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, by Holm (1979): the chance of any false one stays below the level."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = largest
    return corrected


def evidence(values: Values, mean: float = 0.0) -> Values:
    """The e-value against `mean` after each number of draws, along the last axis: 1 with the first.

    A Bayes factor of normal draws with unknown deviation: the effect mean/deviation is normal with deviation
    EFFECT_SCALE against zero, the deviation has the right Haar prior. Under the null it is a nonnegative martingale
    (of the draws up to their scale), so whenever one looks, P(ever above 1/level) <= level: Lai (1976); Perez-Ortiz,
    Lardy, de Heide and Grünwald, E-statistics, group invariance and anytime-valid testing (2022, 2208.07610); Wang and
    Ramdas, Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance (2023, 2310.03722).
    """
    from_mean = values - mean
    n = np.arange(1, values.shape[-1] + 1)
    total, squares = from_mean.cumsum(-1), (from_mean**2).cumsum(-1)
    growth = 1 + n * EFFECT_SCALE**2
    explained = total**2 / n
    left = np.maximum(squares - explained, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(squares > 0, (left + explained) / (left + explained / growth), 1.0)
    return np.asarray(np.exp(0.5 * n * np.log(ratio) - 0.5 * np.log(growth)), dtype=np.float64)


def confidence_sequence(values: Values, level: float = 0.05) -> tuple[float, float]:
    """All means that `evidence` does not exclude: an interval that may be looked at after every draw.

    It holds the true mean at all times at once with probability 1 - level. Infinite while there are too few draws.
    """
    n = values.size
    if n < 2:
        return -math.inf, math.inf
    growth = 1 + n * EFFECT_SCALE**2
    bound = math.exp(2 / n * (math.log(1 / level) + 0.5 * math.log(growth)))
    if bound >= growth:
        return -math.inf, math.inf
    # The evidence is 1/level where t^2/(n - 1) = (bound - 1)/(1 - bound/growth).
    half = float(values.std()) * math.sqrt((bound - 1) / (1 - bound / growth))
    return float(values.mean()) - half, float(values.mean()) + half


def decided(values: Values, level: float = 0.05, margin: float | None = None) -> bool:
    """Whether the draws so far tell the sign of the difference or, with a margin, that it is smaller than that.

    Draws without any spread tell nothing: a coarse accuracy may give the same difference a few times by chance.
    """
    if values.size < 2 or is_constant(values):
        return False
    low, high = confidence_sequence(values, level)
    return low > 0 or high < 0 or (margin is not None and -margin < low and high < margin)

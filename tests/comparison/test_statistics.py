"""Statistics of paired draws, against simulations whose truth is known, SciPy and closed forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from lorafair.comparison.statistics import (
    EFFECT_SCALE,
    Estimate,
    Layout,
    Values,
    components,
    confidence_sequence,
    decided,
    draws_needed,
    estimate,
    evidence,
    holm,
    paired_power,
)
from lorafair.seeding import seeded_numpy


def simulated(
    times: int, partitions: int, trainings: int, repetitions: int = 1, *,
    deviations: tuple[float, float, float, float], layout: Layout = "crossed", mean: float = 0.0,
) -> Values:  # fmt: skip
    """(times, partitions, trainings, repetitions) with deviations of partition, training, interaction and residual."""
    draw = seeded_numpy(3, "variance", layout, partitions, trainings)
    of_partition, of_training, of_both, of_rest = deviations
    rows = 1 if layout == "crossed" else partitions
    values = mean + of_partition * draw.standard_normal((times, partitions, 1, 1))
    values = values + of_training * draw.standard_normal((times, rows, trainings, 1))
    values = values + of_both * draw.standard_normal((times, partitions, trainings, 1))
    return np.asarray(values + of_rest * draw.standard_normal((times, partitions, trainings, repetitions)))


@pytest.mark.parametrize("layout", ["crossed", "nested"])
def test_components_are_unbiased_and_their_intervals_cover(layout: Layout) -> None:
    truth = (2.0, 1.0, 0.0 if layout == "nested" else 1.5, 0.8)
    tables = simulated(300, 12, 6, 2, deviations=truth, layout=layout)
    found = [{part.name: part for part in components(table, layout)} for table in tables]
    names = ["partition", "training", *(["interaction"] if layout == "crossed" else []), "residual"]
    assert list(found[0]) == names
    for name, deviation in zip(names, [d for d in truth if d], strict=True):
        mean = np.mean([parts[name].variance for parts in found])
        assert mean == pytest.approx(deviation**2, rel=0.1), name
        covered = np.mean([parts[name].low <= deviation**2 <= parts[name].high for parts in found])
        assert 0.91 < covered < 0.99, name


def test_without_repetitions_the_interaction_holds_the_residual() -> None:
    tables = simulated(200, 20, 8, deviations=(0.0, 1.0, 1.2, 0.9))[..., 0]
    found = [{part.name: part for part in components(table, "crossed")} for table in tables]
    assert list(found[0]) == ["partition", "training", "interaction"]
    assert np.mean([parts["interaction"].variance for parts in found]) == pytest.approx(1.2**2 + 0.9**2, rel=0.05)
    absent = [parts["partition"] for parts in found]
    assert min(part.variance for part in absent) == 0
    assert np.mean([part.low == 0 for part in absent]) > 0.95, "no effect is found where there is none"


def test_mean_squares_are_those_of_a_one_way_analysis() -> None:
    """SciPy's F of partitions against the residual of what is nested in them."""
    table = simulated(1, 5, 7, deviations=(1.0, 1.0, 0.0, 0.0), layout="nested")[0, :, :, 0]
    between, within = (part.variance for part in components(table, "nested"))
    assert (7 * between + within) / within == pytest.approx(stats.f_oneway(*table).statistic)


@pytest.mark.parametrize(
    ("layout", "deviations"),
    [
        ("crossed", (2.0, 1.0, 1.0, 0.0)),
        ("crossed", (0.5, 2.0, 1.0, 0.0)),
        ("crossed", (0.0, 0.0, 1.0, 0.0)),
        ("nested", (2.0, 1.0, 0.0, 0.0)),
    ],
)
def test_the_interval_of_a_design_covers(layout: Layout, deviations: tuple[float, float, float, float]) -> None:
    tables = simulated(400, 12, 5, deviations=deviations, layout=layout, mean=0.7)[..., 0]
    known = [estimate(table, layout) for table in tables]
    covered = np.mean([low <= 0.7 <= high for e in known if e is not None for low, high in [e.interval(0.95)]])
    assert 0.92 < covered <= 1.0
    if sum(deviations[:2]):  # cells that are taken for independent say too much
        naive = [estimate(table.ravel()) for table in tables]
        assert np.mean([low <= 0.7 <= high for e in naive if e for low, high in [e.interval(0.95)]]) < 0.85


def test_independent_draws_are_a_paired_t_test() -> None:
    values = seeded_numpy(0, "t").normal(0.4, 1.0, 9)
    known = estimate(values)
    assert known is not None
    test = stats.ttest_1samp(values, 0.0)
    assert known.p_value == pytest.approx(test.pvalue)
    assert known.interval(0.9) == pytest.approx(tuple(test.confidence_interval(0.9)))
    assert estimate(values[:1]) is None
    assert estimate(values.reshape(3, 3)[:1], "nested") is None
    same = estimate(np.ones(3))
    assert same is not None
    assert (same.p_value, same.reversal(5)) == (None, None)


def test_reversal_is_the_frequency_of_the_other_sign() -> None:
    truth = Estimate(mean=0.5, error=0.0, freedom=1e9, spread=2.0)
    fresh = seeded_numpy(1, "reversal").normal(0.5, 2.0, (20_000, 10)).mean(1)
    assert truth.reversal(10) == pytest.approx(np.mean(fresh < 0), abs=0.01)
    assert estimate(np.array([1.0, -1.0])) == Estimate(0.0, 1.0, 1, math.sqrt(2))
    assert Estimate(0.0, 1.0, 1, 1.0).reversal(3) == pytest.approx(0.5)


def test_reversal_counts_that_the_mean_is_an_estimate() -> None:
    """New draws fall below the limit at which `reversal` is 0.2 in a fifth of all studies, whatever the truth is."""
    draw = seeded_numpy(2, "reversal")
    studies, new = draw.normal(0.3, 1.7, (20_000, 6)), draw.normal(0.3, 1.7, (20_000, 12)).mean(1)
    known = [estimate(values) for values in studies[:5]]
    spread = studies.std(1, ddof=1)
    above = stats.t.ppf(0.8, 5) * spread * math.sqrt(1 / 12 + 1 / 6)  # how far zero is below the mean
    for one, distance in zip(known, above, strict=False):
        assert one is not None
        assert dataclasses.replace(one, mean=float(distance)).reversal(12) == pytest.approx(0.2)
    assert np.mean(new < studies.mean(1) - above) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("effect", "draws"), [(0.5, 34), (0.2, 199), (1.0, 10), (0.8, 15)])
def test_draws_needed_are_those_of_the_tables(effect: float, draws: int) -> None:
    """Cohen's tables for a paired t-test at power 0.8, two-sided at 0.05."""
    assert draws_needed(3 * effect, 3.0) == draws == draws_needed(-3 * effect, 3.0)
    assert paired_power(effect, draws) >= 0.8 > paired_power(effect, draws - 1)
    assert draws_needed(0.0, 1.0) is None
    assert draws_needed(1e-9, 1.0) is None
    assert draws_needed(1.0, 0.0) == 2


def test_power_is_the_frequency_of_a_finding() -> None:
    values = seeded_numpy(4, "power").normal(0.6, 1.0, (10_000, 20))
    assert np.mean(stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05) == pytest.approx(
        paired_power(0.6, 20), abs=0.01
    )
    assert paired_power(0.02, 99_999) == pytest.approx(paired_power(0.02, 100_001), abs=1e-3)


def test_holm_by_hand_and_by_simulation() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    p_values = seeded_numpy(5, "holm").random((4000, 5))
    assert np.mean([min(holm(row.tolist())) < 0.05 for row in p_values]) == pytest.approx(0.05, abs=0.012)
    assert np.mean(p_values.min(1) < 0.05) > 0.2, "uncorrected"


def test_evidence_is_the_bayes_factor() -> None:
    """Against the integral over the effect of the density of Student's t."""
    values = seeded_numpy(6, "bayes").normal(0.5, 1.3, 12)
    t = math.sqrt(12) * values.mean() / values.std(ddof=1)

    def density(effect: float) -> float:
        return float(stats.nct.pdf(t, 11, effect * math.sqrt(12)) * stats.norm.pdf(effect, 0, EFFECT_SCALE))

    factor = integrate.quad(density, -6, 6)[0] / stats.t.pdf(t, 11)
    assert evidence(values)[-1] == pytest.approx(factor, rel=1e-6)
    assert evidence(values)[0] == pytest.approx(1.0)
    assert evidence(7 * values)[-1] == pytest.approx(factor, rel=1e-6), "without a unit"


def test_the_confidence_sequence_is_where_the_evidence_is_not_enough() -> None:
    values = seeded_numpy(7, "sequence").normal(0.5, 1.3, 25)
    low, high = confidence_sequence(values, 0.02)
    assert evidence(values, low)[-1] == pytest.approx(50) == evidence(values, high)[-1]
    assert evidence(values, (low + high) / 2)[-1] < 50
    assert confidence_sequence(values[:2]) == (-math.inf, math.inf)


def ever(found: NDArray[np.bool_]) -> float:
    return float(np.mean(found.any(-1)))


@pytest.mark.parametrize("shape", ["normal", "t with 5 degrees", "uniform"])
def test_the_stopping_rule_keeps_its_error_however_often_one_looks(shape: str) -> None:
    draw = seeded_numpy(8, "stopping", shape)
    size = (4000, 200)
    values = {
        "normal": lambda: draw.standard_normal(size),
        "uniform": lambda: draw.uniform(-1, 1, size),
        "t with 5 degrees": lambda: draw.standard_t(5, size),
    }[shape]()
    assert ever(evidence(values) >= 1 / 0.05) < 0.05
    n = np.arange(3, 201)
    total, squares = values.cumsum(1)[:, 2:], (values**2).cumsum(1)[:, 2:]
    statistic = abs(total) / np.sqrt(n * (squares - total**2 / n) / (n - 1))
    assert ever(statistic > stats.t.ppf(0.975, n - 1)) > 0.2, "a t-test after every draw does not"


def test_the_sequence_covers_at_all_times_and_decides_where_there_is_something() -> None:
    values = seeded_numpy(9, "coverage").normal(1.0, 2.0, (3000, 200))
    assert ever(evidence(values, 1.0) >= 1 / 0.05) < 0.05
    assert float(np.mean((evidence(values) >= 1 / 0.05)[:, -1])) > 0.99
    first = (evidence(values) >= 1 / 0.05).argmax(1)
    assert np.median(first) < 2.5 * (draws_needed(1.0, 2.0, power=0.5) or 0), "looking costs draws, but not many times"


def test_decided_knows_a_sign_and_a_margin() -> None:
    near = seeded_numpy(10, "decided").normal(0.0, 0.5, 200)
    assert decided(near + 1.0)
    assert decided(near - 1.0)
    assert not decided(near)
    assert decided(near, margin=0.3)
    assert not decided(near[:5], margin=0.3)
    assert not decided(np.ones(20))

"""benchmarks/leak.py: its scores, rates and bounds on numbers whose answer is known, and a small attack."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("dp_accounting")
from benchmarks import leak
from lorafair.seeding import seeded

ROOT = Path(__file__).parents[1]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(0, "leak", *shape), dtype=torch.float64)


def test_a_sum_of_known_gradients_gives_away_its_terms() -> None:
    gradients, has = normal(12, 300), normal(20, 12) > 0
    updates = -(has.double() @ gradients)
    found = leak.memberships(updates, gradients, noise=0.0)
    torch.testing.assert_close(found, has.double(), atol=0.02, rtol=0)
    hits, area = leak.rates(leak.membership_scores(found, has), has)
    assert area == 1
    assert min(hits) > 0.99


def test_what_is_independent_of_the_members_gives_away_nothing() -> None:
    gradients, has = normal(30, 300), normal(200, 30) > 0
    scores = leak.membership_scores(leak.memberships(normal(200, 300), gradients, noise=1.0), has)
    hits, area = leak.rates(scores, has)
    assert area == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(hits, leak.FALSE_POSITIVES, atol=0.05)


def test_the_area_is_the_probability_of_the_right_order() -> None:
    scores, has = normal(6, 7), normal(7, 6).T > 0
    pairs = (scores[has].unsqueeze(1) > scores[~has]).double().mean().item()
    assert leak.rates(scores, has)[1] == pytest.approx(pairs)


@pytest.mark.slow
def test_the_bound_is_that_of_a_gaussian_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step on all images: the exact trade-off is Φ(Φ⁻¹(x) + 1/σ), which tangents at many δ come close to."""
    monkeypatch.setattr(leak, "SAMPLING", 1.0)
    local = leak.ClientConfig(epochs=None, steps=1)
    probe = leak.Probe(None, None, None, None, local, 1.0, 1e-3, 0)  # type: ignore[arg-type]
    rates = torch.tensor(leak.FALSE_POSITIVES, dtype=torch.float64)
    exact = torch.special.ndtr(torch.special.ndtri(rates) + 1 / 2.0)
    allowed = torch.from_numpy(probe.allowed(2.0))
    assert (allowed >= exact - 1e-9).all()
    assert (allowed - exact).max() < 0.03
    assert (probe.allowed(0.0) == 1).all()
    assert (probe.allowed(None) == 1).all()


def test_the_numbers_of_the_page_show_the_leak_and_no_curve_above_its_bound() -> None:
    with (ROOT / "docs" / "data" / "leak.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == leak.FIELDS
    areas = {row["setting"]: float(row["area"]) for row in rows}
    assert areas[leak.NO_PRIVACY] > 0.99
    assert areas["ε = 1"] < 0.6
    for row in rows:
        hits, allowed = float(row["true_positives"]), float(row["allowed"])
        assert hits <= allowed + 3 * math.sqrt(0.25 / 1200), row
    figure = leak.draw(rows)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert [label.partition(",")[0] for label in labels] == list(areas)


@pytest.mark.slow
def test_a_small_attack_finds_members_without_privacy_and_not_with_it() -> None:
    run = ["data.source=synthetic", "model.name=test_vit", "model.weights=random", "model.image_size=32"]
    options = argparse.Namespace(
        candidates=12,
        trials=24,
        steps=2,
        learning_rate=0.01,
        clip_norm=1.0,
        epsilons=[0.2],
        delta=1e-3,
        seed=0,
        run=run,
    )
    areas = {line["setting"]: float(line["area"]) for line in leak.measure(options)}
    assert areas[leak.NO_PRIVACY] > 0.95
    assert 0.3 < areas["ε = 0.2"] < 0.7

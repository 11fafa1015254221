"""Attacks and defences: the geometry of updates against dense matrices, each defence against its definition."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafair.aggregation import update_geometry
from lorafair.aggregation.defences.base import ByEntry, Selection, Shortening, make_defence
from lorafair.aggregation.defences.medians import geometric_median
from lorafair.aggregation.update_geometry import distances, layer_products, products_by_layer, shortened_norm
from lorafair.config import DefenceConfig
from lorafair.errors import ConfigError
from lorafair.model.adapter import AdapterState, Core, LoRAFactors
from lorafair.registry import DEFENCES
from lorafair.seeding import seeded

SCALING = 1.75


def round_of(clients: int, seed: int = 0, *, cores: bool = False) -> tuple[AdapterState, AdapterState]:
    """Updates of two layers and a head in float64, and where they started."""
    generator = seeded(seed, "defences")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = AdapterState(
        {"a": LoRAFactors(drawn(3, 11), drawn(9, 3)), "b": LoRAFactors(drawn(2, 5), drawn(13, 2))},
        {"head.weight": drawn(4, 6), "head.bias": drawn(4)},
        {"a": Core(drawn(1, 3, 3), drawn(0))} if cores else {},
    )
    after = AdapterState(
        {p: LoRAFactors(f.A + 0.1 * drawn(clients, *f.A.shape), f.B + 0.1 * drawn(clients, *f.B.shape))
         for p, f in start.factors.items()},
        {name: tensor + 0.3 * drawn(clients, *tensor.shape) for name, tensor in start.head.items()},
        {p: Core(c.H + 0.1 * drawn(clients, *c.H.shape), drawn(clients, 0)) for p, c in start.cores.items()},
    )  # fmt: skip
    return after, start


def dense(after: AdapterState, start: AdapterState) -> Tensor:
    """(K, all numbers): the change of all weights and of the head, as matrices."""
    after, start = after.with_cores_in_b(), start.with_cores_in_b()
    changes = [
        SCALING * (f.B @ f.A - start.factors[path].B @ start.factors[path].A) for path, f in after.factors.items()
    ]
    changes += [tensor - start.head[name] for name, tensor in after.head.items()]
    return torch.cat([change.flatten(1) for change in changes], dim=1)


@pytest.mark.parametrize("numbers", [2**18, 100, 1])
@pytest.mark.parametrize("cores", [False, True])
def test_inner_products_are_those_of_the_matrices(numbers: int, cores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_geometry, "_MOST_NUMBERS", numbers)
    after, start = round_of(7, cores=cores)
    matrices = dense(after, start)
    found = sum(products for _, products in products_by_layer(after, start, SCALING))
    torch.testing.assert_close(found, matrices @ matrices.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(distances(matrices @ matrices.T), torch.cdist(matrices, matrices), rtol=1e-6, atol=1e-6)


def test_updates_that_are_small_beside_the_factors_keep_their_precision() -> None:
    after, start = round_of(5)
    small = {p: LoRAFactors(s.A + 1e-5 * (f.A - s.A), s.B + 1e-5 * (f.B - s.B))
             for (p, f), s in zip(after.factors.items(), start.factors.values(), strict=True)}  # fmt: skip
    factors, sent = small["a"].to(torch.float32), start.factors["a"].to(torch.float32)
    exact = dense(AdapterState({"a": factors.to(torch.float64)}, {}), AdapterState({"a": sent.to(torch.float64)}, {}))
    found = SCALING**2 * layer_products(factors, sent)
    assert float((found - exact @ exact.T).norm() / (exact @ exact.T).norm()) < 1e-5


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_the_norm_of_a_shortened_update(fraction: float) -> None:
    after, start = round_of(6, cores=True)
    shapes = torch.stack([part for _, part in shortened_norm(after, start, SCALING)]).sum(0)
    moved = AdapterState(
        {p: LoRAFactors(s.A + fraction * (f.A - s.A), s.B + fraction * (f.B - s.B))
         for (p, f), s in zip(after.with_cores_in_b().factors.items(), start.with_cores_in_b().factors.values(),
                              strict=True)},
        {n: start.head[n] + fraction * (t - start.head[n]) for n, t in after.head.items()},
    )  # fmt: skip
    expected = dense(moved, AdapterState(start.with_cores_in_b().factors, start.head)).square().sum(1)
    found = fraction**2 * shapes[:, 0] + 2 * fraction**3 * shapes[:, 1] + fraction**4 * shapes[:, 2]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def selected(name: str, points: Tensor, weights: Tensor | None = None, **options: float) -> Tensor:
    """The weights that a defence gives updates (K, n)."""
    defence = make_defence(DefenceConfig(name=name, **{"share": 0.25, **options}))
    assert isinstance(defence, Selection)
    equal = torch.full((len(points),), 1 / len(points), dtype=torch.float64)
    return defence.weights(points @ points.T, equal if weights is None else weights)


def points_of(clients: int, seed: int = 0) -> Tensor:
    return torch.randn(clients, 6, generator=seeded(seed, "points"), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_krum_by_its_definition(seed: int) -> None:
    points = points_of(8, seed)
    apart, suspects = torch.cdist(points, points).square(), 2  # a quarter of eight
    scores = [
        min(sum(float(apart[k, j]) for j in others) for others in combinations(set(range(8)) - {k}, 8 - suspects - 2))
        for k in range(8)
    ]
    order = np.argsort(scores)
    assert selected("krum", points).nonzero().flatten().tolist() == [order[0]]
    weights = torch.arange(1, 9, dtype=torch.float64) / 36
    kept = sorted(order[:6].tolist())
    expected = torch.zeros(8, dtype=torch.float64)
    expected[kept] = weights[kept] / weights[kept].sum()
    torch.testing.assert_close(selected("multi_krum", points, weights), expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_geometric_median_is_where_nothing_is_nearer(seed: int) -> None:
    points, weights = points_of(9, seed), torch.rand(9, generator=seeded(seed), dtype=torch.float64) + 0.2
    weights /= weights.sum()
    at = geometric_median(points @ points.T, weights) @ points

    def cost(x: Tensor) -> float:
        return float(weights @ (points - x).norm(dim=1))

    steps = torch.randn(200, 6, generator=seeded(seed, "steps"), dtype=torch.float64)
    assert all(cost(at) <= cost(at + size * step) + 1e-9 for step in steps for size in (1e-3, 0.1, 1.0))


def test_the_median_client_and_the_trimmed_mean_by_their_definitions() -> None:
    points = points_of(8)
    points[3] += 50
    sums = torch.cdist(points, points).sum(1)
    assert selected("median", points).nonzero().item() == sums.argmin()
    middle = geometric_median(points @ points.T, torch.full((8,), 1 / 8, dtype=torch.float64)) @ points
    far = (points - middle).norm(dim=1).argsort()[-2:].tolist()
    assert sorted((selected("trimmed_mean", points) == 0).nonzero().flatten().tolist()) == sorted(far)
    assert 3 in far


@pytest.mark.parametrize("bound", [None, 0.5])
def test_norm_bounding_ends_at_the_bound(bound: float | None) -> None:
    after, start = round_of(7)
    shapes = torch.stack([part for _, part in shortened_norm(after, start, SCALING)]).sum(0)
    defence = make_defence(DefenceConfig(name="norm_bounding", share=0.2, norm_bound=bound))
    assert isinstance(defence, Shortening)
    kept = defence.fractions(shapes)
    norms = dense(after, start).norm(dim=1)
    limit = float(norms.median()) if bound is None else bound
    new = (kept**2 * shapes[:, 0] + 2 * kept**3 * shapes[:, 1] + kept**4 * shapes[:, 2]).sqrt()
    torch.testing.assert_close(new, norms.clamp_max(limit), rtol=1e-6, atol=1e-9)
    assert ((kept == 1) == (norms <= limit)).all()


@pytest.mark.parametrize("clients", [5, 8])
def test_defences_of_single_numbers_by_sorting(clients: int) -> None:
    rows = torch.randn(clients, 40, generator=seeded(3), dtype=torch.float64)
    rows[1] = rows[0]  # ties
    trimmed = make_defence(DefenceConfig(name="entry_trimmed_mean", share=0.25))
    median = make_defence(DefenceConfig(name="entry_median", share=0.25))
    assert isinstance(trimmed, ByEntry)
    assert isinstance(median, ByEntry)
    cut = trimmed.suspects(clients)
    ordered = np.sort(rows.numpy(), axis=0)
    np.testing.assert_allclose(trimmed.rows(rows).mean(0), ordered[cut : clients - cut].mean(0), atol=1e-12)
    np.testing.assert_allclose(median.rows(rows), np.broadcast_to(np.median(rows, axis=0), rows.shape), atol=1e-12)


@pytest.mark.parametrize("name", [n for n in DEFENCES.names if n not in ("norm_bounding",)])
def test_one_far_client_does_not_move_the_result_far(name: str) -> None:
    points = points_of(10)
    honest = points[:9].mean(0)
    points[9] = 1e4
    defence = make_defence(DefenceConfig(name=name, share=0.2))
    if isinstance(defence, Selection):
        mean = selected(name, points, share=0.2) @ points
    else:
        assert isinstance(defence, ByEntry)
        mean = defence.rows(points).mean(0)
    assert float((mean - honest).norm()) < 4


@pytest.mark.parametrize(
    ("clients", "share", "suspects"), [(10, 0.2, 2), (6, 0.2, 2), (5, 0.4, 2), (3, 0.4, 1), (2, 0.4, 0)]
)
def test_how_many_may_lie(clients: int, share: float, suspects: int) -> None:
    assert make_defence(DefenceConfig(name="median", share=share)).suspects(clients) == suspects


@pytest.mark.parametrize("clients", [1, 2])
def test_no_defence_can_tell_who_lies_of_two(clients: int) -> None:
    with pytest.raises(ConfigError, match=rf"a round has {clients} clients, .* takes at least 3"):
        make_defence(DefenceConfig(name="norm_bounding", share=0.3)).check(clients)
    make_defence(DefenceConfig(name="norm_bounding", share=0.3)).check(3)


def test_krum_needs_enough_clients() -> None:
    with pytest.raises(ConfigError, match=r"defence.name=krum: a round has 3 clients, .* takes at least 4"):
        make_defence(DefenceConfig(name="krum", share=0.3)).check(3)

"""Sums of clipped updates: no client counts more than the bound, whatever it sends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafair.config.schema import PrivacyConfig
from lorafair.model.adapter import AdapterLayout, LoRAFactors
from lorafair.privacy.clipped_updates import (
    TOGETHER,
    Clipping,
    bounds_at_start,
    change_of,
    clipped_sum,
    first_bounds,
    next_bound,
    pieces_of,
    squares_of,
)
from lorafair.privacy.products import ReleasedLayer, largest_norm, row_basis, seen_products, shrunk

LAYOUT = AdapterLayout.of({"a": ((2, 5), (4, 2)), "b": ((2, 3), (6, 2))}, {"head.weight": (3, 4), "head.bias": (3,)})


def released_sum(rows: torch.Tensor, start: torch.Tensor, clipping: Clipping) -> torch.Tensor:
    pieces = pieces_of(LAYOUT, ("A", "B", "head"))
    norms = clipping.norms(pieces, squares_of(rows, start, pieces))
    scales = clipping.scales(norms)
    total = torch.zeros_like(start, dtype=torch.float64)
    for piece in pieces:
        total[piece.columns] = clipped_sum(rows, start, piece, scales[clipping.group_of(piece.part)])
    return total


def made_up(seed: int, clients: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(LAYOUT.length, generator=generator)
    rows = start + size * torch.randn(clients, LAYOUT.length, generator=generator) * torch.rand(
        clients, 1, generator=generator
    )
    return rows, start


def test_the_pieces_are_the_parts_in_the_order_of_a_row() -> None:
    pieces = pieces_of(LAYOUT, ("A", "head"))
    assert [(p.part, p.name) for p in pieces] == [
        ("A", "a"), ("A", "b"), ("head", "head.weight"), ("head", "head.bias"),
    ]  # fmt: skip
    row = torch.arange(LAYOUT.length)
    state = LAYOUT.unpack(row)
    assert torch.equal(row[pieces[1].columns], state.factors["b"].A.flatten())
    assert torch.equal(row[pieces[2].columns], state.head["head.weight"].flatten())


@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-3, 1.0, 1e4]), by_part=st.booleans())
def test_neighbouring_federations_differ_by_at_most_the_bound(seed: int, size: float, by_part: bool) -> None:
    """Brute force: each client is left out of the sum, and replaced by any other."""
    rows, start = made_up(seed, 5, size)
    clipping = Clipping({"A": 0.3, "B": 0.5, "head": 0.1} if by_part else {TOGETHER: 0.7})
    whole = released_sum(rows, start, clipping)
    sums = []
    for left_out in range(len(rows)):
        kept = [k for k in range(len(rows)) if k != left_out]
        sums.append(released_sum(rows[kept], start, clipping))
        assert (whole - sums[-1]).norm() <= clipping.total * (1 + 1e-12)
    for one, other in itertools.combinations(sums, 2):
        assert (one - other).norm() <= 2 * clipping.total * (1 + 1e-12)


def test_an_update_within_the_bound_is_not_changed_and_one_beyond_keeps_its_direction() -> None:
    rows, start = made_up(1, 3, 1.0)
    lengths = (rows.double() - start.double()).norm(dim=1)
    assert torch.allclose(released_sum(rows, start, Clipping({TOGETHER: 1e9})), (rows.double() - start.double()).sum(0))
    clipped = released_sum(rows[:1], start, Clipping({TOGETHER: 0.25}))
    assert torch.allclose(clipped, (rows[0].double() - start.double()) * 0.25 / lengths[0])
    assert torch.equal(released_sum(start.unsqueeze(0), start, Clipping({TOGETHER: 1.0})), torch.zeros_like(clipped))


def test_bounds_of_parts_have_the_norm_that_is_given() -> None:
    together, parts = PrivacyConfig(unit="client", clip_norm=2.0), {"A": 3, "B": 4}
    assert first_bounds(together) == {TOGETHER: 2.0}
    by_part = PrivacyConfig(unit="client", clip_norm=2.0, clip_parts=parts, clip_quantile=0.5)
    assert first_bounds(by_part) == pytest.approx({"A": 1.2, "B": 1.6})
    assert Clipping(first_bounds(by_part)).total == pytest.approx(2.0)
    assert Clipping({"A": 1.2}).total == 1.2  # a round in which only A is sent
    bounds = bounds_at_start(by_part)
    assert bounds is not None
    assert bounds.tolist() == pytest.approx([1.2, 1.6])
    assert bounds_at_start(together) is None


def test_the_bound_follows_the_quantile() -> None:
    """Norms are known here, so the bound ends where this fraction of them lies below it."""
    norms, bound = torch.linspace(0.1, 10, 200, dtype=torch.float64), 0.01
    for _ in range(400):
        bound = next_bound(bound, float((norms <= bound).double().mean()), quantile=0.3, rate=0.2)
    assert bound == pytest.approx(float(norms.quantile(0.3)), rel=0.02)


@given(
    seed=st.integers(0, 10_000), size=st.sampled_from([1e-2, 1.0, 30.0]), by_part=st.booleans(), rank=st.integers(1, 3)
)
def test_the_products_of_clipped_factors_stay_below_their_bound(
    seed: int, size: float, by_part: bool, rank: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [(5, 4), (3, 6)]
    clipping = Clipping({"A": 0.3, "B": 0.5} if by_part else {TOGETHER: 0.7})
    changes = [
        LoRAFactors(
            A=size * torch.randn(4, rank, inputs, generator=generator, dtype=torch.float64),
            B=size * torch.randn(4, outputs, rank, generator=generator, dtype=torch.float64),
        )
        for inputs, outputs in layers
    ]
    squares = {part: sum(getattr(c, part).square().sum((1, 2)) for c in changes) for part in "AB"}
    if by_part:
        scale = {part: (clipping.bounds[part] / squares[part].sqrt()).clamp(max=1).view(-1, 1, 1) for part in "AB"}
    else:
        shared = (0.7 / (squares["A"] + squares["B"]).sqrt()).clamp(max=1).view(-1, 1, 1)
        scale = {"A": shared, "B": shared}
    square = torch.zeros(4, dtype=torch.float64)
    for change, (inputs, _) in zip(changes, layers, strict=True):
        clipped = LoRAFactors(A=change.A * scale["A"], B=change.B * scale["B"])
        basis = row_basis(torch.randn(rank, inputs, generator=generator, dtype=torch.float64))
        square += seen_products(clipped, basis).square().sum((1, 2))
    assert (square.sqrt() <= largest_norm(clipping) * (1 + 1e-12)).all()


def test_the_bound_of_the_products_is_reached() -> None:
    """So no smaller one would do without clipping them: A and B of one layer, each with half of the squared norm."""
    A, B = torch.zeros(1, 1, 5, dtype=torch.float64), torch.zeros(1, 4, 1, dtype=torch.float64)
    A[0, 0, 2] = B[0, 1, 0] = math.sqrt(0.5) * 0.7
    basis = row_basis(torch.eye(5, dtype=torch.float64)[2:3])
    found = seen_products(LoRAFactors(A=A, B=B), basis)
    assert float(found.norm()) == pytest.approx(largest_norm(Clipping({TOGETHER: 0.7})))


def test_a_pair_has_the_released_mean_and_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (5, 3)) * 2)
    basis = row_basis(A)
    products = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    layer = ReleasedLayer(LoRAFactors(A=A, B=B), LoRAFactors(A=a, B=b), basis, products, noise_std=0.0)
    pair = layer.pair()
    assert torch.allclose(pair.A.mean(0), A)
    assert torch.allclose(pair.B.mean(0), B)
    missed = (pair.B @ pair.A).mean(0) - B @ A
    assert torch.allclose(missed, (products - b @ a @ basis) @ basis.mT)


def test_what_is_only_noise_is_shrunk_to_nothing() -> None:
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(shrunk(0.9 * noise, 1.0).norm()) == 0
    assert torch.allclose(shrunk(noise + 100, 1.0), noise + 100, rtol=1e-3)
    assert torch.equal(shrunk(noise, 0.0), noise)
    assert float(shrunk(torch.zeros(3, dtype=torch.float64), 0.0).norm()) == 0


def test_a_change_is_taken_in_double_precision() -> None:
    start = torch.full((LAYOUT.length,), 1e4)
    rows = start.unsqueeze(0) + 1.0
    assert change_of(rows, start, pieces_of(LAYOUT, ("A",))[0]).dtype == torch.float64

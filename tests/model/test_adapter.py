"""Packing: the tensors of an adapter as one row of numbers and back."""

from __future__ import annotations

import pytest
import torch

from lorafair.model.adapter import PARTS, AdapterLayout, AdapterState, LoRAFactors, Part, put_columns, row, take_columns

LAYOUT = AdapterLayout(
    factors={"a": ((2, 3), (5, 2)), "b": ((2, 5), (4, 2))}, head={"head.weight": (3, 4), "head.bias": (3,)}
)


def test_unpack_gives_views_and_pack_reverses_it() -> None:
    flat = torch.arange(2.0 * LAYOUT.length).view(2, LAYOUT.length)
    state = LAYOUT.unpack(flat)
    assert state.factors["a"].A.shape == (2, 2, 3)
    assert state.head["head.bias"].shape == (2, 3)
    assert torch.equal(LAYOUT.pack(state), flat)
    state.factors["b"].B.zero_()
    assert (LAYOUT.unpack(flat).factors["b"].B == 0).all()


def test_row_is_the_adapter_of_one_client() -> None:
    flat = torch.randn(3, LAYOUT.length)
    assert torch.equal(LAYOUT.pack(row(LAYOUT.unpack(flat), 1)), flat[1])


def test_lengths_count_adapter_and_head() -> None:
    assert LAYOUT.adapter_length == 6 + 10 + 10 + 8
    assert LAYOUT.length == LAYOUT.adapter_length + 12 + 3


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has 49 numbers, not 48"):
        LAYOUT.unpack(torch.zeros(48))
    other = AdapterState(factors={"a": LoRAFactors(A=torch.zeros(2, 3), B=torch.zeros(5, 2))}, head={})
    with pytest.raises(ValueError, match="does not have this model's layers"):
        LAYOUT.pack(other)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_layers_are_dealt_out_evenly_and_each_once(count: int) -> None:
    layouts = LAYOUT.split(count)
    assert sorted(path for layout in layouts for path in layout.factors) == ["a", "b"]
    assert [layout.head for layout in layouts if layout.head] == [LAYOUT.head]
    assert sum(layout.length for layout in layouts) == LAYOUT.length
    lengths = {1: [49], 2: [18, 31], 3: [15, 16, 18], 5: [0, 0, 15, 16, 18]}
    assert sorted(layout.length for layout in layouts) == lengths[count]


@pytest.mark.parametrize("parts", [PARTS, ("B", "head"), ("A", "head"), ("A",), ()])
def test_columns_of_some_layers_are_found_in_a_row_of_some_parts(parts: tuple[Part, ...]) -> None:
    flat = torch.arange(2.0 * LAYOUT.length).view(2, LAYOUT.length)
    sent = LAYOUT.select(flat, parts)
    back = torch.zeros_like(sent)
    for some in LAYOUT.split(2):
        state = LAYOUT.unpack(flat)
        restricted = AdapterState({p: state.factors[p] for p in some.factors}, {n: state.head[n] for n in some.head})
        columns = LAYOUT.columns_of(some, parts)
        found = take_columns(sent, columns)
        assert torch.equal(found, some.select(some.pack(restricted), parts))
        put_columns(back, columns, found)
    assert torch.equal(back, sent)

"""Packing: the tensors of an adapter as one row of numbers and back."""

from __future__ import annotations

import pytest
import torch

from lorafair.adapter import AdapterLayout, AdapterState, LoRAFactors, row

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

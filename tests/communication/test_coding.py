"""The coded message: every byte is counted, and what comes out is what went in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lorafair.aggregation.base import AdapterState, ServerUpdate, aggregate
from lorafair.aggregation.coded_fold import Coding
from lorafair.aggregation.fedex_lora import FedExLoRA
from lorafair.communication.coding import decode, encode, folded_ranks, message_length, pack_bits, unpack_bits
from lorafair.communication.collectives import broadcast_update
from lorafair.communication.traffic import round_traffic
from lorafair.model.adapter import PARTS, AdapterLayout, Part
from lorafair.seeding import seeded
from tests import references

LAYOUT = AdapterLayout(
    factors={"a": ((2, 5), (7, 2)), "b": ((2, 6), (5, 2))}, head={"head.weight": (3, 4), "head.bias": (3,)}
)


def made(bits: int, rank: int | None = None, start_precision: Any = "float16") -> tuple[FedExLoRA, ServerUpdate]:
    method = FedExLoRA(fold_bits=bits, fold_rank=rank, start_precision=start_precision)
    layers, weights = {}, torch.ones(3, dtype=torch.float64) / 3
    for seed, (path, (a, b)) in enumerate(LAYOUT.factors.items()):
        layers[path], _ = references.random_clients(b[0], a[1], 2, 3, seed=seed, dtype=torch.float32)
    generator = seeded(0, "heads")
    head = {name: torch.randn(3, *shape, generator=generator) for name, shape in LAYOUT.head.items()}
    return method, aggregate(method, AdapterState(layers, head), weights)


@pytest.mark.parametrize("bits", range(2, 17))
def test_bits_are_packed_as_numpy_packs_them(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    numbers = torch.randint(-largest, largest + 1, (101,), generator=seeded(bits, "numbers"))
    numbers[:2] = torch.tensor([-largest, largest])
    packed = pack_bits(numbers.double(), bits)
    flat = ((numbers.numpy()[:, None] + largest) >> np.arange(bits)) & 1
    assert packed.numpy().tobytes() == np.packbits(flat.astype(np.uint8), bitorder="little").tobytes()
    assert torch.equal(unpack_bits(packed, 101, bits), numbers.float())


@pytest.mark.parametrize("parts", [PARTS, ("B", "head"), ("A",)])
@pytest.mark.parametrize("start_precision", ["float16", "float32"])
@pytest.mark.parametrize(("bits", "rank"), [(4, None), (4, 3), (3, 1), (16, 2)])
def test_every_byte_is_counted_and_every_number_comes_back(
    bits: int, rank: int | None, start_precision: str, parts: tuple[Part, ...]
) -> None:
    method, update = made(bits, rank, start_precision)
    assert method.coding is not None
    message = encode(update, LAYOUT, parts, method.coding)
    ranks = folded_ranks(update.folded, LAYOUT)
    assert message.dtype == torch.uint8
    assert len(message) == message_length(LAYOUT, parts, ranks, method.coding)
    numbers, folded = decode(message, LAYOUT, parts, ranks, method.coding)
    row = LAYOUT.pack(AdapterState(update.factors, update.head))
    assert torch.equal(numbers, LAYOUT.select(row, parts)), "the start is of values that the message holds"
    for path, factors in update.folded.items():
        assert torch.equal(folded[path].A, factors.A.float())
        assert torch.equal(folded[path].B, factors.B.float())


@pytest.mark.parametrize("start_precision", ["float16", "float32"])
def test_what_is_reported_is_what_is_broadcast(start_precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, update = made(4, 5, start_precision)
    sizes: list[tuple[int, torch.dtype]] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sizes.append((tensor.numel(), tensor.dtype)))
    of_two: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    _, folded = broadcast_update(of_two, update, LAYOUT, parts=PARTS, folds=True, coding=method.coding)
    (forms, _), (message, dtype) = sizes
    assert (forms, dtype) == (2, torch.uint8), "the rank of each layer goes ahead"
    assert round_traffic(LAYOUT, method, update, 0, (2, 2, 2)).down == 3 * message
    assert folded.keys() == update.folded.keys()
    halves = (1 if start_precision == "float16" else 2) * 2 * LAYOUT.adapter_length
    rank = 5 if start_precision == "float16" else 4  # without rounding there is no more than (K - 1)·R to fold
    scales, numbers = 8 * (rank + rank), -(-rank * (7 + 5) // 2) + -(-rank * (5 + 6) // 2)
    assert message == halves + 4 * 15 + scales + numbers


def test_a_layer_without_a_fold_costs_nothing_and_smaller_clients_get_less() -> None:
    method, update = made(4, 3)
    assert method.coding is not None
    folded = {"b": update.folded["b"]}
    some = ServerUpdate(update.factors, folded, update.head, update.sent_lora_rank)
    ranks = folded_ranks(folded, LAYOUT)
    assert ranks == [0, 3]
    numbers, found = decode(encode(some, LAYOUT, PARTS, method.coding), LAYOUT, PARTS, ranks, method.coding)
    assert list(found) == ["b"]
    assert len(numbers) == LAYOUT.length
    of_fold = Coding(4, half_start=True).message_bytes(3, 5, 6)
    assert round_traffic(LAYOUT, method, some, 0, (1,)).down == 2 * (12 + 11) + 4 * 15 + of_fold

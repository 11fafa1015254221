"""The mean of the heads: against loops over clients, classes and numbers in plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafair.aggregation import factor_algebra
from lorafair.aggregation.base import AdapterState, aggregate
from lorafair.aggregation.fedit import FedIT
from lorafair.aggregation.head_mean import class_mean_head, mean_head
from lorafair.aggregation.registry import method_of
from lorafair.config.loading import load_config
from lorafair.errors import ConfigError
from lorafair.registry import METHODS
from lorafair.seeding import seeded
from tests import references

CLIENTS, CLASSES, FEATURES = 4, 5, 3
COUNTS = torch.tensor([[7, 0, 2, 1, 0], [0, 0, 9, 4, 0], [1, 0, 0, 5, 0], [3, 0, 30, 0, 0]])  # nobody has 1 and 4


def heads(*leading: int) -> dict[str, Tensor]:
    generator = seeded(len(leading), "heads")
    shapes = {"head.weight": (CLASSES, FEATURES), "head.bias": (CLASSES,)}
    return {name: torch.randn(*leading, *shape, generator=generator) for name, shape in shapes.items()}


def by_hand(stack: Tensor, start: Tensor, counts: Tensor) -> Tensor:
    rows = []
    for c in range(CLASSES):
        have = [(int(counts[k, c]), stack[k, c].double()) for k in range(len(counts)) if counts[k, c] > 0]
        images = sum(n for n, _ in have)
        rows.append(sum((n * row for n, row in have), torch.zeros(())) / images if have else start[c].double())
    return torch.stack(rows)


@pytest.mark.parametrize("block", [2**23, 1])
def test_each_row_is_weighted_by_the_images_of_its_class(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_algebra, "_CLIENT_NUMBERS", block)
    trained, start = heads(CLIENTS), heads()
    found = class_mean_head(trained, COUNTS, start)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, by_hand(trained[name], start[name], COUNTS), rtol=1e-14, atol=1e-14)
        assert torch.equal(tensor[[1, 4]], start[name][[1, 4]].double()), "as it was sent, to the bit"


def test_with_equal_shares_it_is_the_plain_mean_and_other_heads_leave_the_factors_alone() -> None:
    factors, _ = references.random_clients(clients=CLIENTS)
    clients, start = AdapterState({"layer": factors}, heads(CLIENTS)), AdapterState({}, heads())
    sizes = torch.tensor([1, 2, 3, 6])
    weights = sizes / sizes.sum().double()
    plain = aggregate(FedIT(), clients, weights)
    even = aggregate(FedIT(), clients, weights, AdapterState({"layer": references.mean(factors, weights)}, heads()),
                     class_counts=sizes.unsqueeze(1).expand(-1, CLASSES))  # fmt: skip
    skewed = aggregate(FedIT(), clients, weights, AdapterState({"layer": references.mean(factors, weights)},
                       start.head), class_counts=COUNTS)  # fmt: skip
    for name in plain.head:
        assert torch.equal(even.head[name], plain.head[name])
        assert not torch.allclose(skewed.head[name], plain.head[name])
    assert torch.equal(skewed.factors["layer"].A, plain.factors["layer"].A)


@pytest.mark.parametrize("images", [[1, 2, 3, 6], [7] * 40])
def test_with_equal_shares_it_is_the_plain_mean_to_the_last_bit_of_float64(images: list[int]) -> None:
    trained, counts = heads(len(images)), torch.tensor(images)
    plain = mean_head(trained, counts / counts.sum().double())
    for name, tensor in class_mean_head(trained, 3 * counts.unsqueeze(1).expand(-1, CLASSES), heads()).items():
        assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize("name", METHODS.names)
def test_every_method_that_averages_heads_takes_it(name: str) -> None:
    pairs = ("federation.head_weighting=class", f"method.name={name}")
    if METHODS[name].pools_data or "head" in METHODS[name].personal_parts:
        assert name not in ("fedit", "lora_fair", "flex_lora", "fedex_lora", "flora")
        with pytest.raises(ConfigError, match=rf"head_weighting=class has no effect with method\.name={name}, .*fedit"):
            method_of(load_config(*pairs))
    else:
        assert isinstance(method_of(load_config(*pairs)), METHODS[name])

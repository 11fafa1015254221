"""Clients that lower their LoRA rank: the penalty against autograd, the rule against loops, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorafair.aggregation.het_lora import HETLoRA
from lorafair.aggregation.rank_pruning import RankPruning, add_penalty, tail_products
from lorafair.aggregation.registry import build_aggregator, method_of
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.model.adapter import AdapterLayout, LoRAFactors
from lorafair.server.step import pruned_rows

Tiny = Callable[..., Config]
LAYOUT = AdapterLayout.of({"a": ((6, 5), (7, 6)), "b": ((6, 4), (3, 6))}, {"head": (2, 2)})
RANKS = [6, 4, 1]
HALF = RankPruning(decay=0.5, penalty=0.3, smallest=1)


@pytest.mark.parametrize(
    ("pruning", "kept"),
    [
        (HALF, [3, 2, 1]),
        (RankPruning(0.99, 0.0, 1), [5, 3, 1]),
        (RankPruning(0.5, 0.0, 4), [4, 4, 1]),
        (RankPruning(0.1, 0.0, 2), [2, 2, 1]),
    ],
)
def test_a_rank_goes_down_by_the_decay_but_not_below_the_smallest(pruning: RankPruning, kept: list[int]) -> None:
    assert [pruning.kept(rank) for rank in RANKS] == kept
    last = pruning.last_directions(RANKS, 6)
    for k, rank in enumerate(RANKS):
        assert last[k].nonzero().flatten().tolist() == list(range(kept[k], rank))


def test_the_penalty_has_the_gradient_that_autograd_finds() -> None:
    values = torch.randn(3, LAYOUT.length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values.requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for k, rank in enumerate(RANKS):
        kept = HALF.kept(rank)
        if kept < rank:
            for factors in LAYOUT.unpack(values).factors.values():
                loss = loss + 0.3 * factors.B[k][:, kept:rank].norm() * factors.A[k][kept:rank].norm()
    [expected] = torch.autograd.grad(loss, [values])
    gradient = torch.ones_like(values.detach())
    last = HALF.last_directions(RANKS, 6)
    add_penalty(LAYOUT.unpack(gradient).factors, LAYOUT.unpack(values.detach()).factors, last, HALF.penalty)
    torch.testing.assert_close(gradient - 1, expected)


def test_the_penalty_of_zeros_is_zero() -> None:
    values, gradient = torch.zeros(3, LAYOUT.length), torch.zeros(3, LAYOUT.length)
    add_penalty(LAYOUT.unpack(gradient).factors, LAYOUT.unpack(values).factors, HALF.last_directions(RANKS, 6), 1.0)
    assert not gradient.any()


def test_clients_give_up_what_has_become_smaller_in_training() -> None:
    """Of four clients: smaller, larger, of one direction, and smaller in one layer but not in the sum."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(LAYOUT.length, generator=generator)
    rows, ranks = start.repeat(4, 1), [6, 6, 1, 4]
    for k, (first, second) in enumerate([(0.5, 0.5), (1.1, 1.1), (0.5, 0.5), (0.5, 9.0)]):
        layers = LAYOUT.unpack(rows[k]).factors
        layers["a"].B.mul_(first)
        layers["b"].A.mul_(second)
    expected = []
    for k, rank in enumerate(ranks):
        kept = HALF.kept(rank)
        scores = [
            sum(
                np.linalg.norm(f.B[:, kept:rank].numpy()) * np.linalg.norm(f.A[kept:rank].numpy())
                for f in LAYOUT.unpack(row).factors.values()
            )
            for row in (start, rows[k])
        ]
        expected.append(kept if scores[1] < scores[0] else rank)
    assert expected == [3, 6, 1, 4]
    experiment: Any = SimpleNamespace(
        aggregator=HETLoRA(pruning=0.5),
        config=SimpleNamespace(model=SimpleNamespace(lora=SimpleNamespace(rank=6))),
        lora_ranks=(),
    )
    state: Any = SimpleNamespace(lora_ranks=torch.tensor([9, *ranks]))
    results: Any = SimpleNamespace(rows=rows, clients=(1, 2, 3, 4))
    left, found = pruned_rows(experiment, state, LAYOUT, results, start)
    assert found == expected
    for k, rank in enumerate(expected):
        before, after = LAYOUT.unpack(rows[k]), LAYOUT.unpack(left[k])
        for path, factors in after.factors.items():
            assert torch.equal(factors.A[:rank], before.factors[path].A[:rank])
            assert not factors.A[rank:].any()
            assert not factors.B[:, rank:].any()
        assert torch.equal(after.head["head"], before.head["head"])


def test_the_sum_of_products_is_of_the_given_directions_alone() -> None:
    factors = LoRAFactors(A=torch.tensor([[3.0, 4.0], [1.0, 0.0]]), B=torch.tensor([[2.0, 5.0]]))
    last = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    expected = [10.0, 5.0, (26 * 29) ** 0.5, 0.0]
    torch.testing.assert_close(tail_products([factors], last), torch.tensor(expected, dtype=torch.float64))


def test_pruning_is_off_unless_asked_for_and_has_defaults() -> None:
    assert HETLoRA().rank_pruning is None
    built = build_aggregator({"name": "het_lora", "pruning": 0.9})
    assert built.rank_pruning == RankPruning(0.9, 0.01, 1) == HETLoRA(pruning=0.9).rank_pruning
    with pytest.raises(ConfigError, match=r"it needs method\.pruning"):
        build_aggregator({"name": "het_lora", "smallest_rank": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fabric.server=sharded"], "fabric.server=sharded does not fit method.name=het_lora"),
        (["client.scaffold=true", "client.optimizer=sgd"], "client.scaffold=true does not fit method.name=het_lora"),
        (["federation.initialization=local"], "by which LoRA ranks change"),
    ],
)
def test_what_does_not_fit_pruning_is_refused(tiny: Tiny, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of(tiny("method.name=het_lora", "method.pruning=0.5", *options))

"""The collectives: rows in plan order whatever the ranks, one broadcast down, one error on all ranks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.flora import FLoRA
from lorafair.cluster.arithmetic import keep_freed_memory
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.collectives import (
    ClientResults,
    broadcast_update,
    drop_nonfinite,
    exchange_columns,
    gather_clients,
    sum_over_ranks,
)
from lorafair.communication.traffic import BYTES_PER_NUMBER, round_traffic
from lorafair.config.loading import load_config
from lorafair.errors import ConfigError, LorafairError
from lorafair.launch import make_fabric
from lorafair.model.adapter import PARTS, AdapterLayout, LoRAFactors, Part
from lorafair.schedule import RoundPlan
from tests.conftest import run_ranks

LAYOUT = AdapterLayout(factors={"a": ((2, 3), (5, 2)), "b": ((2, 4), (5, 2))}, head={"head.bias": (3,)})


def plan(clients_of_rank: tuple[tuple[int, ...], ...]) -> RoundPlan:
    clients = tuple(sorted(c for of_rank in clients_of_rank for c in of_rank))
    cohorts = tuple(tuple((c,) for c in of_rank) for of_rank in clients_of_rank)
    return RoundPlan(clients=clients, weights=(1 / len(clients),) * len(clients), cohorts_of_rank=cohorts)


def gathered(fabric: Any, clients_of_rank: tuple[tuple[int, ...], ...]) -> list[list[float]]:
    mine = clients_of_rank[fabric.global_rank]
    rows = torch.tensor([[10.0 * c, 10.0 * c + 1] for c in mine]).view(len(mine), 2)
    return gather_clients(fabric, rows, clients_of_rank).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("clients_of_rank", [((7, 2, 4),), ((4,), (7, 2)), ((2, 4), (), (7,))], ids=["1", "2", "3"])
def test_rows_arrive_in_plan_order_from_uneven_and_empty_ranks(clients_of_rank: tuple[tuple[int, ...], ...]) -> None:
    for rows in run_ranks(len(clients_of_rank), gathered, clients_of_rank):
        assert rows == [[20, 21], [40, 41], [70, 71]]


COLUMNS = {1: ((slice(0, 7),),), 2: ((slice(0, 7),), ()), 3: ((slice(4, 5),), (), (slice(0, 4), slice(5, 7)))}


def exchanged(fabric: Any, clients_of_rank: tuple[tuple[int, ...], ...]) -> list[list[float]]:
    mine = clients_of_rank[fabric.global_rank]
    rows = torch.tensor([[10.0 * client + column for column in range(7)] for client in mine]).view(len(mine), 7)
    return exchange_columns(fabric, rows, clients_of_rank, COLUMNS[fabric.world_size]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("at_a_time", [2**24, 6, 1], ids="{} numbers at a time".format)
@pytest.mark.parametrize("clients_of_rank", [((7, 2, 4),), ((4,), (7, 2)), ((2, 4), (), (7,))], ids=["1", "2", "3"])
def test_every_rank_gets_its_columns_of_all_clients_in_plan_order(
    clients_of_rank: tuple[tuple[int, ...], ...], at_a_time: int
) -> None:
    ranks = len(clients_of_rank)
    for rank, rows in enumerate(run_ranks(ranks, few_at_a_time, at_a_time, clients_of_rank)):
        columns = [column for span in COLUMNS[ranks][rank] for column in range(span.start, span.stop)]
        assert rows == [[10 * client + column for column in columns] for client in (2, 4, 7)]


def few_at_a_time(fabric: Any, numbers: int, clients_of_rank: tuple[tuple[int, ...], ...]) -> list[list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafair.communication.collectives._NUMBERS_AT_A_TIME", numbers)
        return exchanged(fabric, clients_of_rank)


def update() -> ServerUpdate:
    state = LAYOUT.unpack(torch.arange(1.0, LAYOUT.length + 1))
    folded = LoRAFactors(A=torch.full((6, 4), 2.0), B=torch.full((5, 6), 3.0))  # of a LoRA rank that only rank 0 knows
    return ServerUpdate(factors=state.factors, folded={"b": folded}, head=state.head, sent_lora_rank={"a": 2, "b": 2})


def received(fabric: Any, parts: tuple[Part, ...]) -> tuple[list[float], dict[str, tuple[Any, Any]]]:
    numbers, folded = broadcast_update(
        fabric, update() if fabric.is_global_zero else None, LAYOUT, parts=parts, folds=True
    )
    return numbers.tolist(), {path: (f.A.tolist(), f.B.tolist()) for path, f in folded.items()}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [PARTS, ("B", "head"), ("A", "head"), ()])
def test_every_rank_receives_what_rank_0_sends(parts: tuple[Part, ...]) -> None:
    sent = update()
    expected = LAYOUT.select(torch.arange(1.0, LAYOUT.length + 1), parts)
    for numbers, folded in run_ranks(2, received, parts):
        assert numbers == expected.tolist()
        assert folded == {path: (f.A.tolist(), f.B.tolist()) for path, f in sent.folded.items()}


def totals(fabric: Any) -> list[int]:
    return sum_over_ranks(fabric, torch.tensor([1, fabric.global_rank])).tolist()


@pytest.mark.slow
def test_sums_over_ranks() -> None:
    assert run_ranks(3, totals) == [[3, 3]] * 3


def failing(fabric: Any) -> str:
    try:
        with same_error_on_all_ranks(fabric):
            if fabric.global_rank == 1:
                raise ConfigError("the file is gone")
    except LorafairError as error:
        return f"raised {error}"
    except SystemExit as leaving:
        return f"left with {leaving.code}"
    return "went on"


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_is_told_once() -> None:
    assert run_ranks(2, failing) == ["raised the file is gone", "left with 2"]


def returned(fabric: Any, rows: list[list[float]], made: RoundPlan) -> ClientResults:
    mine = made.clients_of_rank[fabric.global_rank]
    trained = torch.tensor([rows[made.clients.index(c)] for c in mine]).view(len(mine), 4)
    found = drop_nonfinite(fabric, trained, made)
    return replace(found, rows=found.rows.numpy())  # a plain array travels


@pytest.mark.slow
@pytest.mark.parametrize("cohorts_of_rank", [(((3, 5), (6, 9)),), (((9,), (3,)), (), ((5, 6),))], ids=["1", "3"])
def test_clients_with_nan_or_infinity_are_left_out_and_weights_renormalised(cohorts_of_rank: Any) -> None:
    rows = [[1.0, 2, 0.5, 9], [math.nan, 2, 0.75, 8], [3.0, 4, 0.25, 7], [3.0, math.inf, 0.125, 6]]
    made = RoundPlan(clients=(3, 5, 6, 9), weights=(0.1, 0.2, 0.3, 0.4), cohorts_of_rank=cohorts_of_rank)
    for found in run_ranks(len(cohorts_of_rank), returned, rows, made):
        assert (found.clients, found.dropped) == ((3, 6), (5, 9))
        assert found.weights == pytest.approx((0.25, 0.75))
        assert found.losses == (0.5, 0.25)
        assert found.seconds == (9, 8, 7, 6)
    for rank, found in enumerate(run_ranks(len(cohorts_of_rank), returned, rows, made)):
        mine = [client for client in made.clients_of_rank[rank] if client in (3, 6)]
        assert found.rows.tolist() == [rows[made.clients.index(client)][:2] for client in mine]


@pytest.mark.slow
def test_no_client_left_is_for_the_caller_to_handle() -> None:
    [found] = run_ranks(1, returned, [[math.nan] * 4] * 2, plan(((0, 1),)))
    assert (found.clients, found.weights, found.dropped) == ((), (), (0, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"fabric\.accelerator=cuda: no CUDA device is visible"):
        make_fabric(load_config(["fabric.accelerator=cuda"]).fabric)


FAULTS_BEFORE_AND_AFTER = """
import resource, torch
from lorafair.cluster.arithmetic import keep_freed_memory

def page_faults():  # of 50 activations of 20 MB, one after the other
    torch.ones(5_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults(), int(keep_freed_memory()), page_faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_of_activations_is_used_again() -> None:
    """In processes of their own: it cannot be undone, and a heap may lie where the system cannot let it grow."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    for _ in range(3):
        code = [sys.executable, "-c", FAULTS_BEFORE_AND_AFTER]
        output = subprocess.run(code, env=environment, capture_output=True, text=True, check=True).stdout
        before, kept, after = map(int, output.split())
        if not kept:
            pytest.skip("another C library")
        if after < before / 10:
            return
    pytest.fail(f"{before} page faults before, and {after} after")


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "100000"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=100000")]
)
def test_the_choice_of_who_sets_malloc_options_is_theirs(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


def update_of_many() -> ServerUpdate:
    """Layer a is kept as a matrix, beside the identity; layer b as factors."""
    factors = update().factors
    folded = {
        "a": LoRAFactors(A=torch.eye(3), B=torch.arange(15.0).view(5, 3)),
        "b": LoRAFactors(A=torch.arange(8.0).view(2, 4), B=torch.ones(5, 2)),
    }
    return ServerUpdate(factors=factors, folded=folded, head=update().head, sent_lora_rank={})


def received_of_many(fabric: Any) -> tuple[int, list[list[list[float]]]]:
    sizes: list[int] = []
    broadcast = dist.broadcast

    def counted(tensor: torch.Tensor, src: int) -> None:
        sizes.append(tensor.numel())
        broadcast(tensor, src)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", counted)
        sent = update_of_many() if fabric.is_global_zero else None
        _, folded = broadcast_update(fabric, sent, LAYOUT, parts=(), folds=True)
    return sizes[-1], [tensor.tolist() for f in folded.values() for tensor in (f.A, f.B)]


@pytest.mark.parametrize(
    ("factors", "numbers"),
    [
        (update_of_many().folded["a"], 5 * 3),  # a matrix, and an identity
        (update_of_many().folded["b"], 2 * (4 + 5)),
        # Larger than the matrix, which would have to be computed, and round differently, on every number of processes.
        (LoRAFactors(A=torch.ones(64, 4), B=torch.ones(5, 64)), 64 * (4 + 5)),
    ],
)
def test_what_is_reported_is_what_is_broadcast(
    factors: LoRAFactors, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "a" if factors.A.shape[1] == 3 else "b"
    made = ServerUpdate(factors=update().factors, folded={path: factors}, head=update().head, sent_lora_rank={})
    sizes: list[int] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sizes.append(tensor.numel()))
    of_two: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    _, folded = broadcast_update(of_two, made, LAYOUT, parts=FLoRA().receives(0), folds=True)
    traffic = round_traffic(LAYOUT, FLoRA(), made, 0, (2, 2, 2))
    forms, message = sizes
    assert forms == 2 * len(LAYOUT.factors)
    assert traffic.down == 3 * BYTES_PER_NUMBER * message
    assert message == numbers + LAYOUT.length_of(FLoRA().receives(0))
    assert torch.equal(folded[path].A, factors.A)


@pytest.mark.slow
def test_an_identity_is_not_sent() -> None:
    expected = [tensor.tolist() for f in update_of_many().folded.values() for tensor in (f.A, f.B)]
    assert run_ranks(2, received_of_many) == [(15 + 8 + 10, expected)] * 2

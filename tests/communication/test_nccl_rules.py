"""Whole federations on 8 and 12 processes, held to the rules of NCCL: the same operations on every rank, equal bits."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lorafair.federation as federation_module
from lorafair import third_party
from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.coded_fold import Coding
from lorafair.checkpointing.partial_round import list_unfinished
from lorafair.client import training
from lorafair.cluster.signals import Interrupted, handling_signals
from lorafair.communication.agreement import close_process_group, is_peer_loss, same_error_on_all_ranks
from lorafair.communication.collectives import (
    broadcast_update,
    exchange_columns,
    gather_clients,
    gather_objects,
    on_all_ranks,
    sum_over_ranks,
)
from lorafair.config.loading import load_config
from lorafair.errors import ConfigError, LorafairError
from lorafair.federation import run_federation
from lorafair.model.adapter import PARTS, AdapterLayout, LoRAFactors
from tests.communication.recording import (
    BrokenRuleError,
    Operation,
    Recorded,
    check,
    disagreement,
    pretended,
    recording,
)
from tests.conftest import TINY, run_ranks
from tests.test_federation import adapter_of, assert_same_bits

SMALL = (
    *TINY, "data.train_images=20", "data.test_images=12", "evaluation.batch_size=3", "client.steps=1",
    "model.lora.last_blocks=1", "rounds=2", "model.prefix_cache=never",
)  # fmt: skip
FEW = ("method.name=lora_fair",)  # three clients: other ranks have none
MANY = ("partition.scheme=iid", "partition.clients=14", "client.batch_size=4")
RUNS: dict[str, tuple[str, ...]] = {
    "few": FEW,
    "few_sharded": (*FEW, "fabric.server=sharded"),
    "failed_client": (*MANY, "method.name=flora", "fabric.server=sharded"),  # folds; the LoRA ranks travel, too
    "coded": (*MANY, "method.name=fedex_lora", "method.fold_bits=4", "federation.head_weighting=class"),
    "kept_by_clients": (*MANY, "method.name=fedsa_lora"),
    "stopped": (*MANY, "method.name=lora_fair", "fabric.server=sharded"),
}
BROKEN = 3  # a client


def federation(fabric: Any, run: str, folder: Path, *, stopping_rank: int = -1) -> str:
    """One run on this rank; returns how it has ended."""
    config = load_config([*SMALL, *RUNS[run], f"run_dir={folder / run}"])
    train_cohort, train_clients = training.Trainer.train, federation_module.train_clients

    def train(*arguments: Any) -> Any:
        if fabric.global_rank == stopping_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_cohort(*arguments)

    def with_a_failed_client(experiment: Any, state: Any, plan: Any, *others: Any) -> torch.Tensor:
        rows = train_clients(experiment, state, plan, *others)
        for index, client in enumerate(plan.clients_of_rank[fabric.global_rank][: len(rows)]):
            if run == "failed_client" and client == BROKEN:
                rows[index, 5] = float("nan")
        return rows

    with pytest.MonkeyPatch.context() as patch, handling_signals():
        patch.setattr(training.Trainer, "train", train)
        patch.setattr(federation_module, "train_clients", with_a_failed_client)
        try:
            run_federation(fabric, config)
        except Interrupted:
            return "stopped"
    return "done"


def failing(fabric: Any) -> str:
    """One rank has an error."""
    try:
        with same_error_on_all_ranks(fabric):
            if fabric.global_rank == 2:
                raise ConfigError("the file is gone")
    except (LorafairError, SystemExit) as error:
        return type(error).__name__
    return "went on"


def everything(fabric: Any, runs: Sequence[str], folder: Path) -> dict[str, tuple[str, Recorded]]:
    """All runs one after the other in the same processes."""
    found: dict[str, tuple[str, Recorded]] = {}
    for run in runs:
        for name in ("stopped", "continued") if run == "stopped" else (run,):
            with recording() as recorded:
                end = federation(fabric, run, folder, stopping_rank=1 if name == "stopped" else -1)
            found[name] = (end, recorded)
    if fabric.world_size > 1:
        with recording() as recorded:
            found["failing"] = (failing(fabric), recorded)
        with recording() as recorded:
            close_process_group(fabric)
            found["end"] = ("", recorded)
    return found


def alone(fabric: Any, folder: Path) -> None:
    for run in RUNS:
        federation(fabric, run, folder)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(1, alone, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "runs"), [(8, tuple(RUNS)), (12, ("few_sharded",))])
def test_every_rank_does_the_same_in_nccls_order_and_bits_are_those_of_one_process(
    processes: int, runs: tuple[str, ...], expected: Path, tmp_path: Path
) -> None:
    found = run_ranks(processes, everything, runs, tmp_path)
    assert [of_rank["failing"][0] for of_rank in found] == ["LorafairError", *["SystemExit"] * (processes - 1)]
    for name in found[0]:
        assert disagreement([of_rank[name][1] for of_rank in found]) == "", name
    for run in runs:
        assert_same_bits(adapter_of(tmp_path / run), adapter_of(expected / run))
    if "failed_client" in runs:
        assert json.loads((tmp_path / "failed_client" / "result.json").read_text())["totals"]["dropped"] == 2
    if "stopped" in runs:
        assert {of_rank["stopped"][0] for of_rank in found} == {"stopped"}
        assert {of_rank["continued"][0] for of_rank in found} == {"done"}
    assert list_unfinished(tmp_path / runs[-1]) == {}


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.ones(2, device="meta"), "is on meta, not on cpu"),
        (torch.ones(2, 3).T, "is not contiguous"),
        (torch.ones(2, dtype=torch.int16), "is of torch.int16, which NCCL has not"),
        (torch.ones(2, dtype=torch.complex64), "is of torch.complex64, which NCCL has not"),
        (torch.ones(0, 3), "is empty"),
    ],
)
def test_a_tensor_that_nccl_would_not_take_is_found(tensor: torch.Tensor, what: str) -> None:
    with pytest.raises(BrokenRuleError, match=what):
        check(tensor, torch.device("cpu"), "all_reduce")


SUM, LARGER = Operation("all_reduce", 3, torch.float32), Operation("all_reduce", 4, torch.float32)
SEND, RECEIVE = Operation("send", 3, torch.float32, peer=0), Operation("receive", 3, torch.float32, peer=1)
SHORT = Operation("receive", 2, torch.float32, peer=1)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ([SUM, RECEIVE, SUM], [SUM, SEND, SUM], ""),
        ([SUM], [LARGER], "operation 0 is"),
        ([SUM, LARGER], [SUM], "rank 1 has 1 collectives and rank 0 2"),
        ([SUM], [SUM, SEND], r"rank 1 sends \[\(3, torch.float32\)\] and rank 0 receives \[\]"),
        ([SUM, RECEIVE], [SUM], r"rank 1 sends \[\] and rank 0 receives"),
        ([SUM, SHORT], [SUM, SEND], "rank 0 receives"),
        ([SUM, RECEIVE, SUM], [SUM, SUM, SEND], "after collective 1 rank 1 sends"),
    ],
)
def test_ranks_that_do_not_do_the_same_are_found(first: list[Any], second: list[Any], what: str) -> None:
    assert re.search(what, disagreement([Recorded(first), Recorded(second)])) is not None
    assert bool(disagreement([Recorded(first), Recorded(second)])) == bool(what)


LAYOUT = AdapterLayout(factors={"a": ((2, 3), (5, 2)), "b": ((2, 4), (5, 2))}, head={"head.bias": (3,)})


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_tensor_that_is_handed_to_the_group_is_on_the_device(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors hold no numbers; where one is asked for, it is 3."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [3] * tensor.numel())
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: 3)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    monkeypatch.setattr("pickle.dumps", lambda mine: b"abc")
    monkeypatch.setattr("pickle.loads", lambda data: "an object")
    device = torch.device("meta")
    clients = [[4, 1], [], [0]]
    rows = torch.empty(len(clients[rank]), LAYOUT.length, device=device)
    state = LAYOUT.unpack(torch.empty(LAYOUT.length, device=device))
    update = ServerUpdate(factors=state.factors, folded={}, head=state.head, sent_lora_rank={})
    with pretended(rank, 3, "meta") as fabric, recording(device, perform=False) as recorded:
        assert on_all_ranks(fabric, True)
        assert gather_clients(fabric, rows, clients).shape == (3, LAYOUT.length)
        columns = [LAYOUT.columns_of(shard, PARTS) for shard in LAYOUT.split(3)]
        assert exchange_columns(fabric, rows, clients, columns).device == device
        assert sum_over_ranks(fabric, torch.empty(2, device=device)).device == device
        broadcast_update(fabric, update if rank == 0 else None, LAYOUT, parts=PARTS, folds=False)
        folded = {
            path: LoRAFactors(A=torch.empty(3, a[1], device=device), B=torch.empty(b[0], 3, device=device))
            for path, (a, b) in LAYOUT.factors.items()
        }
        coded = replace(update, folded=folded) if rank == 0 else None
        row, found = broadcast_update(fabric, coded, LAYOUT, parts=PARTS, folds=True, coding=Coding(4, half_start=True))
        assert {row.device, *(factors.A.device for factors in found.values())} == {device}
        assert gather_objects(fabric, "an object") == (["an object"] * 3 if rank == 0 else None)
        with pytest.raises(LorafairError if rank == 0 else SystemExit), same_error_on_all_ranks(fabric):
            raise ConfigError("the file is gone")
    assert {op.name for op in recorded.operations} >= {"all_reduce", "broadcast", "send"}


def test_one_nccl_group_is_opened_on_the_processes_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL alone, so that no tensor goes another way; the device is given, so that its communicator is made there.

    That takes seconds on many nodes and happens while `rendezvous` watches. Without a device, barriers and the pickles
    of objects would go to the first one of a node.
    """
    from lightning_fabric.accelerators import cuda
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: given.update(more, backend=backend))
    monkeypatch.setattr(dist, "barrier", lambda **more: given.update(barrier=more))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(cuda, "_check_cuda_matmul_precision", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    strategy: Any = third_party.quiet_ddp_strategy(timedelta(minutes=7))
    strategy.accelerator, strategy.cluster_environment = cuda.CUDAAccelerator(), LightningEnvironment()
    strategy.parallel_devices = [torch.device("cuda", index) for index in range(2)]
    strategy.setup_environment()
    mine = torch.device("cuda", 1)
    assert (given["backend"], given["device_id"], given["current"]) == ("nccl", mine, mine)
    assert given["timeout"] == timedelta(minutes=7)


@pytest.mark.parametrize(
    "message",
    [
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, Timeout(ms)=1800)",
        "NCCL communicator was aborted on rank 3.",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error",
    ],
)
def test_errors_of_nccl_mean_that_another_process_is_lost(message: str) -> None:
    """As TORCH_NCCL_BLOCKING_WAIT=1 raises them; by default the process is ended instead."""
    assert is_peer_loss(dist.DistBackendError(message))


def test_the_last_barrier_is_fabrics_which_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("closed"))
    monkeypatch.setattr(dist, "barrier", lambda: pytest.fail("of no device"))
    fabric: Any = SimpleNamespace(world_size=2, barrier=lambda: done.append("barrier"))
    close_process_group(fabric)
    assert done == ["barrier", "closed"]

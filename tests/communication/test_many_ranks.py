"""Single ranks of 8, 64 and 1,024, with PyTorch's group that sends nothing: shapes, plans, bytes, memory, requests.

Nothing that a rank does may grow with the number of ranks but what is written here.
"""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafair import third_party
from lorafair.aggregation.base import ServerUpdate
from lorafair.caching import shared_array
from lorafair.communication.agreement import StopRequest, same_error_on_all_ranks
from lorafair.communication.collectives import (
    ClientResults,
    broadcast_update,
    drop_nonfinite,
    gather_clients,
    gather_objects,
)
from lorafair.communication.progress import SharedCount
from lorafair.config import Config, LoRAConfig, ModelConfig
from lorafair.model.adapter import PARTS, AdapterLayout
from lorafair.schedule import RoundPlan, Scheduler
from lorafair.server.step import Rank0Server, Server, ShardedServer
from tests.communication.recording import disagreement, pretended, recording
from tests.torch_private import TorchDispatchMode

MANY = (8, 64, 1024)
CLIENTS = 100
LAYOUT = AdapterLayout(
    factors={f"blocks.{b}": ((2, 24), (8, 2)) for b in range(24)}, head={"head.weight": (10, 8), "head.bias": (10,)}
)
WORDS = 4 * LAYOUT.length  # bytes of a row
SERVERS: dict[str, type[Server]] = {"rank0": Rank0Server, "sharded": ShardedServer}


def plan(ranks: int, clients: int = CLIENTS) -> RoundPlan:
    """The product's, of clients of unlike sizes."""
    sizes = [10 + 7 * (client % 13) for client in range(clients)]
    return Scheduler(
        seed=0, sizes=sizes, costs=sizes, clients_per_round=None, weighting="size", cohort=1, world_size=ranks
    ).plan(0, measured={})  # fmt: skip


def server_of(fabric: Any, kind: str, *, keeps: bool = False) -> tuple[Server, Any]:
    """A server of this rank and its state; nothing else of an experiment is needed here."""
    aggregator = SimpleNamespace(trains=lambda round_index: PARTS, personal_parts=(), pools_data=False)
    experiment: Any = SimpleNamespace(
        fabric=fabric, layout=LAYOUT, aggregator=aggregator, personal_parts=(), lora_ranks=[2] * CLIENTS,
        config=Config(model=ModelConfig(lora=LoRAConfig(rank=2))),
    )  # fmt: skip
    personal = torch.zeros(CLIENTS, LAYOUT.length) if keeps else None
    state: Any = SimpleNamespace(
        completed_rounds=0, adapter=torch.zeros(LAYOUT.length), personal_adapters=personal, controls=None, moments=None
    )
    return SERVERS[kind](experiment), state


class Allocated(TorchDispatchMode):
    """Adds up the memory of the tensors that the block makes: at least what it needs at once."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[Any] = []  # kept, so that none is at the place of another

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        made = function(*arguments, **(more or {}))
        given = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, Tensor)}
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._storages.append(tensor.untyped_storage())
        return made

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(storage.nbytes() for storage in self._storages)


def some_ranks(ranks: int) -> list[int]:
    """All of 8; else those at the ends and in the middle."""
    return list(range(8)) if ranks == 8 else [0, 1, 24, 30, ranks // 2, ranks - 1]


@pytest.mark.parametrize("ranks", MANY)
@pytest.mark.parametrize("kind", SERVERS)
def test_rows_travel_once_and_memory_is_that_of_what_is_sent_and_received(kind: str, ranks: int) -> None:
    """fabric.server=rank0 and sharded, every rank's bytes against what the plan says."""
    made = plan(ranks)
    everyone = made.clients_of_rank
    for rank in some_ranks(ranks):
        rows = torch.ones(len(everyone[rank]), LAYOUT.length)
        results = ClientResults(made.clients, made.weights, (), (), (), rows)
        with pretended(rank, ranks) as fabric, recording() as recorded:
            fabric_did_something(fabric)
            server, state = server_of(fabric, kind)
            with Allocated() as allocated:
                gathered = server.gather(state, made, results)
        mine = server.shard.length
        assert gathered.rows.shape == (CLIENTS, mine)
        assert recorded.bytes_of("send") == 4 * len(rows) * (LAYOUT.length - mine)
        assert recorded.bytes_of("receive") == 4 * (CLIENTS - len(rows)) * mine
        assert allocated.bytes <= 4 * (3 * CLIENTS * mine + len(rows) * LAYOUT.length) + 16 * 8 * CLIENTS
        messages = len(recorded.operations) - 1
        # With each rank that has clients where this one aggregates, and with each that aggregates where it has clients.
        busy, servers = sum(map(bool, everyone)), sum(bool(shard.length) for shard in server.shards)
        assert messages <= busy * bool(mine) + servers * bool(len(rows))


def fabric_did_something(fabric: Any) -> None:
    """As any run has before its first round."""
    with same_error_on_all_ranks(fabric):
        pass


@pytest.mark.parametrize("ranks", MANY)
def test_what_clients_keep_needs_as_much_on_1024_ranks_even_if_one_has_all_of_it(ranks: int) -> None:
    """An interrupted round gives its finished clients to rank 0: an all-gather would pad all ranks to that many."""
    whole = plan(ranks)
    finished = tuple((client,) for client in whole.clients)
    everyone = RoundPlan(whole.clients, whole.weights, (finished, *[()] * (ranks - 1)))
    for rank in some_ranks(ranks)[:3]:
        rows = torch.ones(len(everyone.clients_of_rank[rank]), LAYOUT.length)
        with pretended(rank, ranks) as fabric, recording() as recorded:
            server, state = server_of(fabric, "rank0", keeps=True)
            with Allocated() as allocated:
                gathered = server.gather(state, everyone, ClientResults(whole.clients, whole.weights, (), (), (), rows))
        assert gathered.rows.shape == (CLIENTS, LAYOUT.length)
        assert recorded.bytes_of("all_reduce") == CLIENTS * WORDS
        assert allocated.bytes <= CLIENTS * WORDS + 64 * CLIENTS


@pytest.mark.parametrize("ranks", MANY)
def test_losses_and_seconds_are_one_small_sum(ranks: int) -> None:
    made = plan(ranks)
    for rank in some_ranks(ranks):
        trained = torch.ones(len(made.clients_of_rank[rank]), LAYOUT.length + 2)
        with pretended(rank, ranks) as fabric, recording() as recorded, pytest.MonkeyPatch.context() as patch:
            # Nothing arrives: the other ranks' clients would count as not finite.
            patch.setattr("lorafair.communication.collectives.gather_clients", summed(ranks))
            drop_nonfinite(fabric, trained, made)
        assert [(op.name, op.numbers) for op in recorded.operations] == [("all_reduce", 3 * CLIENTS)]


def summed(ranks: int) -> Any:
    def gather(fabric: Any, rows: Tensor, clients_of_rank: Any) -> Tensor:
        return gather_clients(fabric, rows, clients_of_rank).fill_(1)

    return gather


@pytest.mark.parametrize("ranks", MANY)
def test_objects_arrive_without_padding(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sharded server's results: PyTorch's gather_object would take W times the largest on rank 0."""
    lengths = {rank: 1000 if rank < 25 else 10 for rank in range(ranks)}
    monkeypatch.setattr("pickle.loads", lambda data: len(data))
    for rank in some_ranks(ranks):
        monkeypatch.setattr("pickle.dumps", lambda mine, rank=rank: bytes(lengths[rank]))
        with pretended(rank, ranks) as fabric, recording() as recorded:
            sizes = torch.tensor(list(lengths.values()))
            monkeypatch.setattr(
                "lorafair.communication.collectives.sum_over_ranks",
                lambda fabric, tensor, sizes=sizes: (torch.distributed.all_reduce(tensor), tensor.copy_(sizes)),
            )
            with Allocated() as allocated:
                found = gather_objects(fabric, "mine")
        assert found == (list(lengths.values()) if rank == 0 else None)
        others = sum(lengths.values()) - lengths[0]
        assert recorded.bytes_of("receive") == (others if rank == 0 else 0)
        assert recorded.bytes_of("send") == (0 if rank == 0 else lengths[rank])
        assert allocated.bytes <= sum(lengths.values()) + 8 * ranks + 1000


@pytest.mark.parametrize("ranks", MANY)
def test_the_update_is_one_broadcast_of_an_adapter(ranks: int) -> None:
    zeros = LAYOUT.unpack(torch.zeros(LAYOUT.length))
    for rank in (0, ranks - 1):
        update = ServerUpdate(factors=zeros.factors, folded={}, head=zeros.head, sent_lora_rank={})
        with pretended(rank, ranks) as fabric, recording() as recorded:
            received, _ = broadcast_update(fabric, update if rank == 0 else None, LAYOUT, parts=PARTS, folds=False)
        assert received.shape == (LAYOUT.length,)
        assert [(op.name, op.numbers) for op in recorded.operations] == [("broadcast", LAYOUT.length)]


@pytest.mark.parametrize("kind", SERVERS)
def test_all_8_ranks_of_a_plan_send_and_receive_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pickle.loads", lambda data: None)  # nothing arrives
    made, ranks = plan(8, clients=6), []  # two ranks without a client
    for rank, clients in enumerate(made.clients_of_rank):
        rows = torch.ones(len(clients), LAYOUT.length)
        with pretended(rank, 8) as fabric, recording() as recorded:
            fabric_did_something(fabric)
            server, state = server_of(fabric, kind)
            server.gather(state, made, ClientResults(made.clients, made.weights, (), (), (), rows))
            if kind == "sharded":
                gather_objects(fabric, list(server.shard.factors))
        ranks.append(recorded)
    for recorded in ranks:  # pickles differ in length, which is what is sent around before
        recorded.operations = [op for op in recorded.operations if op.dtype is not torch.uint8]
    assert disagreement(ranks) == ""


def test_plans_of_1024_ranks_cost_little_time() -> None:
    """What every rank computes alone in a round, on 1,024 ranks with 10,000 clients."""
    with pretended(0, 1024) as fabric:
        began = time.process_time()
        made = plan(1024, clients=10_000)
        assert len(made.clients_of_rank) == 1024
        assert time.process_time() - began < 0.5
        loads = [len(clients) for clients in made.clients_of_rank]
        assert sum(loads) == 10_000
        for kind in SERVERS:
            server, _ = server_of(fabric, kind)
            began = time.process_time()
            columns = [LAYOUT.columns_of(shard, PARTS) for shard in server.shards]
            assert time.process_time() - began < 0.02
            assert sum(span.stop - span.start for spans in columns for span in spans) == LAYOUT.length


class CountingStore:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        def ask(*_: Any) -> int:
            self.asked[name] += 1
            return 0

        return ask


@pytest.mark.parametrize("ranks", MANY)
def test_rank_0_is_not_asked_more_than_it_can_answer(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks together, with clients that take no time: the store answers about 20,000 requests a second."""
    now, store = [0.0], CountingStore()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(third_party, "default_store", lambda: store)
    fabric: Any = SimpleNamespace(world_size=ranks, is_global_zero=False)
    stop, clients, images = StopRequest(fabric), SharedCount(fabric), SharedCount(fabric)
    seconds = 60
    for step in range(100 * seconds):
        now[0] = step / 100
        stop.is_set("cohort")
        clients.add(1)
        images.add(32)
    assert store.asked["check"] > 60
    assert store.asked["add"] > 30
    assert ranks * store.asked.total() / seconds < 2100


@pytest.mark.parametrize("ranks", MANY)
def test_the_ranks_of_a_node_share_a_files_parts_whatever_other_nodes_there_are(
    ranks: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and tokens are prepared once a node, by its own eight ranks; a run that finds them asks each rank once."""
    array = shared_array.SharedArray(tmp_path / "a.npy", (40, 3), shared_array.np.float32, rows=2)
    looked: list[slice] = []
    monkeypatch.setattr(shared_array, "_state", lambda array, some: looked.append(some) or shared_array._GOOD)
    array.file.touch()
    for rank in range(ranks - 8, ranks):
        with pretended(rank, ranks) as fabric, recording() as recorded:
            fabric.strategy = SimpleNamespace(num_processes=8)
            assert shared_array.build_together(fabric, array, iter, "tokens") == array.file
        assert [op.numbers for op in recorded.operations] == [2, 1]
    assert sorted(part for some in looked for part in range(20)[some]) == list(range(20))

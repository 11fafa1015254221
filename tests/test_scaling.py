"""benchmarks/scaling.py: what it predicts agrees with what the collectives do, and with what must hold."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.scaling import Federation, Parts, federation, most_overlap, predict, small, training
from lorafair.communication.collectives import ClientResults
from lorafair.config import Config
from lorafair.config.loading import load_config
from lorafair.server.step import Rank0Server, ShardedServer
from tests.communication.recording import pretended, recording
from tests.communication.test_many_ranks import LAYOUT, fabric_did_something

FREE = Parts(
    images_per_second=100.0, evaluated_per_second=math.inf, step=0.0, cohort=0.0, server=(0.0, 0.0), rest=(0.0, 0.0),
    message=0.0, pickle=math.inf, nvlink=1.0, network=1.0,
)  # fmt: skip


@pytest.fixture
def case() -> Federation:
    model: Any = SimpleNamespace(adapters=SimpleNamespace(layout=LAYOUT), numbers_per_image=lambda: 10**6)
    return federation(load_config(["data.source=synthetic", "client.batch_size=32"]), model, 40, sigma=1.0)


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("server", ["rank0", "sharded"])
def test_predicted_bytes_are_those_of_the_busiest_rank(case: Federation, server: str, ranks: int) -> None:
    plan, _ = training(case, FREE, ranks)
    busiest = 0
    for rank, clients in enumerate(plan.clients_of_rank):
        experiment: Any = SimpleNamespace(
            layout=LAYOUT,
            personal_parts=(),
            aggregator=SimpleNamespace(trains=lambda r: ("A", "B", "head")),
            config=Config(),
        )
        state: Any = SimpleNamespace(
            completed_rounds=0, personal_adapters=None, controls=None, adapter=torch.zeros(LAYOUT.length)
        )
        rows = torch.zeros(len(clients), LAYOUT.length)
        with pretended(rank, ranks) as fabric, recording() as recorded:
            fabric_did_something(fabric)
            experiment.fabric = fabric
            made = (Rank0Server if server == "rank0" else ShardedServer)(experiment)
            made.gather(state, plan, ClientResults(plan.clients, plan.weights, (), (), (), rows))
        busiest = max(busiest, recorded.bytes_of("send"), recorded.bytes_of("receive"))
    assert predict(case, FREE, ranks, server)["gather"] == busiest  # at a byte a second


def test_one_gpu_sends_nothing_and_more_gpus_never_train_longer(case: Federation) -> None:
    alone = predict(case, FREE, 1, "rank0")
    assert (alone["gather"], alone["broadcast"], small(1)) == (0, 0, 0)
    assert alone["train"] == pytest.approx(sum(case.sizes) / 100)
    times = [predict(case, FREE, gpus, "sharded")["train"] for gpus in (1, 8, 64, 1024)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(max(case.sizes) / 100)  # the largest client is the limit


def test_overlap_hides_nothing_of_a_single_cohort_a_gpu_and_never_more_than_there_is() -> None:
    seconds = {"gather": 2.0, "server": 3.0, "evaluate": 5.0}
    assert most_overlap(seconds, cohorts=1) == 3.0
    assert most_overlap(seconds, cohorts=4) == 1.5 + 3.0
    assert most_overlap(seconds | {"evaluate": 0.0}, cohorts=0.1) == 0.0


def test_a_step_takes_its_shortest_time_however_few_images_it_has(case: Federation) -> None:
    slow = replace(FREE, step=10.0, cohort=1.0)
    _, loads = training(case, slow, 1)
    steps = sum(math.ceil(size / 32) for size in case.sizes)
    assert loads[0] == pytest.approx(10 * steps + len(case.sizes))


def test_clients_of_so_many_steps_train_as_many_however_large_they_are(case: Federation) -> None:
    fixed = replace(case, config=load_config(["data.source=synthetic", "client.batch_size=32", "client.steps=7"]))
    _, loads = training(fixed, replace(FREE, step=10.0, images_per_second=math.inf), 1)
    assert loads[0] == pytest.approx(10 * 7 * len(case.sizes))
    _, loads = training(fixed, FREE, 1)
    assert loads[0] == pytest.approx(sum(7 * size / math.ceil(size / 32) for size in case.sizes) / 100)

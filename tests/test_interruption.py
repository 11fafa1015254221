"""Runs that are stopped within a round: what is done is kept and not trained again, and the result has equal bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lorafair.federation as federation_module
from lorafair.checkpointing.checkpoint import (
    list_checkpoints,
    load_checkpoint,
)
from lorafair.checkpointing.partial_round import list_unfinished
from lorafair.client import training
from lorafair.cluster import signals
from lorafair.cluster.signals import (
    Interrupted,
    handling_signals,
    request_stop,
    set_time_limit,
)
from lorafair.comparison.run import run_comparison
from lorafair.comparison.section import load_comparison
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.federation import run_federation
from tests.conftest import TINY, launched, run_ranks

Tiny = Callable[..., Config]
TRAINER = training.Trainer  # trains one cohort after the other
SIX_CLIENTS = (
    *TINY, "data.train_images=40", "data.test_images=24", "partition.scheme=iid", "partition.clients=6",
    "client.batch_size=8", "method.name=lora_fair",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
    yield
    signals.reset()


def run(fabric: Any, arguments: Sequence[str], *, asking_rank: int = -1, after: int = 0) -> tuple[str, list[int]]:
    """Run a federation on a rank; how it ended, and the clients this rank has trained.

    One rank gets a SIGUSR1 while it trains, after it has trained `after` cohorts.
    """
    trained: list[int] = []
    train_clients, train_cohort = federation_module.train_clients, TRAINER.train

    def note_clients(experiment: Any, state: Any, plan: Any, partial: Any, stop: Any) -> torch.Tensor:
        add = partial.add
        partial.add = lambda cohort, rows: (trained.extend(cohort), add(cohort, rows))
        return train_clients(experiment, state, plan, partial, stop)

    def train_and_signal(*arguments: Any) -> Any:
        if fabric.global_rank == asking_rank and len(trained) >= after:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_cohort(*arguments)

    with pytest.MonkeyPatch.context() as patch, handling_signals():
        patch.setattr(federation_module, "train_clients", note_clients)
        patch.setattr(TRAINER, "train", train_and_signal)
        try:
            run_federation(fabric, load_config(arguments))
        except Interrupted as stop:
            return str(stop), trained
    return "done", trained


def final_adapter(folder: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(folder)[-1]).tensors["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize(("cohort", "method"), [(1, "lora_fair"), (2, "flora")])
def test_a_signal_to_one_rank_stops_all_within_the_round_and_no_client_is_trained_twice(
    cohort: int, method: str, tmp_path: Path
) -> None:
    options = [*SIX_CLIENTS, f"client.cohort={cohort}", f"method.name={method}"]
    run(launched(1), [*options, f"run_dir={tmp_path / 'whole'}"])
    stopped = [*options, f"run_dir={tmp_path / 'stopped'}"]
    ends = run_ranks(2, run_and_stop, stopped, 1)
    first = [client for _, trained in ends for client in trained]
    assert len(ends[1][1]) == cohort  # the rank with the signal stops after the cohort it was training
    assert cohort <= len(first) <= 6
    for end, _ in ends:
        assert end.startswith(f"stopped by SIGUSR1 in round 1 of 2, with {len(first)} of its 6 clients done")
    assert list_unfinished(tmp_path / "stopped").keys() == {0}
    assert list_checkpoints(tmp_path / "stopped") == []

    ends = run_ranks(3, run, stopped)
    again = [client for _, trained in ends for client in trained]
    assert sorted(first + again) == sorted([*range(6), *range(6)])  # two rounds of six clients
    assert torch.equal(final_adapter(tmp_path / "stopped"), final_adapter(tmp_path / "whole"))
    assert list_unfinished(tmp_path / "stopped") == {}


def run_and_stop(fabric: Any, arguments: Sequence[str], asking_rank: int) -> tuple[str, list[int]]:
    return run(fabric, arguments, asking_rank=asking_rank)


@pytest.mark.slow
@pytest.mark.parametrize("asking_rank", [-1, 0])
def test_work_given_ahead_as_to_a_gpu_changes_nothing(
    asking_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric = launched(1)
    run(fabric, [*SIX_CLIENTS, f"run_dir={tmp_path / 'whole'}"])
    monkeypatch.setattr(training, "_cohorts_ahead", lambda device: 2)
    options = [*SIX_CLIENTS, f"run_dir={tmp_path / 'ahead'}"]
    end, trained = run(fabric, options, asking_rank=asking_rank, after=2)
    if asking_rank == 0:
        assert end.startswith(f"stopped by SIGUSR1 in round 1 of 2, with {len(trained)} of its 6 clients done")
        assert len(trained) == 5  # two are done when the signal comes, and three are in training
        end, more = run(fabric, options)
        trained += more
    assert (end, sorted(trained)) == ("done", sorted([*range(6), *range(6)]))
    assert torch.equal(final_adapter(tmp_path / "ahead"), final_adapter(tmp_path / "whole"))


@pytest.mark.slow
def test_a_round_may_be_stopped_again_and_again(tmp_path: Path) -> None:
    fabric = launched(1)
    run(fabric, [*SIX_CLIENTS, f"run_dir={tmp_path / 'whole'}"])
    stopped, trained = [*SIX_CLIENTS, f"run_dir={tmp_path / 'stopped'}"], []
    for _ in range(12):
        end, clients = run(fabric, stopped, asking_rank=0, after=0)
        assert end.startswith("stopped by SIGUSR1")
        trained += clients
    end, clients = run(fabric, stopped)
    assert (end, clients) == ("done", [])
    assert sorted(trained) == sorted([*range(6), *range(6)])
    assert torch.equal(final_adapter(tmp_path / "stopped"), final_adapter(tmp_path / "whole"))


def test_a_stop_saves_a_round_that_was_not_due(tmp_path: Path) -> None:
    arguments = [*SIX_CLIENTS, f"run_dir={tmp_path}", "rounds=3", "checkpoint.every=3"]
    end, _ = run(launched(1), arguments, asking_rank=0, after=8)
    assert "in round 2 of 3, with 3 of its 6 clients done" in end
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000001"]


def test_an_error_keeps_the_clients_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_cohort, calls = TRAINER.train, []

    def fail_at_the_fourth(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("Connection closed by peer")
        return train_cohort(*arguments)

    monkeypatch.setattr(TRAINER, "train", fail_at_the_fourth)
    arguments = [*SIX_CLIENTS, f"run_dir={tmp_path}", "rounds=1"]
    with pytest.raises(RuntimeError, match="closed by peer"):
        run_federation(launched(1), load_config(arguments))
    monkeypatch.undo()
    assert len(run(launched(1), arguments)[1]) == 3


@pytest.mark.parametrize("place", ["aggregate", "evaluate", "log_and_save"])
def test_clients_of_a_round_that_ends_after_its_training_are_not_trained_again(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state has moved on by then; what is written has to say what the clients started from."""
    arguments = [*SIX_CLIENTS, f"run_dir={tmp_path}", "rounds=1", "data.train_images=24", "data.test_images=6"]

    def fail(*_: Any) -> None:
        raise RuntimeError(place)

    with monkeypatch.context() as patch:
        patch.setattr(federation_module, place, fail)
        with pytest.raises(RuntimeError, match=place):
            run_federation(launched(1), load_config(arguments))
    assert list_checkpoints(tmp_path) == []
    capsys.readouterr()
    assert run(launched(1), arguments) == ("done", [])
    said = capsys.readouterr().out
    assert "round 1: 6 clients done before the interruption" in said
    assert "is not used" not in said


def limited(fabric: Any, arguments: Sequence[str]) -> str:
    """Rank 1 alone knows that the job ends; the clients take half a second each."""
    train_cohort = TRAINER.train

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return train_cohort(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRAINER, "train", slowly)
        patch.setattr(signals, "MARGIN_SECONDS", 0.5)
        if fabric.global_rank == 1:
            set_time_limit(6)
        try:
            run_federation(fabric, load_config(arguments))
        except Interrupted as stop:
            return str(stop)
    return "done"


@pytest.mark.slow
def test_a_run_stops_before_the_limit_of_its_job(tmp_path: Path) -> None:
    began = time.monotonic()
    ends = run_ranks(2, limited, [*SIX_CLIENTS, f"run_dir={tmp_path}", "rounds=20"])
    assert all(end.startswith("stopped by the job's time limit in round ") for end in ends)
    assert 2 < time.monotonic() - began < 30
    assert list_checkpoints(tmp_path)


def test_work_given_ahead_counts_as_what_is_left_before_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: training returns at once, and a cohort's 100 s pass while its numbers are waited for."""
    clock, given = [0.0], list[int]()
    train_cohort, rows = TRAINER.train, training._CohortInTraining.rows

    def at_once(trainer: Any, cohort: tuple[int, ...], *arguments: Any) -> Any:
        given.append(len(given))
        return train_cohort(trainer, cohort, *arguments)

    def waited_for(cohort: Any) -> torch.Tensor:
        clock[0] += 100
        return rows(cohort)

    monkeypatch.setattr(training, "_cohorts_ahead", lambda device: 1)
    monkeypatch.setattr(training._Stopwatch, "seconds", lambda self: 100.0)
    monkeypatch.setattr(TRAINER, "train", at_once)
    monkeypatch.setattr(training._CohortInTraining, "rows", waited_for)
    monkeypatch.setattr("lorafair.cluster.signals.time", SimpleNamespace(monotonic=lambda: clock[0]))
    with handling_signals():
        set_time_limit(350)
        with pytest.raises(Interrupted, match="time limit in round 1 of 2, with 3 of its 6 clients done"):
            run_federation(launched(1), load_config([*SIX_CLIENTS, f"run_dir={tmp_path}"]))
    # 100 s for the first. The next two end at 300 s; a fourth, with the margin, would not have ended at 350 s.
    assert len(given) == 3
    assert clock[0] == 300


@pytest.mark.slow
def test_a_comparison_stops_and_continues(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text("compare: {methods: [fedit, lora_fair], seeds: [0]}\n")
    arguments = [str(file), *(a for a in SIX_CLIENTS if not a.startswith("method")), f"run_dir={tmp_path / 'runs'}"]
    comparison = load_comparison(arguments)
    assert comparison is not None
    request_stop(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM before default / fedit-seed0"):
        run_comparison(launched(1), comparison)
    signals.reset()
    run_comparison(launched(1), comparison)
    assert [comparison.state(run)[0] for run in comparison.runs] == ["done", "done"]

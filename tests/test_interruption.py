"""Runs that are stopped within a round: what is done is kept, nobody trains it again, and the result has equal bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafair.federation as federation_module
from lorafair import cli, interruption
from lorafair.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    mark_begun,
    resume_of_restarted,
    save_checkpoint,
)
from lorafair.cluster import Job
from lorafair.comparison import load_comparison
from lorafair.comparison_run import run_comparison
from lorafair.config import Config, load_config
from lorafair.federation import run_federation
from lorafair.interruption import (
    ANOTHER_RANK,
    NOTHING,
    TIME_LIMIT,
    Interrupted,
    ask,
    ask_unless_it_fits,
    asked,
    expect_end_in,
    listen_only_to,
    listening,
)
from lorafair.partial_round import PartialRound, list_unfinished
from tests.conftest import TINY, launched, run_ranks

Tiny = Callable[..., Config]
SIX_CLIENTS = (
    *TINY, "data.train_images=40", "data.test_images=24", "partition.scheme=iid", "partition.clients=6",
    "client.batch_size=8", "method.name=lora_fair",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
    yield
    interruption.forget()


def run(fabric: Any, arguments: Sequence[str], *, asking_rank: int = -1, after: int = 0) -> tuple[str, list[int]]:
    """Run a federation on a rank; how it ended, and the clients this rank has trained.

    One rank gets a SIGUSR1 while it trains, after it has trained `after` cohorts.
    """
    trained: list[int] = []
    train_clients, train_cohort = federation_module.train_clients, federation_module.train_cohort

    def note_clients(federation: Any, state: Any, plan: Any, partial: Any, sign: Any) -> torch.Tensor:
        add = partial.add
        partial.add = lambda cohort, rows: (trained.extend(cohort), add(cohort, rows))
        return train_clients(federation, state, plan, partial, sign)

    def train_and_signal(*arguments: Any, **options: Any) -> Any:
        if fabric.global_rank == asking_rank and len(trained) >= after:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_cohort(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, listening():
        patch.setattr(federation_module, "train_clients", note_clients)
        patch.setattr(federation_module, "train_cohort", train_and_signal)
        try:
            run_federation(fabric, load_config(arguments))
        except Interrupted as stop:
            return str(stop), trained
    return "done", trained


def final_adapter(folder: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(folder)[-1]).tensors["adapter"]


@pytest.mark.parametrize(("cohort", "method"), [(1, "lora_fair"), (2, "flora")])
def test_a_signal_to_one_rank_stops_all_within_the_round_and_nobody_is_trained_twice(
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


def test_a_library_that_makes_an_error_of_its_own_of_ctrl_c_does_not_hide_it() -> None:
    def listen(times: int) -> None:
        with listening():
            try:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            finally:
                raise RecursionError("an import that was cut short")

    with pytest.raises(KeyboardInterrupt):
        listen(2)
    with pytest.raises(RecursionError):
        listen(1)


def test_a_stop_saves_a_round_that_was_not_due(tmp_path: Path) -> None:
    arguments = [*SIX_CLIENTS, f"run_dir={tmp_path}", "rounds=3", "checkpoint.every=3"]
    end, _ = run(launched(1), arguments, asking_rank=0, after=8)
    assert "in round 2 of 3, with 3 of its 6 clients done" in end
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000001"]


def test_an_error_keeps_the_clients_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_cohort, calls = federation_module.train_cohort, []

    def fail_at_the_fourth(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("Connection closed by peer")
        return train_cohort(*arguments, **options)

    monkeypatch.setattr(federation_module, "train_cohort", fail_at_the_fourth)
    arguments = [*SIX_CLIENTS, f"run_dir={tmp_path}", "rounds=1"]
    with pytest.raises(RuntimeError, match="closed by peer"):
        run_federation(launched(1), load_config(arguments))
    monkeypatch.undo()
    assert len(run(launched(1), arguments)[1]) == 3


def partial(tmp_path: Path, start: str = "s", seconds: float = 60) -> PartialRound:
    return PartialRound(tmp_path, 3, lambda: start, seconds)


def found(tmp_path: Path, start: str = "s") -> dict[tuple[int, ...], list[list[float]]]:
    reader = partial(tmp_path, start)
    reader.read()
    return {cohort: rows.tolist() for cohort, rows in reader.found.items()}


def test_finished_cohorts_come_back(tmp_path: Path) -> None:
    round_4 = partial(tmp_path)
    round_4.add((7, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    round_4.add((5,), torch.tensor([[5.0, 6.0]]))
    assert found(tmp_path) == {}  # so soon, nothing is written
    round_4.write()
    assert found(tmp_path) == {(7, 2): [[1, 2], [3, 4]], (5,): [[5, 6]]}
    assert list_unfinished(tmp_path).keys() == {3}


def test_a_long_round_is_written_as_it_goes(tmp_path: Path) -> None:
    round_4 = partial(tmp_path, seconds=0)
    for client in (4, 1):
        round_4.add((client,), torch.full((1, 2), float(client)))
        assert (client,) in found(tmp_path)
    assert len(list((tmp_path / "checkpoints" / "unfinished_000004").iterdir())) == 2


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_named_and_ignored(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    round_4 = partial(tmp_path, seconds=0)
    for client in (4, 1):
        round_4.add((client,), torch.full((1, 2), float(client)))
    damage(tmp_path / "checkpoints" / "unfinished_000004" / "clients_000004.safetensors")
    assert found(tmp_path) == {(1,): [[1, 1]]}
    [line] = capsys.readouterr().out.splitlines()
    assert "clients_000004.safetensors is not used" in line
    round_4 = partial(tmp_path, seconds=0)
    round_4.add((4,), torch.full((1, 2), 4.0))
    assert found(tmp_path).keys() == {(1,), (4,)}


def test_clients_that_started_from_something_else_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial(tmp_path, seconds=0).add((4,), torch.ones(1, 2))
    assert found(tmp_path, start="another seed") == {}
    assert "started from something else" in capsys.readouterr().out


def test_clients_that_cannot_be_written_are_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"finished clients could not be saved as .*unfinished_000004"):
        partial(tmp_path, seconds=0).add((4,), torch.ones(1, 2))


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_signals_only_set_a_flag_and_ctrl_c_stops_at_once_the_second_time() -> None:
    with listening():
        assert asked() == NOTHING
        send(signal.SIGUSR1)
        assert asked() == signal.SIGUSR1
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert asked() == NOTHING
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_that_are_not_listened_to_have_their_usual_effect() -> None:
    with listening():
        listen_only_to(["USR2"])
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        send(signal.SIGUSR2)
        assert asked() == signal.SIGUSR2


def test_a_forked_process_does_not_act_on_a_signal() -> None:
    with listening():
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            os._exit(asked())
        assert os.waitpid(child, 0)[1] == 0


def test_what_would_not_end_before_the_jobs_limit_asks_to_stop() -> None:
    ask_unless_it_fits(1e6)
    assert asked() == NOTHING  # nobody knows of a limit
    expect_end_in(100)
    ask_unless_it_fits(50)
    assert asked() == NOTHING
    ask_unless_it_fits(85)
    assert asked() == TIME_LIMIT


def test_the_weightiest_reason_counts() -> None:
    for reason in (ANOTHER_RANK, signal.SIGUSR1, TIME_LIMIT, signal.SIGTERM):
        ask(reason)
    assert asked() == TIME_LIMIT


def limited(fabric: Any, arguments: Sequence[str]) -> str:
    """Rank 1 alone knows that the job ends; the clients take half a second each."""
    train_cohort = federation_module.train_cohort

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return train_cohort(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation_module, "train_cohort", slowly)
        patch.setattr(interruption, "MARGIN_SECONDS", 0.5)
        if fabric.global_rank == 1:
            expect_end_in(6)
        try:
            run_federation(fabric, load_config(arguments))
        except Interrupted as stop:
            return str(stop)
    return "done"


def test_a_run_stops_before_the_limit_of_its_job(tmp_path: Path) -> None:
    began = time.monotonic()
    ends = run_ranks(2, limited, [*SIX_CLIENTS, f"run_dir={tmp_path}", "rounds=20"])
    assert all(end.startswith("stopped by the job's time limit in round ") for end in ends)
    assert 2 < time.monotonic() - began < 30
    assert list_checkpoints(tmp_path)


def test_a_comparison_stops_and_continues(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text("compare: {methods: [fedit, lora_fair], seeds: [0]}\n")
    arguments = [str(file), *(a for a in SIX_CLIENTS if not a.startswith("method")), f"run_dir={tmp_path / 'runs'}"]
    comparison = load_comparison(arguments)
    assert comparison is not None
    ask(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM before default / fedit-seed0"):
        run_comparison(launched(1), comparison)
    interruption.forget()
    run_comparison(launched(1), comparison)
    assert [comparison.state(run)[0] for run in comparison.runs] == ["done", "done"]


RUNNING, ENDING = ("RUNNING", "None"), ("COMPLETING", "None")


@pytest.mark.parametrize(
    ("reason", "job", "state", "refusal", "status", "line", "requeued"),
    [
        (signal.SIGUSR1, Job("7_1", 0), RUNNING, "", 75, "job 7_1 is requeued and continues", True),
        (TIME_LIMIT, Job("7", 2), RUNNING, "", 75, "job 7 is requeued", True),
        (signal.SIGTERM, Job("7", 0), ("COMPLETING", "TimeLimit"), "", 75, "job 7 is requeued", True),
        (signal.SIGTERM, Job("7", 0), RUNNING, "", 75, "job 7 is requeued", True),  # preempted
        (signal.SIGTERM, Job("7", 0), ENDING, "", 75, r"Slurm ends job 7 \(COMPLETING\) by itself", False),  # scancel
        (signal.SIGUSR1, Job("7", 3), RUNNING, "", 1, "requeued 3 times, and fabric.max_requeues=3 ends that", False),
        (signal.SIGUSR1, Job("7", 0), RUNNING, "not allowed", 75, r"could not be requeued \(not allowed\)", True),
        (signal.SIGUSR1, Job("7", 0), ("", ""), "no scontrol", 75, r"could not be requeued \(no scontrol\)", True),
        (signal.SIGTERM, None, RUNNING, "", 75, "the same command continues", False),
        (signal.SIGINT, Job("7", 0), RUNNING, "", 130, "the same command continues", False),
    ],
)
def test_who_is_requeued_and_how_the_command_ends(
    reason: int, job: Job | None, state: tuple[str, str], refusal: str, status: int, line: str, requeued: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked_for = []
    monkeypatch.setattr(cli, "state_of_job", lambda job: state)
    monkeypatch.setattr(cli, "requeue", lambda job: asked_for.append(job) or refusal)
    assert cli.after_stop(Interrupted(reason, "in round 1"), job, max_requeues=3)[0] == status
    assert asked_for == ([job] if requeued else [])
    assert_matches(line, cli.after_stop(Interrupted(reason, "in round 1"), job, max_requeues=3)[1])


def assert_matches(pattern: str, text: str) -> None:
    import re

    assert re.search(pattern, text), text


def test_a_job_about_to_be_ended_waits_for_it_where_nobody_can_requeue_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preempted job whose processes end by themselves counts as completed; one that is killed is requeued."""
    waited: list[float] = []
    monkeypatch.setattr(cli, "state_of_job", lambda job: ("", ""))
    monkeypatch.setattr(cli, "requeue", lambda job: "scontrol: not found")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert cli.after_stop(Interrupted(signal.SIGTERM, "in round 1"), Job("7", 0), max_requeues=3)[0] == 75
    assert waited == [cli.SECONDS_UNTIL_KILLED]
    assert "waiting for Slurm to end it" in capsys.readouterr().out


def test_a_requeued_job_goes_on_where_it_began_with_resume_never(tmp_path: Path) -> None:
    began, again, other = Job("7", 0), Job("7", 1), Job("8", 1)
    assert resume_of_restarted(tmp_path, "never", began) == "never"
    assert resume_of_restarted(tmp_path, "never", again) == "never"  # it was requeued before it began
    mark_begun(tmp_path, began)
    assert resume_of_restarted(tmp_path, "never", began) == "never"
    assert resume_of_restarted(tmp_path, "never", again) == "auto"
    assert resume_of_restarted(tmp_path, "never", other) == "never"
    assert resume_of_restarted(tmp_path, "never", None) == "never"
    assert resume_of_restarted(tmp_path, "runs/other", again) == "runs/other"  # nothing of its own is saved yet
    save_checkpoint(tmp_path, Checkpoint(1, {"adapter": torch.zeros(1)}, {}), keep=2)
    assert resume_of_restarted(tmp_path, "runs/other", again) == "auto"

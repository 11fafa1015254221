"""Runs of a draw that share their training: the same bits as without, and honest numbers of what was shared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafair.comparison.run as run_module
import lorafair.federation as federation_module
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.checkpointing.lock import acquire
from lorafair.client.training import Trainer
from lorafair.comparison.plan import Comparison
from lorafair.comparison.run import run_comparison
from lorafair.comparison.section import load_comparison
from lorafair.comparison.sharing import FOLDER, WorkingOn, draw_of, shared_training
from lorafair.comparison.tables import seconds_of
from lorafair.errors import ConfigError
from lorafair.registry import METHODS
from tests.conftest import launched, run_ranks

COMMON = """
rounds: 2
data: {source: synthetic, train_images: 12, test_images: 8}
model: {name: test_vit, weights: random, image_size: 32, lora: {rank: 4, last_blocks: 2}}
client: {optimizer: adamw, learning_rate: 0.005, batch_size: 8}
partition: {scheme: dirichlet, clients_per_domain: 2, min_images: 2}
federation: {clients_per_round: 3}
fabric: {accelerator: cpu, devices: 1}
checkpoint: {every: 1}
"""
FOUR = """
compare:
  methods:
    fedit: {}
    averaged: {method.name: fedit, evaluation.average_rounds: 2}
    classes: {method.name: fedit, federation.head_weighting: class}
    ffa_lora: {}
  seeds: [0]
"""


def declared(folder: Path, section: str, name: str = "out") -> Comparison:
    file = folder / "methods.yaml"
    file.write_text(f"{COMMON}{section}\n")
    return loaded(file, folder / name)


def loaded(file: Path, folder: Path) -> Comparison:
    comparison = load_comparison([str(file), f"run_dir={folder}"])
    assert comparison is not None
    return comparison


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "report_runs", lambda *_: None)


def run_all(fabric: Any, comparison: Comparison, *, quiet: bool = False) -> None:
    """`quiet`: without the reports of runs, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "report_runs", lambda *_: None)
        if quiet:
            patch.setattr(federation_module, "open_report", lambda *_: contextlib.nullcontext())
        run_comparison(fabric, comparison)


def adapters(comparison: Comparison) -> dict[str, dict[str, torch.Tensor]]:
    return {run.folder.name: load_checkpoint(list_checkpoints(run.folder)[-1]).tensors for run in comparison.runs}


def assert_same_bits(one: Comparison, other: Comparison) -> None:
    mine, theirs = adapters(one), adapters(other)
    assert mine.keys() == theirs.keys()
    for run, tensors in mine.items():
        assert tensors.keys() == theirs[run].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[run][name]), f"{run}: {name}"


@contextlib.contextmanager
def counting() -> Iterator[list[tuple[str, int, tuple[int, ...]]]]:
    """What is trained in the block: the run, the round and the cohort."""
    trained, train = [], Trainer.train

    def counted(self: Trainer, cohort: tuple[int, ...], *arguments: Any) -> Any:
        trained.append((self.experiment.config.folder.name, self.state.completed_rounds + 1, cohort))
        return train(self, cohort, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", counted)
        yield trained


def result_of(comparison: Comparison, index: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((comparison.runs[index].folder / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four methods with and without sharing, and what the first has trained."""
    folder = tmp_path_factory.mktemp("four")
    shared, alone = declared(folder, FOUR), declared(folder, f"{FOUR}  share_training: false", "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        with counting() as trained:
            run_all(launched(1), shared)
        run_all(launched(1), alone)
    return {"shared": shared, "alone": alone, "trained": trained}


def test_what_starts_alike_is_trained_once(four: dict[str, Any]) -> None:
    rounds = {(run, number) for run, number, _ in four["trained"]}
    assert rounds == {
        ("fedit-seed0", 1), ("fedit-seed0", 2), ("classes-seed0", 2), ("ffa_lora-seed0", 1), ("ffa_lora-seed0", 2),
    }  # fmt: skip
    assert_same_bits(four["shared"], four["alone"])
    for index in range(4):
        results = result_of(four["shared"], index), result_of(four["alone"], index)
        for key in ("accuracy", "mean_loss", "recall", "config", "start"):
            assert results[0][key] == results[1][key]
        assert results[0]["totals"]["bytes"] == results[1]["totals"]["bytes"]
    assert not (four["shared"].folder / FOLDER).exists()
    assert not (four["alone"].folder / FOLDER).exists()


def test_the_numbers_say_what_was_shared(four: dict[str, Any]) -> None:
    fedit, averaged, classes, ffa = (result_of(four["shared"], index)["totals"] for index in range(4))
    assert "shared_clients" not in fedit
    assert "shared_clients" not in ffa
    assert "shared_clients" not in result_of(four["alone"], 1)["totals"]
    assert averaged["shared_clients"] == 6
    assert classes["shared_clients"] == 3
    assert 0 < classes["shared_seconds"] < averaged["shared_seconds"]
    lines = [line.split(",") for line in (four["shared"].runs[1].folder / "metrics.csv").read_text().splitlines()]
    of_rounds = {(number, name): float(value) for number, name, value in lines[1:]}
    assert of_rounds["1", "time/shared_training"] + of_rounds["2", "time/shared_training"] == pytest.approx(
        averaged["shared_seconds"]
    )
    assert of_rounds["1", "time/idle_fraction/rank0"] == 0
    assert of_rounds["1", "time/train"] < of_rounds["1", "time/shared_training"]
    result = result_of(four["shared"], 1)
    assert seconds_of(result) == pytest.approx(averaged["seconds"] + averaged["shared_seconds"])
    assert seconds_of({**result, "processes": 2}) < seconds_of(result)
    assert seconds_of(result_of(four["alone"], 1)) == result_of(four["alone"], 1)["totals"]["seconds"]


EVERY_METHOD = "\n".join(
    ["compare:", "  seeds: [3]", "  methods:", "    averaged: {method.name: fedit, evaluation.average_rounds: 1}"]
    + [f"    {name}: {{}}" for name in METHODS.names]
    + ["    coded: {method: {name: lora_fair, fold: true, fold_bits: 4}, federation.head_weighting: class}"]
)


@pytest.mark.slow
def test_every_method_has_the_same_bits_with_and_without_sharing(tmp_path: Path) -> None:
    shared = declared(tmp_path, EVERY_METHOD)
    alone = declared(tmp_path, f"{EVERY_METHOD}\n  share_training: false", "alone")
    with counting() as trained:
        run_all(launched(1), shared, quiet=True)
    run_all(launched(1), alone, quiet=True)
    assert_same_bits(shared, alone)
    first = {run for run, number, _ in trained if number == 1}
    assert len(first) < len(shared.runs) / 3
    assert not {run for run, number, _ in trained if number == 2} - {run.folder.name for run in shared.runs}


def on_ranks(fabric: Any, file: Path, folder: Path) -> None:
    run_all(fabric, loaded(file, folder), quiet=True)


@pytest.mark.slow
def test_the_same_bits_on_two_ranks_that_take_over_what_one_has_trained(four: dict[str, Any], tmp_path: Path) -> None:
    # Round 1 was trained on one rank, in a run that ends before its result.
    mixed = declared(tmp_path, FOUR, "mixed")
    stopped_after_training(mixed, 0)
    run_ranks(2, on_ranks, tmp_path / "methods.yaml", mixed.folder)
    assert_same_bits(four["alone"], mixed)


def stopped_after_training(comparison: Comparison, index: int) -> None:
    """One run that ends abruptly before the server step of its first round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation_module, "gather", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_comparison(launched(1), comparison, index=index)


@pytest.mark.slow
def test_after_a_kill_nothing_is_trained_twice_and_bits_are_the_same(four: dict[str, Any], tmp_path: Path) -> None:
    comparison = declared(tmp_path, FOUR)
    with counting() as before:
        stopped_after_training(comparison, 2)
    assert {(run, number) for run, number, _ in before} == {("classes-seed0", 1)}
    assert list((comparison.folder / FOLDER).rglob("*.safetensors"))
    with counting() as after:
        run_all(launched(1), comparison)
    assert not {(number, cohort) for run, number, cohort in after if run != "ffa_lora-seed0" and number == 1}
    assert_same_bits(four["alone"], comparison)


@pytest.mark.slow
def test_what_is_damaged_is_trained_again(
    four: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = declared(tmp_path, FOUR)
    stopped_after_training(comparison, 0)
    [file] = (comparison.folder / FOLDER).rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    run_all(launched(1), comparison, quiet=True)
    printed = capsys.readouterr().out
    assert f"{file} is not used: it does not match its checksum; its clients are trained again" in printed
    assert_same_bits(four["alone"], comparison)


TWO_DRAWS = "compare: {methods: [fedit, lora_fair], draws: 2}"


def test_runs_are_done_draw_by_draw_and_those_of_another_process_last(tmp_path: Path) -> None:
    comparison = declared(tmp_path, "compare: {methods: [fedit, lora_fair], seeds: [4, 2]}")
    assert [run.folder.name for run in comparison.in_order] == [
        "fedit-seed4", "lora_fair-seed4", "fedit-seed2", "lora_fair-seed2",
    ]  # fmt: skip
    order: list[str] = []

    def execute(fabric: Any, comparison: Comparison, run: Any, progress: str, working: WorkingOn) -> Any:
        if not working.try_draw(run):
            return run_module.Outcome(postponed=True)
        order.append(f"{progress} {run.folder.name}")
        return run_module.Outcome()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "execute_run", execute)
        other = WorkingOn(comparison)
        assert other.try_draw(comparison.runs[0])
        assert not WorkingOn(comparison).try_draw(comparison.runs[0])
        run_comparison(launched(1), comparison)
        assert order == ["[3/4] fedit-seed2", "[4/4] lora_fair-seed2", "[1/4] fedit-seed4", "[2/4] lora_fair-seed4"]
        other.release()
        assert WorkingOn(comparison).try_draw(comparison.runs[0])


def test_only_runs_that_differ_in_their_evaluation_share_rounds_after_the_first(tmp_path: Path) -> None:
    comparison = declared(tmp_path, FOUR)
    shared = [shared_training(comparison, run, 0) for run in comparison.runs]
    assert [s is not None and s.later_rounds for s in shared] == [True, True, False, False]
    assert {s.folder.name for s in shared if s} == {"draw-0"}
    assert [s is not None and (s.covers(0), s.covers(1)) for s in shared[1:3]] == [(True, True), (True, False)]
    alone = dataclasses.replace(comparison, share_training=False)
    assert shared_training(alone, alone.runs[0], 0) is None


def test_tuning_runs_share_among_themselves_and_no_draw_is_held_for_them(tmp_path: Path) -> None:
    tuned = "compare: {methods: [fedit, lora_fair], seeds: [0], tune: {options: {client.learning_rate: [0.01, 0.1]}}}"
    comparison = declared(tmp_path, tuned)
    assert [draw_of(run) for run in comparison.runs] == ["tuning"] * 4 + ["draw-0"] * 2
    one, other = WorkingOn(comparison), WorkingOn(comparison)
    assert one.try_draw(comparison.runs[0])
    assert other.try_draw(comparison.runs[1])


def test_the_option_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.share_training=2 must be true or false"):
        declared(tmp_path, "compare: {methods: [fedit], seeds: [0], share_training: 2}")


def test_a_run_in_progress_keeps_what_its_draw_has_left(tmp_path: Path) -> None:
    comparison = declared(tmp_path, TWO_DRAWS)
    for run in comparison.runs[:3]:
        run.folder.mkdir(parents=True)
        (run.folder / "result.json").write_text("{}")
    folders: Sequence[Path] = [comparison.folder / FOLDER / f"draw-{draw}" for draw in (0, 1)]
    for folder in folders:
        folder.mkdir(parents=True)
    held = acquire(folders[1])
    run_module.tidy(comparison)
    assert [folder.exists() for folder in folders] == [False, True]
    held.release()

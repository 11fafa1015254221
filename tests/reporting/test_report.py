"""The lines of a run, its result, and how callbacks hear of its end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorafair.communication.collectives import ClientResults
from lorafair.communication.traffic import Traffic
from lorafair.config.schema import Config
from lorafair.evaluation import Evaluation
from lorafair.experiment import Experiment, build_experiment
from lorafair.federation import run_federation
from lorafair.reporting import report as report_module
from lorafair.reporting.metrics import RoundSummary, evaluation_scalars, own_domain_mask
from lorafair.reporting.report import Report, open_report
from lorafair.reporting.results import is_finished, result_text
from lorafair.reporting.run_dir import read_metrics, read_result, version_of
from tests.conftest import launched

Tiny = Callable[..., Config]


@pytest.fixture
def experiment(tiny: Tiny) -> Experiment:
    """Of twelve rounds, without its inputs."""
    return build_experiment(launched(1), tiny("rounds=12"))[0]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock: its only entry is what it shows."""
    shown = [100.0]
    monkeypatch.setattr(report_module, "time", SimpleNamespace(monotonic=lambda: shown[0]))
    return shown


def summary(
    experiment: Experiment, round: int, *, evaluated: bool = True, dropped: tuple[int, ...] = ()
) -> RoundSummary:
    """A round of three clients whose mean loss is 1."""
    clients = tuple(client for client in (0, 1, 2) if client not in dropped)
    weight = 1 / len(clients)
    return RoundSummary(
        round=round,
        plan=experiment.scheduler.plan(round - 1, {}),
        results=ClientResults(
            clients, (weight,) * len(clients), (1.0,) * len(clients), (0.5,) * 3, dropped, torch.empty(0)
        ),
        bias={},
        evaluation=evaluation() if evaluated else None,
        seconds={"train": 1.5, "gather": 0.25, "evaluate": 0.25},
        traffic=Traffic(10, 20),
        total_bytes=30.0 * round,
        total_seconds=2.0 * round,
        adapter=torch.empty(0),
    )


def evaluation() -> Evaluation:
    return Evaluation(torch.full((1, 3), 0.5), torch.full((1, 3), 2.0), torch.ones(3, 4, 4, dtype=torch.int64))


def test_the_line_of_a_round_says_how_long_the_rest_will_take(
    experiment: Experiment, seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(experiment, completed_rounds=8)
    capsys.readouterr()
    report.round_ended(summary(experiment, 9), {"seconds": 9 * 20.0})
    assert capsys.readouterr().out == "round  9/12  loss 1.000  accuracy 50.0 %  2.0 s  ETA 1:00\n", "at 20 s a round"
    for round in (10, 11):
        report.round_started(round, is_whole=True)
        seconds[0] += 40
        report.round_ended(summary(experiment, round, evaluated=False), {"seconds": 999.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["round 10/12  loss 1.000  2.0 s  ETA 1:20", "round 11/12  loss 1.000  2.0 s  ETA 0:40"]
    report.round_started(12, is_whole=True)
    report.round_ended(summary(experiment, 12), {})
    assert capsys.readouterr().out.endswith("  ETA 0:00\n")
    report.close("finished")


def test_a_client_that_was_left_out_is_named(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(experiment, completed_rounds=0)
    report.round_ended(summary(experiment, 1, dropped=(1,)), {"seconds": 2.0})
    report.close("finished")
    name = experiment.clients[1].name
    assert f"warning: client {name} returned NaN or infinity; this round goes without it" in capsys.readouterr().out
    curves = read_metrics(experiment.config.folder)
    assert curves["server/dropped_clients"] == {1: 1.0}
    assert f"train/loss/{name}" not in curves
    assert curves["time/idle_fraction/rank0"] == {1: 0.0}
    assert curves["comm/total_bytes"] == {1: 30.0}
    assert curves["eval/accuracy"] == {1: 0.5}


def test_a_result_has_the_numbers_of_its_table(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("rounds=1", "seed=3")
    run_federation(launched(1), config)
    out, result = capsys.readouterr().out, read_result(config.folder)
    table = result_text(result)
    assert table in out
    assert table.startswith("lora_fair on synthetic, 1 round, seed 3\n")
    header, _, *rows = (line.split() for line in table.splitlines()[1:])
    assert header == ["domain", "accuracy", "%", "balanced", "%", "macro", "F1", "%", "loss", "test", "images"]
    kinds = ("accuracy", "balanced_accuracy", "macro_f1")
    for name, *numbers in rows[:-2]:
        values = result["domains"][name]
        accuracies = [f"{100 * values[kind]:.1f}" for kind in kinds]
        assert numbers == [*accuracies, f"{values['loss']:.3f}", "32"]
        assert values["accuracy"] == result["accuracy"][name]
    worst = [f"{100 * min(values[kind] for values in result['domains'].values()):.1f}" for kind in kinds]
    loss = max(values["loss"] for values in result["domains"].values())
    assert rows[-2] == ["worst", "domain", *worst, f"{loss:.3f}"]
    assert (
        result["accuracy_worst_domain"]
        == min(result["accuracy"].values())
        == result["accuracy"][result["worst_domain"]]
    )
    means = [f"{100 * result[f'mean_{kind}']:.1f}" for kind in kinds]
    assert rows[-1] == ["mean", *means, f"{result['mean_loss']:.3f}", "96"]
    curves = read_metrics(config.folder)
    assert curves["eval/balanced_accuracy"] == {1: result["mean_balanced_accuracy"]}
    assert curves["eval/balanced_accuracy/noisy"] == {1: result["domains"]["noisy"]["balanced_accuracy"]}
    for kind in ("majority_class", "most_frequent_answer"):
        of_domains = [values[kind] for values in result["domains"].values()]
        assert curves[f"eval/{kind}"] == {1: pytest.approx(sum(of_domains) / 3)}
    for name, recall in result["recall"].items():
        assert len(recall) == 4
        assert sum(recall.values()) / 4 == pytest.approx(result["domains"][name]["balanced_accuracy"])
    older = {key: value for key, value in result.items() if key != "mean_balanced_accuracy"}
    older["domains"] = {
        name: {key: value for key, value in values.items() if key != "balanced_accuracy"}
        for name, values in result["domains"].items()
    }
    assert "balanced" not in result_text(older), "a result of 0.1"
    assert version_of(config.folder) == result["versions"]["lorafair"]
    assert is_finished(config)
    assert not is_finished(dataclasses.replace(config, rounds=2)), "more rounds continue it"
    incomplete = {key: value for key, value in result.items() if key != "domains"}
    (config.folder / "result.json").write_text(json.dumps(incomplete))
    assert not is_finished(config), "an older version's result has no table"


def test_clients_with_models_of_their_own_have_columns_of_their_own(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("rounds=1", "method.name=local_only")
    run_federation(launched(1), config)
    result = read_result(config.folder)
    assert "own client %" in capsys.readouterr().out
    domains = result["domains"].values()
    for column, key in (("own_client", "accuracy_own_domain"), ("other_clients", "accuracy_other_domains")):
        assert sum(values[column] for values in domains) / 3 == pytest.approx(result[key])


def test_own_domains_are_told_apart_only_where_every_client_is_evaluated(experiment: Experiment) -> None:
    assert own_domain_mask(experiment, evaluation()) is None
    assert "eval/accuracy_own_domain" not in evaluation_scalars(experiment, evaluation())


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (RuntimeError("the disk is full"), "the disk is full")]
)
def test_callbacks_hear_how_a_run_ends(experiment: Experiment, error: Exception | None, status: str) -> None:
    heard: list[tuple[int, str]] = []
    callback: Any = SimpleNamespace(on_stop=lambda rounds, reason: heard.append((rounds, reason)))
    with contextlib.suppress(RuntimeError), open_report(experiment, 4, [callback]):
        if error is not None:
            raise error
    assert heard == [(4, status)]


def test_a_callback_that_fails_at_the_end_is_a_warning(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_report(experiment, 4, [SimpleNamespace()]):  # type: ignore[list-item]
        pass
    assert "warning: callback SimpleNamespace.on_stop failed: AttributeError" in capsys.readouterr().out

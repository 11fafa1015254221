"""Who is left behind: every client's accuracy on its own mix, by hand, and its spread over clients."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorafair.commands.run import RunResult
from lorafair.errors import LorafairError
from lorafair.evaluation import Evaluation
from lorafair.federation import run_federation
from lorafair.reporting.left_behind import client_accuracies, client_spread, spread_of
from lorafair.reporting.results import clients_text
from lorafair.reporting.run_dir import read_metrics, read_result
from tests.conftest import launched

# Training images of three clients: (domain, class) of each.
MIXES = [[(0, 0), (0, 0), (0, 1)], [(1, 1), (1, 2)], [(1, 2)]]
TEST_IMAGES = torch.tensor([[4, 2, 0], [5, 1, 0]])  # (D, Q): nobody tests class 2


def made(hits: list[Any], *, personal: bool = False) -> tuple[Any, Evaluation]:
    """What `client_accuracies` needs of an experiment, and an evaluation with so many right answers (M, D, Q)."""
    cells = np.array([cell for mix in MIXES for cell in mix])
    bounds = np.cumsum([0, *map(len, MIXES)])
    experiment = SimpleNamespace(
        owners=[SimpleNamespace(indices=np.arange(a, b)) for a, b in itertools.pairwise(bounds)],
        aggregator=SimpleNamespace(personal_parts=("A",) if personal else ()),
        data=SimpleNamespace(train=SimpleNamespace(domains=cells[:, 0], labels=cells[:, 1])),
    )
    adapters = len(hits)
    confusion = torch.diag_embed(adapters * TEST_IMAGES)  # only its sums over predictions are used
    accuracy = torch.zeros(adapters, 2)
    return experiment, Evaluation(accuracy, accuracy, confusion, hits=torch.tensor(hits))


def test_a_client_has_the_accuracy_of_its_own_mix() -> None:
    experiment, evaluation = made([[[1, 2, 0], [5, 0, 0]]])
    found = client_accuracies(experiment, evaluation)
    assert found is not None
    assert found[0] == pytest.approx((2 * 1 / 4 + 1 * 2 / 2) / 3)
    assert found[1] == 0.0, "the image of class 2 does not count, since nobody tests that class"
    assert math.isnan(found[2]), "none of its images counts"
    spread = client_spread(experiment, evaluation)
    assert spread is not None
    assert (spread.clients, spread.without_test_images) == (3, 1)
    assert spread.worst_decile == 0.0
    assert spread.best_decile == found[0]
    assert spread.deviation == pytest.approx(np.std(found[:2]))


def test_a_client_with_a_model_of_its_own_has_the_accuracy_of_that() -> None:
    experiment, evaluation = made([[[4, 0, 0]] * 2, [[0, 1, 0]] * 2, [[0, 0, 0]] * 2], personal=True)
    found = client_accuracies(experiment, evaluation)
    assert found is not None
    assert found[:2].tolist() == [pytest.approx((2 * 4 / 4 + 0) / 3), 1.0]


def test_a_result_of_an_older_version_says_what_it_lacks(tmp_path: Path) -> None:
    older = {"rounds": 1, "mean_accuracy": 0.5, "versions": {"lorafair": "0.1.0"}}
    (tmp_path / "result.json").write_text(json.dumps(older))
    with pytest.raises(
        LorafairError, match=r"has no mean_macro_f1: lorafair 0\.1\.0 did not record it; remove result\.js"
    ):
        RunResult(tmp_path).macro_f1  # noqa: B018


def test_an_evaluation_without_answers_by_class_has_no_clients() -> None:
    experiment, evaluation = made([[[1, 2, 0], [5, 0, 0]]])
    assert client_spread(experiment, dataclasses.replace(evaluation, hits=None)) is None


def test_deciles_are_means_of_a_tenth_of_the_clients_rounded_up() -> None:
    accuracies = np.array([0.1 * k for k in range(11)] + [math.nan])
    spread = spread_of(accuracies)
    assert spread is not None
    assert spread.worst_decile == pytest.approx(0.05), "two of eleven"
    assert spread.best_decile == pytest.approx(0.95)
    assert spread.mean == pytest.approx(0.5)
    assert spread.deviation == pytest.approx(math.sqrt(0.1))
    assert spread_of(np.array([math.nan])) is None
    one = spread_of(np.array([0.25]))
    assert one is not None
    assert (one.worst_decile, one.best_decile, one.deviation) == (0.25, 0.25, 0.0)


@pytest.mark.parametrize("method", ["fedit", "centralized", "local_only"])
def test_a_run_records_its_clients(method: str, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("rounds=1", f"method.name={method}", "data.test_images=40")
    run_federation(launched(1), config)
    result, curves = read_result(config.folder), read_metrics(config.folder)
    clients = result["clients"]
    assert list(clients["accuracies"]) == ["plain", "noisy", "inverted"], "also where a reference pools their images"
    values = list(clients["accuracies"].values())
    assert clients["accuracy"] == curves["eval/client_accuracy"][1] == pytest.approx(np.mean(values))
    assert clients["worst_decile"] == curves["eval/client_accuracy_worst_decile"][1] == min(values)
    assert clients["best_decile"] == curves["eval/client_accuracy_best_decile"][1] == max(values)
    assert clients["standard_deviation"] == pytest.approx(np.std(values))
    assert f"clients:  {clients_text(result)}\n" in capsys.readouterr().out
    assert clients_text(result).startswith(f"{100 * min(values):.1f} % for the worst decile")
    found = RunResult(config.folder)
    assert found.clients == clients
    assert found.accuracy[found.worst_domain] == result["accuracy_worst_domain"] == min(found.accuracy.values())
    for kind in ("balanced_accuracy", "macro_f1", "calibration_error"):
        of_domains = getattr(found, kind)
        assert getattr(found, f"mean_{kind}") == pytest.approx(np.mean(list(of_domains.values())))
        assert of_domains == {domain: curves[f"eval/{kind}/{domain}"][1] for domain in result["accuracy"]}
    assert found.recall["noisy"] == result["recall"]["noisy"]
    if method != "local_only":  # one client a domain, and a balanced test set: the mix of its training images counts
        assert values != list(result["accuracy"].values())
        assert values == [pytest.approx(value, abs=0.2) for value in result["accuracy"].values()]

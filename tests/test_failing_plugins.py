"""Plug-ins with mistakes: one line names the plug-in and its line, mostly before the first round."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafair
from lorafair import registry
from lorafair.errors import LorafairError
from lorafair.reporting.run_dir import read_result
from tests.conftest import TINY

PLUGIN = """
from dataclasses import dataclass, replace
import numpy as np, torch, torchmetrics
from torch import nn
from lightning.fabric.loggers import CSVLogger
import lorafair
from lorafair.aggregation.fedit import FedIT

def register(name, change):
    def combine(self, clients, weights, start=None):
        return change(FedIT.combine(self, clients, weights, start), clients)
    lorafair.register_method(name)(dataclass(frozen=True)(type(name, (FedIT,), {"combine": combine, "__module__": __name__})))

register("transposed", lambda update, clients: replace(update, factors=lorafair.LoRAFactors(update.factors.B, update.factors.A)))
register("stacked", lambda update, clients: replace(update, factors=lorafair.LoRAFactors(clients.A, clients.B)))
register("folding", lambda update, clients: replace(update, folded=update.factors))
register("factors", lambda update, clients: update.factors)
register("raising", lambda update, clients: 1 / 0)
register("nan", lambda update, clients: replace(update, factors=lorafair.LoRAFactors(update.factors.A * torch.nan, update.factors.B)))

@lorafair.register_method("late")
@dataclass(frozen=True)
class Late(FedIT):
    def combine(self, clients, weights, start=None):
        if len(clients.A) == 3:  # in a round, and not in a trial with two clients
            clients.A[0, 0, 0] = torch.nan
        return super().combine(clients, weights, start)

lorafair.register_backbone("unbuilt", head="head", image_size=32)(lambda config: 1 / 0)
lorafair.register_backbone("no_module", head="head", image_size=32)(lambda config: None)
lorafair.register_partition("unsplit")(lambda config, labels, domains, names, seed: 1 / 0)
lorafair.register_partition("nothing")(lambda config, labels, domains, names, seed: None)
lorafair.register_source("unread")(lambda config, seed: open("/no/such/file"))
lorafair.register_callback("unmade")(lambda: 1 / 0)
lorafair.register_callback("no_callback")(lambda: "text")
lorafair.register_metric("broken")(lambda classes: 1 / 0)
lorafair.register_metric("not_a_number")(lambda classes: NotANumber())
lorafair.register_logger("none")(lambda run_dir: None)
lorafair.register_logger("plain")(lambda run_dir: CSVLogger(str(run_dir), name="plain", version=""))

class NotANumber(torchmetrics.Metric):
    def update(self, logits, labels): ...
    def compute(self): return torch.tensor(torch.nan)
"""  # noqa: E501


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file with all of them."""
    before = {kind: set(names.names) for kind, names in registry.REGISTRIES.items()}
    file = tmp_path_factory.mktemp("plugin") / "mine.py"
    file.write_text(PLUGIN)
    yield file
    for kind, names in registry.REGISTRIES.items():
        for name in set(names.names) - before[kind]:
            names.remove(name)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            "method.name=transposed",
            r"method transposed: combine of layer \S+ returned factors A \(64, 4\) and B \(4, 64\); "
            r"they must be \(4, 64\) and \(64, 4\)",
        ),
        ("method.name=stacked", r"method stacked: .* A \(2, 4, 64\) and B \(2, 64, 4\); they must be"),
        ("method.name=folding", r"method folding: .* returned a folded part; `folds` of the method must be True then"),
        ("method.name=factors", "method factors: .* returned a LoRAFactors; it must be a lorafair.LayerUpdate"),
        (
            "method.name=raising",
            r"method raising: .* failed: ZeroDivisionError: division by zero \(mine\.py, line \d+\)",
        ),
        ("method.name=nan", "method nan made NaN or infinity of finite adapters, in layer "),
        ("method.name=late", "method Late made NaN or infinity of finite adapters, in layer "),
        ("model.name=unbuilt", r"model\.name=unbuilt failed: ZeroDivisionError: .* \(mine\.py, line \d+\)"),
        ("model.name=no_module", "model.name=no_module is a NoneType, and must be an nn.Module"),
        ("partition.scheme=unsplit", r"partition\.scheme=unsplit failed: ZeroDivisionError: .* \(mine\.py, line \d+\)"),
        ("partition.scheme=nothing", "partition.scheme=nothing failed: TypeError: 'NoneType' object is not iterable"),
        (
            "data.source=unread",
            r"data\.source=unread failed: FileNotFoundError: .*/no/such/file' \(mine\.py, line \d+\)",
        ),
        ("callbacks=[unmade]", r"callbacks: unmade failed: ZeroDivisionError: .* \(mine\.py, line \d+\)"),
        ("callbacks=[no_callback]", "callbacks: no_callback makes text, which does not extend lorafair.Callback"),
        ("evaluation.metrics=[broken]", r"evaluation\.metrics: broken failed: ZeroDivisionError: .* \(mine\.py, line "),
        ("loggers={none: {}}", "loggers.none is a NoneType, and must be a Logger of lightning.fabric"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_plugin(pair: str, message: str, plugin: Path, tmp_path: Path) -> None:
    with pytest.raises(LorafairError) as caught:
        lorafair.run(TINY, f"plugins=[{plugin}]", pair, "rounds=1", run_dir=tmp_path / "run")
    assert re.match(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    begun = pair == "method.name=late"
    assert (tmp_path / "run" / "metrics.csv").exists() == begun, "the others are found before the first round"


@pytest.mark.slow
def test_a_metric_without_a_number_leaves_strict_json(plugin: Path, tmp_path: Path) -> None:
    pairs = (f"plugins=[{plugin}]", "evaluation.metrics=[not_a_number]", "rounds=1")
    result = lorafair.run(TINY, *pairs, run_dir=tmp_path / "run")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((result.run_dir / "result.json").read_text(), parse_constant=refuse)
    assert written["metrics"]["not_a_number"] == "NaN"
    assert math.isnan(read_result(result.run_dir)["metrics"]["not_a_number"])


@pytest.mark.slow
def test_a_logger_that_takes_no_settings_gets_every_round(plugin: Path, tmp_path: Path) -> None:
    """As Lightning's CSVLogger."""
    result = lorafair.run(TINY, f"plugins=[{plugin}]", "loggers={plain: {}}", "rounds=2", run_dir=tmp_path / "run")
    with next((result.run_dir / "plain").rglob("metrics.csv")).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [float(row["train/loss"]) for row in rows] == list(result.metrics["train/loss"].values())

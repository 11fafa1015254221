"""Fabric's loggers: each is the same run before and after an interruption."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import lorafair
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, LorafairError
from lorafair.registry import LOGGERS
from lorafair.reporting.loggers import open_loggers

ROOT = Path(__file__).parents[2]
Tiny = Callable[..., Config]


def interrupted_run(tiny: Tiny, loggers: str) -> Path:
    """Three rounds, the last of them lost before its checkpoint was written and repeated, then a fourth one."""
    run_dir = lorafair.run(tiny("rounds=3", loggers)).run_dir
    shutil.rmtree(run_dir / "checkpoints" / "round_000003")
    (run_dir / "result.json").unlink()
    lorafair.run(tiny("rounds=3", loggers))
    lorafair.run(tiny("rounds=4", loggers))
    return run_dir


@pytest.mark.slow
def test_csv_has_a_line_for_each_round(tiny: Tiny) -> None:
    run_dir = interrupted_run(tiny, "loggers={csv: {}}")
    with (run_dir / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    wide = {
        (int(row["step"]), name): float(value)
        for row in rows
        for name, value in row.items()
        if value and name != "step"
    }
    long = {
        (round, name): value
        for name, curve in lorafair.RunResult(run_dir).metrics.items()
        for round, value in curve.items()
    }
    assert wide == long


def test_csv_is_written_after_each_round(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("loggers={csv: {name: table, prefix: mine}}")
    (logger,) = open_loggers(config)
    logger.log_metrics({"loss": 0.1}, step=1)
    assert (config.folder / "table" / "metrics.csv").read_text().split() == ["mine-loss,step", "0.1,1"]
    logger.log_metrics({"final": 1.0})
    logger.log_metrics({"loss": 0.2, "accuracy": float("nan")}, step=2)
    logger.log_hyperparams({"seed": 0})
    logger.finalize("success")
    lines = ["mine-accuracy,mine-loss,step", ",0.1,1", "nan,0.2,2"]
    assert (config.folder / "table" / "metrics.csv").read_text().split() == lines


@pytest.mark.slow
def test_a_run_that_starts_anew_begins_another_table(tiny: Tiny) -> None:
    run_dir = lorafair.run(tiny("rounds=2", "loggers={csv: {}}")).run_dir
    lorafair.run(tiny("rounds=1", "resume=never", "loggers={csv: {}}"))
    assert len((run_dir / "csv" / "metrics.csv").read_text().splitlines()) == 2


def run_in_a_process(run_dir: Path, *words: str) -> None:
    """A run of which a logger leaves threads and processes behind; its folder is named as a user does it."""
    run_dir.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "lorafair", "run", "synthetic.yaml", "fabric.devices=1", f"run_dir={run_dir.name}"]
    done = subprocess.run(
        [*command, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=run_dir.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb", exc_type=ImportError)
    run_dir = tmp_path / "project" / "run"
    for rounds in (1, 2):
        run_in_a_process(run_dir, "loggers={wandb: {offline: true}}", f"rounds={rounds}")
    (name,) = {folder.name.rpartition("-")[2] for folder in (run_dir / "wandb").glob("offline-run-*")}
    assert (run_dir / "wandb_run").read_text() == f"{name}\n"
    assert len(list((run_dir / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))) == 2
    run_in_a_process(run_dir, "loggers={wandb: {offline: true}}", "rounds=1", "resume=never")
    assert (run_dir / "wandb_run").read_text() != f"{name}\n"


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="pip install mlflow", exc_type=ImportError)
    run_dir = tmp_path / "project" / "run"
    for rounds in (1, 2):
        run_in_a_process(run_dir, "loggers={mlflow: {}}", f"rounds={rounds}")
    code = (
        "import json; from mlflow.tracking import MlflowClient\n"
        f"client = MlflowClient('sqlite:///{run_dir}/mlflow.db')\n"
        "(run,) = client.search_runs([client.get_experiment_by_name('project').experiment_id])\n"
        "steps = [point.step for point in client.get_metric_history(run.info.run_id, 'train/loss')]\n"
        "print(json.dumps([run.info.run_name, run.info.status, steps, run.data.params['rounds'], run.data.tags]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, status, steps, rounds, tags = json.loads(done.stdout.splitlines()[-1])
    assert (name, status, steps) == ("run", "FINISHED", [1, 2])
    assert (rounds, tags["continued.rounds"]) == ("1", "2")  # MLflow never changes a parameter


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(name: str, tiny: Tiny) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(LorafairError, match=f"^loggers.{name} needs a package .*; pip install {name}$"):
        open_loggers(tiny(f"loggers={{{name}: {{}}}}"))


def failing(error: Exception) -> Callable[..., Any]:
    def make(run_dir: Path, **options: Mapping[str, Any]) -> Any:
        raise error

    return make


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (TypeError("make() got an unexpected keyword argument 'where'"), ConfigError, r"loggers.mine: make\(\) got an"),
        (ModuleNotFoundError("No module named 'mine'"), LorafairError, "needs a package .*: No module named 'mine'$"),
        (RuntimeError("no account\nlog in first"), LorafairError, "loggers.mine cannot be opened: no account log in"),
        (ConfigError("where=7 is no place"), ConfigError, "^where=7 is no place$"),
    ],
)
def test_a_logger_that_cannot_be_opened_is_one_line(
    tiny: Tiny, error: Exception, kind: type[Exception], text: str
) -> None:
    LOGGERS.add("mine", failing(error))
    try:
        with pytest.raises(kind, match=text) as raised:
            open_loggers(tiny("loggers={mine: {where: 7}}"))
    finally:
        LOGGERS.remove("mine")
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)

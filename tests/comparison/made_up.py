"""A comparison whose runs have results and curves that were made up: figures and tables of it take no training."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorafair import __version__
from lorafair.comparison.plan import Comparison, Run
from lorafair.comparison.section import load_comparison
from lorafair.config.identity import run_identity
from lorafair.config.layers import VERSION_LINE
from lorafair.config.loading import to_yaml
from lorafair.seeding import seeded_numpy

LAYERS = [f"blocks.{block}.attn.{name}" for block in (10, 11) for name in ("qkv", "proj")]
COMMON = """
data: {source: synthetic, train_images: 32, test_images: 16}
model: {name: test_vit, weights: random, image_size: 32, lora: {rank: 4, last_blocks: 2}}
fabric: {accelerator: cpu, devices: 1}
"""


def made_up(
    folder: Path,
    methods: Sequence[str] | Mapping[str, Any] = ("fedit", "lora_fair", "fedex_lora"),
    *,
    seeds: int = 3,
    settings: Mapping[str, Any] | None = None,
    domains: Sequence[str] = ("photo", "sketch"),
    rounds: int = 4,
    without: Sequence[str] = (),
) -> Comparison:
    """A comparison in `folder` whose runs are done, but for those of the methods in `without`, which have failed."""
    folder.mkdir(parents=True, exist_ok=True)
    section = {"methods": methods if isinstance(methods, Mapping) else list(methods), "seeds": list(range(seeds))}
    section |= {"settings": settings} if settings else {}
    (folder / "made_up.yaml").write_text(f"rounds: {rounds}\n{COMMON}\ncompare: {json.dumps(section)}\n")
    comparison = load_comparison(str(folder / "made_up.yaml"), f"run_dir={folder / 'out'}")
    assert comparison is not None
    for run in comparison.final_runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(f"{VERSION_LINE}{__version__}\n{to_yaml(comparison.config(run))}")
        if run.method in without:
            (run.folder / "failed.txt").write_text("round 1: every client <returned> NaN\n")
            write_metrics(run.folder, {})
        else:
            finish(comparison, run, domains, rounds)
    return comparison


def finish(comparison: Comparison, run: Run, domains: Sequence[str], rounds: int) -> None:
    """Write metrics.csv and result.json of a run."""
    draw = seeded_numpy(run.seed, run.setting, run.method)
    curves: dict[str, list[float]] = {}
    for domain in domains:
        curves[f"eval/accuracy/{domain}"] = (0.3 + 0.4 * np.sort(draw.random(rounds))).tolist()
    curves["eval/accuracy"] = np.mean([curves[f"eval/accuracy/{domain}"] for domain in domains], 0).tolist()
    for name in ("train/loss", "eval/loss"):
        curves[name] = (-np.sort(-draw.random(rounds))).tolist()
    curves["comm/total_bytes"] = (1e6 * (1 + draw.random()) * np.arange(1, rounds + 1)).tolist()
    for layer in ("", *(f"/{layer}" for layer in LAYERS)):
        curves[f"server/error_before{layer}"] = (0.2 * draw.random(rounds)).tolist()
        curves[f"server/error_after{layer}"] = (0.1 * draw.random(rounds)).tolist()
    curves["server/norm_ratio"] = (1 + draw.random(rounds)).tolist()
    write_metrics(run.folder, curves)
    config = comparison.config(run)
    result = {
        "method": config.method,
        "seed": run.seed,
        "rounds": rounds,
        "accuracy": {domain: curves[f"eval/accuracy/{domain}"][-1] for domain in domains},
        "mean_accuracy": curves["eval/accuracy"][-1],
        "totals": {"bytes": curves["comm/total_bytes"][-1], "seconds": 3.5},
        "data": {"description": "made-up numbers"},
        "config": run_identity(config),
        "start": dict.fromkeys(("initial_adapter", "images", "frozen_weights", "clients"), "the same"),
        "versions": {"lorafair": __version__, "torch": "2.8"},
    }
    (run.folder / "result.json").write_text(json.dumps(result, default=str))


def write_metrics(folder: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """metrics.csv, from the values of rounds 1, 2, ..."""
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "name", "value"])
        writer.writerows([r, name, v] for name, values in curves.items() for r, v in enumerate(values, 1))

"""What a draw of a comparison costs, with and without shared training, run by run on one thread.

All runs of one draw are done twice: each on its own, and as a comparison does them. Final adapters must have the same
bits. Seconds are those of the processor, which mean something on a busy machine, too. Example:

    python benchmarks/draws.py --settings one_long_round --methods fedit lora_fair flex_lora fedex_lora fair_fold
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.comparison.plan import Comparison, Run
from lorafair.comparison.run import execute_run
from lorafair.comparison.section import load_comparison
from lorafair.comparison.sharing import WorkingOn
from lorafair.console import table
from lorafair.launch import make_fabric
from lorafair.model.kept import keeping_backbone

DRAWS, CORES = 200, 2  # of the night that is predicted


def seconds_of_runs(comparison: Comparison, *, alone: bool) -> list[float]:
    """Processor seconds of each run of the first draw, in order."""
    fabric, seconds = make_fabric(next(iter(comparison.configs.values())).fabric), []
    with nullcontext() if alone else keeping_backbone():
        working = WorkingOn(comparison)
        for number, run in enumerate(runs_of(comparison), start=1):
            began = time.process_time()
            failure = execute_run(fabric, comparison, run, f"[{number}]", working).failure
            seconds.append(time.process_time() - began)
            assert not failure, failure
            print(f"{'alone' if alone else 'shared':6}  {run.name:40} {seconds[-1]:7.1f} s", flush=True)
        working.release()
    return seconds


def runs_of(comparison: Comparison) -> Sequence[Run]:
    """Of the first draw."""
    return [run for run in comparison.in_order if run.seed == comparison.seeds[0]]


def assert_same_bits(one: Comparison, other: Comparison) -> None:
    """Of the last checkpoints."""
    for mine, theirs in zip(runs_of(one), runs_of(other), strict=True):
        tensors, others = (load_checkpoint(list_checkpoints(run.folder)[-1]).tensors for run in (mine, theirs))
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items()), mine.name


def chosen(file: str, folder: str, options: argparse.Namespace, *, share: bool) -> Comparison:
    """The comparison with some of its settings and methods."""
    comparison = load_comparison([file, f"run_dir={folder}"])
    assert comparison is not None
    methods = options.methods or list(comparison.methods)
    settings = options.settings or list(comparison.settings)
    runs = [run for run in comparison.runs if run.method in methods and run.setting in settings]
    return dataclasses.replace(comparison, runs=tuple(runs), share_training=share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="conf/compare/composition.yaml")
    parser.add_argument("--settings", nargs="+", help="labels of settings (all)")
    parser.add_argument("--methods", nargs="+", help="labels of methods (all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        of_alone = chosen(options.file, str(Path(folder, "alone")), options, share=False)
        of_shared = chosen(options.file, str(Path(folder, "shared")), options, share=True)
        shared = seconds_of_runs(of_shared, alone=False)
        alone = seconds_of_runs(of_alone, alone=True)
        assert_same_bits(of_alone, of_shared)
    rows = [
        [run.setting, run.method, f"{one:.1f}", f"{other:.1f}", f"{one / other:.1f}"]
        for run, one, other in zip(runs_of(of_alone), alone, shared, strict=True)
    ]
    for setting in dict.fromkeys(row[0] for row in rows):
        one, other = (
            sum(s for run, s in zip(runs_of(of_alone), of, strict=True) if run.setting == setting)
            for of in (alone, shared)
        )
        rows.append([setting, "a draw", f"{one:.1f}", f"{other:.1f}", f"{one / other:.1f}"])
        hours = [f"{DRAWS * s / CORES / 3600:.1f} h" for s in (one, other)]
        rows.append([setting, f"{DRAWS} draws, {CORES} cores", *hours, ""])
    print("\nprocessor seconds; final adapters have the same bits")
    print(table(["setting", "run", "alone", "shared", "ratio"], rows))


if __name__ == "__main__":
    main()

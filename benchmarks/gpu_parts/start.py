"""Part g: from the command to the end of the first step of local training, with and without compilation."""

from __future__ import annotations

import subprocess
import sys
import time

from . import ROOT, environ_of_child, rounds
from .record import Part

GOAL_SECONDS = 20.0
CODE = """
import os, sys, time
out, *arguments = sys.argv[1:]
from lorafair import cli
import torch
from lorafair.client.cohort import LocalTraining
step = LocalTraining.step
def first(self, *given, **options):
    step(self, *given, **options)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    open(out, "w").write(str(time.time()))
    os._exit(0)
LocalTraining.step = first
sys.exit(cli.main(arguments))
"""


def run(part: Part) -> None:
    table = part.table("From the command to the end of the first step", "setting", "s")
    compiled = ("model.compile=inductor", "model.lora.dropout=0")
    settings: dict[str, tuple[str, ...]] = {
        "not compiled": (),
        "compiled": compiled,
        "compiled, the cache is warm": compiled,
    }
    if part.tiny:
        settings = {"not compiled": ()}
    taken: dict[str, float] = {}
    for name, options in settings.items():

        def one(name: str = name, options: tuple[str, ...] = options) -> None:
            taken[name] = seconds(part, *options)
            table.row(name, taken[name])

        part.attempt(name, one)
    if warm := taken.get("not compiled" if part.tiny else "compiled, the cache is warm"):
        part.goal("seconds to the first step, compiled, cache warm", warm, GOAL_SECONDS, at_least=False)


def seconds(part: Part, *options: str) -> float:
    """Of one process; it ends with its first step."""
    out = part.scratch / "first_step"
    out.unlink(missing_ok=True)
    given = rounds.options(part, "data.workers=0", "data.cache=never", "data.resident=false", "resume=never",
                           f"run_dir={part.scratch / 'start'}", *options)  # fmt: skip
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(out), *given], env=environ_of_child(), cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if not out.exists():
        raise RuntimeError(f"exit status {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return float(out.read_text()) - began

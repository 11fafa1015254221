"""What parts b, c and the start compile, compiled before: by other processes, while nothing is timed.

They leave it in inductor's cache, where the parts find it. It takes minutes on a card and is no part of a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from . import cohorts, training
from .record import Part
from .work import Size, Work


def run(part: Part, turn: int, turns: int) -> None:
    """Every `turns`-th job, from `turn` on."""
    backend = training.backend(part)

    def package(size: Size, cohort: int = 1, precision: str = "bf16-true") -> None:
        work = Work(dataclasses.replace(size, steps=1, clients=cohort), part.device, cohort, precision)
        work.model.compile(backend=backend)
        work.package(cohort)()

    def bare(size: Size, precision: str) -> None:
        Work(dataclasses.replace(size, steps=1), part.device, precision=precision).bare(backend)()

    def graphs(size: Size) -> None:
        work = Work(dataclasses.replace(size, steps=1), part.device, precision="bf16-true")
        work.model.compile(backend="inductor", mode="reduce-overhead")
        work.package()()

    base = training.size_of(part)
    jobs: dict[str, Callable[[], None]] = {
        **{f"one client, {p}": lambda p=p: package(base, precision=p) for p in training.HALVES},
        **{f"bare loop, {p}": lambda p=p: bare(base, p) for p in training.HALVES},
        **{f"cohort of {c}": lambda c=c: package(cohorts.size_of(part), c) for c in cohorts.compiled(part)},
        "CUDA graphs": lambda: graphs(base),
        **{model: lambda model=model: package(training.size_of(part, model)) for model in training.OTHERS},
    }
    for name in list(jobs)[turn::turns]:
        torch.compiler.reset()
        part.attempt(name, jobs[name])
        part.say(f"compiled: {name}, {part.seconds - part.left():.0f} s after the start")

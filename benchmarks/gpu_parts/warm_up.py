"""What parts b, c and the start compile, compiled before: by other processes, while nothing is timed.

They leave it in inductor's cache, where the parts find it. It takes minutes on a card and is no part of a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from . import cohorts, training
from .record import Part
from .work import Size, Work, autocast_of


def run(part: Part, turn: int, turns: int) -> None:
    """Every `turns`-th job, from `turn` on."""
    half, backend = autocast_of(part.device, "bf16-mixed"), training.backend(part)

    def package(size: Size, cohort: int = 1) -> None:
        work = Work(dataclasses.replace(size, steps=1, clients=cohort), part.device, widest=cohort)
        work.model.compile(backend=backend)
        work.package(half, cohort)()

    def bare(size: Size) -> None:
        Work(dataclasses.replace(size, steps=1), part.device).bare(half, backend)()

    def graphs(size: Size) -> None:
        work = Work(dataclasses.replace(size, steps=1), part.device)
        work.model.compile(backend="inductor", mode="reduce-overhead")
        work.package(half)()

    base = training.size_of(part)
    jobs: dict[str, Callable[[], None]] = {
        "one client": lambda: package(base),
        "bare loop": lambda: bare(base),
        **{f"cohort of {c}": lambda c=c: package(cohorts.size_of(part), c) for c in cohorts.compiled(part)},
        "CUDA graphs": lambda: graphs(base),
        **{model: lambda model=model: package(training.size_of(part, model)) for model in training.OTHERS},
    }
    for name in list(jobs)[turn::turns]:
        torch.compiler.reset()
        part.attempt(name, jobs[name])
        part.say(f"compiled: {name}, {part.seconds - part.left():.0f} s after the start")

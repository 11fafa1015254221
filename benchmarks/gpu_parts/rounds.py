"""Part e: whole rounds of the paper's setting on made-up images: where their time goes, when the device is idle."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bare_loop import open_experiment

import lorafair
from lorafair.config import FabricConfig, load_config
from lorafair.experiment import Experiment
from lorafair.launch import in_place
from lorafair.seeding import seeded

from . import ROOT
from .record import Part
from .timing import seconds_of

GOAL_OVERHEAD, GOAL_INFERENCE = 0.01, 0.95
PRECISION = "bf16-true"
KERNELS, OPERATORS = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",)  # categories of a trace
SHORTEST_GAP = 20e-6  # seconds; shorter ones are between any two kernels
PHASES = ("train", "gather", "server", "broadcast", "evaluate")


def options(part: Part, *more: str) -> list[str]:
    """conf/paper/domainnet_vit.yaml with images that nobody has to fetch: six clients of 640 images."""
    paper = [
        str(ROOT / "conf" / "paper" / "domainnet_vit.yaml"), "data.source=synthetic", "data.train_images=640",
        "data.test_images=320", "data.cache=always", "data.resident=true", "partition.scheme=iid",
        "partition.clients=6", "model.weights=random", f"fabric.precision={PRECISION}", "fabric.devices=1",
        f"fabric.accelerator={part.accelerator}", "checkpoint.every=1000", "rounds=5",
    ]  # fmt: skip
    tiny = [
        "data.train_images=16", "data.test_images=16", "data.classes=4", "data.workers=0", "model.name=test_vit",
        "model.image_size=32", "model.lora.rank=4", "client.batch_size=8", "rounds=2", "partition.clients=3",
    ]  # fmt: skip
    return [*paper, *(tiny if part.tiny else ()), *more]


def run(part: Part) -> None:
    part.attempt("rounds", lambda: phases(part))
    part.attempt("idle time", lambda: profiled(part))


class _Clock(lorafair.Callback):
    """When each round began and ended."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.seconds: list[float] = []

    def on_round_start(self, round: int) -> None:
        self.began.append(time.perf_counter())

    def on_round_end(self, round: int, scalars: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began[-1])


def phases(part: Part) -> None:
    """A run of the package; its own curves time/* of every round but the first."""
    clock, printed = _Clock(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = lorafair.run(*options(part, f"run_dir={part.scratch / 'rounds'}"), callbacks=[clock])
    curves = {name: list(result.metrics[f"time/{name}"].values())[1:] for name in PHASES}
    walls = clock.seconds[1:]
    overhead = [w - t - e for w, t, e in zip(walls, curves["train"], curves["evaluate"], strict=True)]
    table = part.table(
        f"Rounds of conf/paper/domainnet_vit (6 clients, 5 steps each), {PRECISION}, made-up images" if not part.tiny
        else "Rounds of a tiny model", "phase", "s a round", "% of the round",
    )  # fmt: skip
    lines = {**curves, "everything else": [o - sum(curves[p][i] for p in PHASES[1:4]) for i, o in enumerate(overhead)]}
    for name, seconds in {**lines, "round": walls}.items():
        table.row(name, seconds, [100 * s / w for s, w in zip(seconds, walls, strict=True)])
    share = statistics.median(o / w for o, w in zip(overhead, walls, strict=True))
    part.goal("beside training and evaluation, fraction of a round", share, GOAL_OVERHEAD, at_least=False)
    images = sum(int(d["test_images"]) for d in result.content["domains"].values())
    inference(part, images / statistics.median(curves["evaluate"]))


def inference(part: Part, evaluated: float) -> None:
    """Images a second of the package's evaluation beside a loop of the model alone."""
    with in_place(FabricConfig(accelerator=part.accelerator, precision=PRECISION)) as fabric:  # type: ignore
        config = load_config(options(part, f"run_dir={part.scratch / 'inference'}"))
        experiment, _, _ = _opened(fabric, config)
        batch = config.evaluation.batch_size
        shape = (batch, 3, *[config.model.image_size] * 2)
        drawn = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(0, "images"))
        images = drawn.to(part.device)  # zeros would be faster than images: they take less power

        @torch.inference_mode()
        def alone() -> None:
            for _ in range(2 if part.tiny else 10):
                with fabric.autocast():
                    experiment.model(images)

        alone()
        seconds = [seconds_of(part.device, alone) for _ in range(3)]
    rates = [batch * (2 if part.tiny else 10) / s for s in seconds]
    table = part.table("Evaluation, images/s", "of a run", "of the model alone")
    table.row(evaluated, rates)
    part.goal("evaluation over inference (images/s)", evaluated / statistics.median(rates), GOAL_INFERENCE)


def _opened(fabric: Any, config: Any) -> tuple[Experiment, Any, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        return open_experiment(fabric, config)


def profiled(part: Part) -> None:
    """The training phase of a round under torch.profiler: gaps between kernels, and before which they are."""
    activity = torch.profiler.ProfilerActivity
    with in_place(FabricConfig(accelerator=part.accelerator, precision=PRECISION)) as fabric:  # type: ignore
        _, _, train = _opened(fabric, load_config(options(part, f"run_dir={part.scratch / 'profile'}")))
        train()  # warms up
        with torch.profiler.profile(activities=[activity.CUDA if part.on_gpu else activity.CPU]) as profiler:
            train()
            if part.on_gpu:
                torch.cuda.synchronize()
    file = part.out.parent.parent / "trace.json.gz"
    profiler.export_chrome_trace(str(file))
    with gzip.open(file, "rt") as opened:
        idle = idle_time(json.load(opened)["traceEvents"], KERNELS if part.on_gpu else OPERATORS)
    table = part.table(
        "Idle device in the training phase of a round (six clients), from a profiler's trace" if part.on_gpu
        else "Gaps between operators, from a profiler's trace",
        "from first to last kernel, s", "idle, s", "idle, %", f"gaps over {SHORTEST_GAP * 1e6:.0f} µs", "kernels",
    )  # fmt: skip
    table.row(idle.span, idle.idle, 100 * idle.idle / idle.span, len(idle.gaps), idle.kernels)
    largest = part.table("The largest gaps", "ms", "after", "before")
    for gap in idle.gaps[:8]:
        largest.row(1000 * gap.seconds, gap.after[:60], gap.before[:60])


@dataclass(frozen=True)
class Gap:
    seconds: float
    after: str
    before: str


@dataclass(frozen=True)
class Idle:
    """When a device had nothing to do between its first and its last kernel."""

    span: float
    idle: float
    gaps: list[Gap]  # the longest first, of those that count
    kernels: int


def idle_time(events: Sequence[dict[str, Any]], categories: Sequence[str]) -> Idle:
    """Gaps between the events of these categories on all streams together; a trace has microseconds."""
    chosen = sorted(
        ((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("ph") == "X" and e.get("cat") in categories),
        key=lambda event: event[0],
    )
    if not chosen:
        raise ValueError(f"the trace has no event of the categories {', '.join(categories)}")
    began, until, last = chosen[0]
    first, idle, gaps = began, 0.0, []
    for start, end, name in chosen[1:]:
        if start > until:
            idle += (start - until) / 1e6
            gaps.append(Gap((start - until) / 1e6, last, name))
        if end > until:
            until, last = end, name
    gaps = [gap for gap in gaps if gap.seconds >= SHORTEST_GAP]
    return Idle((until - first) / 1e6, idle, sorted(gaps, key=lambda gap: -gap.seconds), len(chosen))

"""Part a: the same results on the device as on the CPU, and which of them come again bit by bit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

import lorafair
from lorafair.client.cohort import LocalTraining
from lorafair.errors import LorafairError
from lorafair.model.backbone import create_backbone
from lorafair.registry import METHODS

from . import processes, server
from .record import Part
from .work import Size, Work

TOLERANCE = 1e-3  # of the adapters, relative to the way that training has moved them
IMAGES_APART = 2  # test images of a domain that may be judged otherwise
TEST_IMAGES, CLIENTS = 96, 3  # in each of as many domains
THREADS = int(os.environ.get("OMP_NUM_THREADS", min(4, len(os.sched_getaffinity(0)))))

BASE = (
    "data.source=synthetic", "data.train_images=48", f"data.test_images={TEST_IMAGES}", "model.name=test_vit",
    "model.weights=random", "model.image_size=32", "model.prefix_cache=never", "model.lora.rank=4",
    "client.optimizer=sgd", "client.learning_rate=0.05", "client.batch_size=16", "client.cohort=1", "rounds=3",
    "evaluation.every=3", "checkpoint.every=1", "fabric.devices=1",
)  # fmt: skip
TINY = ("data.train_images=16", "client.batch_size=8", "rounds=2", "evaluation.every=2")
# The bits of larger layers: other kernels than those of a tiny model.
LARGER = ("model.name=vit_tiny_patch16_224", "model.image_size=224", "model.lora.rank=16", "rounds=2")


def run(part: Part) -> None:
    with processes.started(part, base(part)) as children:  # looked at later; meanwhile they work
        part.attempt("NaN", lambda: not_a_number(part))  # short ones first: what the time does not reach is left out
        part.attempt("waiting", lambda: waits(part))
        part.attempt("killed and resumed", lambda: children.killed(part, federation))
        part.attempt("process groups", lambda: children.grouped(part, federation))
        part.attempt("methods", lambda: methods(part))
        part.attempt("server step", lambda: server_steps(part))
        part.attempt("the same twice", lambda: twice(part))


def base(part: Part) -> tuple[str, ...]:
    """What all runs have."""
    return (*BASE, *(TINY if part.tiny else ()), f"fabric.threads={THREADS}")


def federation(part: Part, name: str, *options: str, accelerator: str | None = None) -> lorafair.RunResult:
    """A run of the package in this process; what it prints is shown if it fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return lorafair.run(
                *base(part),
                *options,
                f"fabric.accelerator={accelerator or part.accelerator}",
                f"run_dir={part.scratch / name}",
            )
    except BaseException:
        part.say(printed.getvalue()[-2000:])
        raise


def tensors_of(result: lorafair.RunResult) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint."""
    last = max((result.run_dir / "checkpoints").glob("round_*"))
    return {
        f"{file.name}:{name}": t for file in sorted(last.glob("*.safetensors")) for name, t in load_file(file).items()
    }


def same_bits(one: lorafair.RunResult, other: lorafair.RunResult) -> bool:
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def weights_of(result: lorafair.RunResult) -> dict[str, torch.Tensor]:
    """The model with its adapters merged; of a method that keeps one a client, all that it keeps.

    Factors themselves may differ by signs and rotations, where a method decomposes matrices.
    """
    try:
        return dict(result.load_model().state_dict())
    except LorafairError:
        return tensors_of(result)


def gap_of(one: lorafair.RunResult, other: lorafair.RunResult) -> float:
    """‖one − other‖ over the way from the weights before training."""
    mine, theirs = weights_of(one), weights_of(other)
    config = one.config
    before = create_backbone(config.model, 1, config.seed).state_dict()
    apart = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in mine)
    way = sum(
        float((mine[name].double() - (before[name] if name in before and before[name].shape == mine[name].shape else 0))
              .square().sum())
        for name in mine
    )  # fmt: skip
    return float((apart / way) ** 0.5)


def accuracies_apart(one: lorafair.RunResult, other: lorafair.RunResult) -> float:
    return max(abs(one.accuracy[domain] - other.accuracy[domain]) for domain in one.accuracy)


def methods(part: Part) -> None:
    """A federation of every method on the device and on the CPU; products of float32 are float32 by default."""
    names = ["flex_lora"] if part.tiny else METHODS.names
    table = part.table(
        f"{part.device.type} against cpu, test_vit, 3 clients, 3 rounds, float32",
        "method", "accuracy %", "of the CPU", "images apart in a domain", "weights apart, relative", "s", "s, CPU",
    )  # fmt: skip
    wrong = []
    for name in names:

        def one(name: str = name) -> None:
            here, there = (
                federation(part, f"{name}-{where}", f"method.name={name}", accelerator=accelerator)
                for where, accelerator in (("here", part.accelerator), ("there", "cpu"))
            )
            apart, gap = round(accuracies_apart(here, there) * TEST_IMAGES), gap_of(here, there)
            if apart > IMAGES_APART or not gap <= TOLERANCE:
                wrong.append(name)
            table.row(name, 100 * here.mean_accuracy, 100 * there.mean_accuracy, apart, gap,
                      *(r.content["totals"]["seconds"] for r in (here, there)))  # fmt: skip

        part.attempt(name, one)
    limits = f"{IMAGES_APART} images of {TEST_IMAGES} a domain, {TOLERANCE:g} of the weights"
    done = len(table.rows)
    part.check(
        "every method as on the CPU", done > 0 and not wrong,
        f"{done} of {len(names)} methods within {limits}" + (f", but not {', '.join(wrong)}" if wrong else ""),
    )  # fmt: skip


def server_steps(part: Part) -> None:
    """Every method's server step on one block of ViT-B, K = 6, on the device and on the CPU."""
    clients, weights = server.make_clients("vit_base", 2 if part.tiny else 6, size_b=0.01, blocks=1)
    names = [name for name in server.METHODS if name != server.METRICS]
    gaps = {}
    for name in ("lora_fair",) if part.tiny else names:
        part.attempt(f"server step of {name}", lambda name=name: gaps.update(
            {name: server.difference(name, clients, weights.double(), part.device)}))  # fmt: skip
    worst = max(gaps, key=lambda name: gaps[name])
    part.check("server steps as on the CPU", gaps[worst] <= server.TOLERANCE,
               f"{len(gaps)} methods, B·A at most {gaps[worst]:.1e} apart, {worst} ({server.TOLERANCE:g})")  # fmt: skip


def not_a_number(part: Part) -> None:
    """A client whose rows are NaN is left out, in every round."""
    train, calls = LocalTraining.train, [0]

    def poisoned(self: Any, *given: Any, **options: Any) -> Any:
        result = train(self, *given, **options)
        calls[0] += 1
        return dataclasses.replace(result, rows=result.rows * torch.nan) if calls[0] % CLIENTS == 2 else result

    with mock.patch.object(LocalTraining, "train", poisoned):
        result = federation(part, "nan", "method.name=lora_fair")
    dropped = list(result.metrics["server/dropped_clients"].values())
    finite = all(bool(t.isfinite().all()) for t in tensors_of(result).values())
    part.check("a client with NaN is left out", set(dropped) == {1.0} and finite,
               f"dropped round by round: {dropped}; the adapter is {'' if finite else 'not '}finite")  # fmt: skip


def waits(part: Part) -> None:
    """No step of local training waits for the device: torch.cuda.set_sync_debug_mode."""
    if not part.on_gpu:
        part.note("whether a step waits for the device is checked on a GPU alone")
        return
    for name, dropout, cohort in (("one client", 0.0, 1), ("4 clients side by side, dropout", 0.1, 4)):
        size = Size("test_vit", 32, 4, batch=8, steps=4, clients=cohort, dropout=dropout)
        work = Work(size, part.device, widest=cohort)
        train = work.package(cohort)
        train()  # warms up
        try:
            with mock.patch.object(LocalTraining, "step", _guarded(LocalTraining.step)):
                train()
            found = "none"
        except RuntimeError as error:
            found = str(error).splitlines()[0]
        part.check(f"no synchronising call in a step, {name}", found == "none", found)
        sites = synchronisations(train)
        part.note(f"synchronising calls of a cohort of 4 steps, {name}: {len(sites)} {sorted(set(sites))}")


def _guarded(step: Any) -> Any:
    def guarded(self: Any, *given: Any, **options: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, *given, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guarded


def synchronisations(action: Any) -> list[str]:
    """Where the calls of an action that wait for the device are: file and line of each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waiting = [w for w in caught if "called a synchronizing" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}" for w in waiting]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """It needs CUBLAS_WORKSPACE_CONFIG, which gpu.py sets for this part."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def twice(part: Part) -> None:
    """Which settings give equal bits in two runs on the same device."""
    compiler = "eager" if part.tiny else "inductor"
    side_by_side = ("partition.scheme=iid", "partition.clients=6", "client.cohort=3")
    settings: dict[str, Sequence[str]] = {
        "float32": (),
        "bf16": ("fabric.precision=bf16-mixed",),
        "bf16, 3 side by side": ("fabric.precision=bf16-mixed", *side_by_side),
        "bf16, deterministic algorithms": ("fabric.precision=bf16-mixed",),
        "float32, TF32": ("fabric.matmul_precision=high",),
        "bf16, compiled": ("fabric.precision=bf16-mixed", f"model.compile={compiler}"),
    }
    if part.tiny:
        settings = {"bf16, deterministic algorithms": (*settings["bf16, 3 side by side"], "rounds=1")}
    model = () if part.tiny else LARGER
    table = part.table(
        f"The same run twice on {part.device.type}, {model[0].removeprefix('model.name=') if model else 'test_vit'}",
        "setting", "equal bits", "weights apart, relative", "s of the runs",
    )  # fmt: skip
    for number, (name, options) in enumerate(settings.items()):

        def pair(number: int = number, name: str = name, options: Sequence[str] = options) -> None:
            with deterministic() if "deterministic" in name else contextlib.nullcontext():
                one, other = (federation(part, f"twice-{number}-{n}", "method.name=lora_fair", *model, *options)
                              for n in (1, 2))  # fmt: skip
            table.row(
                name, same_bits(one, other), gap_of(one, other), [r.content["totals"]["seconds"] for r in (one, other)]
            )

        part.attempt(f"twice: {name}", pair)

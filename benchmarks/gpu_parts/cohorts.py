"""Part c: clients side by side. 64 clients of batch 8, one by one and in cohorts of 2 to 64."""

from __future__ import annotations

import statistics

import torch

from lorafair.model.side_by_side import clients_with_room

from .record import Part
from .timing import interleaved, peak_gib
from .training import backend, kernels, mfu
from .work import Size, Work

GOAL_SPEED_UP, GOAL_MFU = 6.0, 0.30
PRECISION = "bf16-true"


def size_of(part: Part) -> Size:
    if part.tiny:
        return Size("test_vit", 32, 4, batch=4, steps=2, clients=4)
    return Size("vit_base_patch16_224", 224, 16, batch=8, steps=2, clients=64)


def compiled(part: Part) -> tuple[int, ...]:
    """Cohorts that are also timed compiled; each is compiled by itself."""
    return (4,) if part.tiny else (8, 64)


def run(part: Part) -> None:
    size, repeats = size_of(part), 2 if part.tiny else 3
    table = part.table(
        f"{size.clients} clients of batch {size.batch}, {size.model} at {size.pixels} px, {PRECISION}",
        "side by side", "images/s", "MFU %", "times one by one", "GiB beyond the model",
    )  # fmt: skip
    sizes = [2**n for n in range(size.clients.bit_length())]
    work = Work(size, part.device, size.clients, PRECISION)
    if part.on_gpu:
        room = clients_with_room(work.model, work.autocast, size.batch, part.device)
        part.say(f"client.cohort=auto takes the memory for enough for {room} clients side by side")
    ways, memory = {}, {}
    for cohort in sizes:  # the memory pass warms up, and shows which cohorts fit
        way = work.package(cohort)
        done = part.attempt(f"cohort of {cohort}", lambda way=way: [peak_gib(part.device, way)])
        if done is not None:
            ways[str(cohort)], memory[str(cohort)] = way, done[0]
    seconds = part.attempt("timing", lambda: interleaved(part.device, ways, repeats, warm_ups=0))
    if not seconds:
        return
    one = seconds.get("1")
    best = (0.0, 0.0)

    def line(name: str, taken: list[float], gib: float | None) -> None:
        nonlocal best
        rates = [work.images_of_a_pass / s for s in taken]
        used = mfu(part, work, rates)
        speed_up = [a / b for a, b in zip(one, taken, strict=True)] if one else None
        table.row(name, rates, used, speed_up, gib)
        if speed_up:
            best = max(best, (statistics.median(speed_up), statistics.median(used) / 100 if used else 0.0))

    for name in ways:
        line(name, seconds[name], memory[name])
    for cohort in compiled(part):
        if str(cohort) in ways:
            part.attempt("kernels", lambda cohort=cohort: kernels(
                part, f"{size.clients} clients, {cohort} side by side", ways[str(cohort)]))  # fmt: skip
        part.attempt(f"cohort of {cohort}, compiled", lambda cohort=cohort: line(
            f"{cohort}, compiled", *_compiled(part, size, cohort, repeats)))  # fmt: skip
    part.goal(f"{size.clients} clients side by side over one by one", best[0], GOAL_SPEED_UP)
    if part.peak_tflops is not None:
        part.goal("MFU of the fastest cohort", best[1], GOAL_MFU)


def _compiled(part: Part, size: Size, cohort: int, repeats: int) -> tuple[list[float], float | None]:
    """Seconds of a pass, and GiB; on a model of its own, so that shapes are compiled as fixed ones."""
    torch.compiler.reset()
    work = Work(size, part.device, cohort, PRECISION)
    work.model.compile(backend=backend(part))
    way = work.package(cohort)
    gib = peak_gib(part.device, way)
    return interleaved(part.device, {"": way}, repeats)[""], gib

"""Part b: images a second and MFU of one client's training, beside a bare loop and peft on the same card."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .record import Part, Table, text_of
from .timing import interleaved, kernels_of, peak_gib, use_tf32
from .work import Size, Work

GOAL_MFU, GOAL_OF_BARE = 0.40, 0.97
HALVES = ("bf16-true", "bf16-mixed")
OTHERS = ("mixer_b16_224", "vit_large_patch16_224")


def size_of(part: Part, model: str = "vit_base_patch16_224", dropout: float = 0.0) -> Size:
    """The work that the goals are set for, or a tiny one."""
    if part.tiny:
        return Size("test_vit", 32, 4, batch=8, steps=2, dropout=dropout)
    return Size(model, 224, 16, batch=128, steps=8 if "large" not in model else 4, dropout=dropout)


def backend(part: Part) -> str:
    """Of torch.compile: compiling for the CPU takes longer than all else that is tiny."""
    return "eager" if part.tiny else "inductor"


COLUMNS = ("way", "images/s", "MFU %", "of the bare loop", "GiB beyond the model")


def run(part: Part) -> None:
    part.attempt("ViT-B", lambda: base(part))
    for model in ("mixer, tiny",) if part.tiny else OTHERS:
        part.attempt(model, lambda model=model: others(part, model, 2 if part.tiny else 3))


def base(part: Part) -> None:
    """One client of ViT-B in every precision, in all ways; what a run should be like comes first."""
    size, repeats = size_of(part), 2 if part.tiny else 5
    part.say(f"{size}")
    table = part.table(f"One client, {size.model} at {size.pixels} px, batch {size.batch}", *COLUMNS)
    compare = _Comparison(part, table)
    in_full = Work(size, part.device, precision="32-true")
    part.say(f"{in_full.flop / 1e9:.1f} GFLOP an image (forward and backward, frozen weights)")
    part.attempt("agreement with the bare loop", lambda: agreement(part, in_full))
    works = {name: Work(size, part.device, precision=name) for name in HALVES}
    for name, work in works.items():
        part.attempt(f"{name}, compiled", lambda name=name: compiled(part, compare, size, name, repeats))
        part.attempt(name, lambda name=name, work=work: compare(
            name, work, repeats, bare=True, peft=name == "bf16-mixed"))  # fmt: skip
        if name == "bf16-true":
            part.attempt("kernels", lambda work=work: kernels(part, f"{size.steps} steps, bf16-true", work.package()))
    if part.on_gpu:
        true = works["bf16-true"]
        part.attempt("a CUDA graph", lambda: compare.ways(
            {"bf16-true, step as a CUDA graph": true.as_graph()}, true, repeats))  # fmt: skip
        part.attempt("compiled with CUDA graphs", lambda: reduced(part, compare, size, repeats))
    part.attempt("dropout", lambda: compare("bf16-true, dropout 0.1", Work(
        size_of(part, dropout=0.1), part.device, precision="bf16-true"), repeats))  # fmt: skip
    for name, tf32 in (("float32, TF32 on", True), ("float32, TF32 off", False))[part.tiny :]:

        def of_float32(name: str = name, tf32: bool = tf32) -> None:
            use_tf32(tf32)
            compare(name, in_full, min(repeats, 3), bare=True, peft=not (tf32 or part.tiny))

        part.attempt(name, of_float32)
    use_tf32(False)
    goals(part, compare)


def kernels(part: Part, name: str, way: Callable[[], Any]) -> None:
    """Where the time of a way goes on a GPU, kernel by kernel."""
    if part.on_gpu:
        table = part.table(f"Kernels of one pass, {name}", "kernel", "calls", "ms")
        for kernel, calls, milliseconds in kernels_of(way):
            table.row(kernel[:90], calls, milliseconds)


class _Comparison:
    """Fills a table; remembers the medians."""

    def __init__(self, part: Part, table: Table) -> None:
        self.part, self.table = part, table
        self.rates: dict[str, float] = {}  # images/s
        self.utilisation: dict[str, float] = {}

    def __call__(self, name: str, work: Work, repeats: int, *, bare: bool = False, peft: bool = False) -> None:
        ways: dict[str, Callable[[], Any]] = {name: work.package()}
        if bare:
            ways[f"{name}: bare loop"] = work.bare()
        if peft:
            made = self.part.attempt(f"{name}: peft", work.peft)
            ways |= {f"{name}: peft": made} if made is not None else {}
        self.ways(ways, work, repeats)

    def ways(self, ways: dict[str, Callable[[], Any]], work: Work, repeats: int) -> None:
        """A line each; the first one is the package's, one may be the bare loop."""
        memory = {name: peak_gib(work.device, way) for name, way in ways.items()}  # warms up, too
        seconds = interleaved(work.device, ways, repeats, warm_ups=1)
        bare = next((seconds[name] for name in ways if name.endswith("bare loop")), None)
        for name in ways:
            rates = [work.images_of_a_pass / taken for taken in seconds[name]]
            used = mfu(self.part, work, rates)
            ratio = None if bare is None else [b / s for b, s in zip(bare, seconds[name], strict=True)]
            self.rates[name], self.utilisation[name] = (
                statistics.median(rates),
                statistics.median(used) / 100 if used else 0.0,
            )
            self.table.row(name, rates, used, ratio, memory[name])


def mfu(part: Part, work: Work, rates: list[float]) -> list[float] | None:
    """Per cent of the card's dense bf16 peak that images a second are worth."""
    if part.peak_tflops is None:
        return None
    return [100 * rate * work.flop / (part.peak_tflops * 1e12) for rate in rates]


def agreement(part: Part, work: Work) -> None:
    """The package and the bare loop end with the same adapter, at float32."""
    use_tf32(False)
    mine, theirs = work.package()(), work.bare()()
    moved = (theirs - work.start).norm()
    gap = float((mine - theirs).norm() / moved)
    part.check("local training ends as the bare loop does", gap < 1e-3, f"difference {gap:.1e} of the way (1e-3)")


def compiled(part: Part, compare: _Comparison, size: Size, precision: str, repeats: int) -> None:
    """The package with model.compile, and the bare loop compiled; on a model of their own."""
    torch.compiler.reset()
    work = Work(size, part.device, precision=precision)
    work.model.compile(backend=backend(part))  # as experiment.py does for model.compile
    name = f"{precision}, compiled"
    compare.ways({name: work.package(), f"{name}: bare loop": work.bare(backend(part))}, work, repeats)
    part.attempt("kernels", lambda: kernels(part, f"{size.steps} steps, {name}", work.package()))


def reduced(part: Part, compare: _Comparison, size: Size, repeats: int) -> None:
    """The package with model.compile_mode=reduce-overhead: CUDA graphs of forward and backward pass."""
    torch.compiler.reset()
    work = Work(size, part.device, precision="bf16-true")
    work.model.compile(backend="inductor", mode="reduce-overhead")  # model.compile_mode
    compare.ways({"bf16-true, compiled, CUDA graphs": work.package()}, work, repeats)


def others(part: Part, model: str, repeats: int) -> None:
    """Another model, in bf16-true with and without compilation."""
    size = Size("mixer_s32_224", 64, 4, batch=4, steps=1) if part.tiny else size_of(part, model)
    table = part.table(f"One client, {size.model} at {size.pixels} px, batch {size.batch}", *COLUMNS)
    compare = _Comparison(part, table)
    torch.compiler.reset()
    work = Work(size, part.device, precision="bf16-true")
    part.say(f"{work.flop / 1e9:.1f} GFLOP an image")
    compare("bf16-true", work, repeats)
    if not part.tiny:
        part.attempt(f"{model}, compiled", lambda: _compile(part, work, compare, repeats))


def _compile(part: Part, work: Work, compare: _Comparison, repeats: int) -> None:
    work.model.compile(backend=backend(part))
    compare.ways({"bf16-true, compiled": work.package()}, work, repeats)


def goals(part: Part, compare: _Comparison) -> None:
    """The best bf16 that a run can have, against the best bare loop."""
    rates = compare.rates
    bare = [rate for name, rate in rates.items() if name.startswith("bf16") and "bare" in name]
    possible = {*HALVES, *(f"{name}, compiled" for name in HALVES), "bf16-true, compiled, CUDA graphs"}  # of a run
    mine = {name: rate for name, rate in rates.items() if name in possible}
    if not (bare and mine):
        return
    best = max(mine, key=lambda name: mine[name])
    part.say(f"best of the package in bf16: {best}, {text_of(mine[best])} images/s")
    part.goal("training over the best bare loop (images/s)", mine[best] / max(bare), GOAL_OF_BARE)
    if part.peak_tflops is not None:
        part.goal("MFU at the large batch in bf16", compare.utilisation[best], GOAL_MFU)

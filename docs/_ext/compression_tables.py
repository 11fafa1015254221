"""Tables and figures of concepts/compression.md: what codings cost and lose, and what was measured with them."""

from __future__ import annotations

import csv
import statistics

import torch
from matplotlib.figure import Figure
from stored_draws import DATA, Stored

from lorafair.communication.compression.base import RowCoding
from lorafair.comparison.frontier import Point, best_of
from lorafair.config.schema import CompressionConfig
from lorafair.registry import COMPRESSIONS, METHODS
from lorafair.seeding import seeded

ACCURACY, CORRECTION = DATA / "compression.csv", DATA / "compression_correction.csv"
SHOWN = {
    "float16": ("float16", {}),
    "bfloat16": ("bfloat16", {}),
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "unary": ("unary", {}),
    "ternary": ("ternary", {}),
    "topk, 1/8": ("topk", {"fraction": 0.125}),
    "topk, 1/8, 4 bits": ("topk", {"fraction": 0.125, "bits": 4}),
    "topk, 1/16, 4 bits": ("topk", {"fraction": 0.0625, "bits": 4}),
    "randomk, 1/8, 4 bits": ("randomk", {"fraction": 0.125, "bits": 4}),
}


def coding_of(name: str) -> RowCoding:
    """A coding of the tables."""
    coding, options = SHOWN[name]
    made: RowCoding = COMPRESSIONS[coding].of(CompressionConfig(**options), True)
    return made


def cost(name: str, width: int) -> tuple[int, float, float]:
    """Bytes of a row, bits a number, and ‖x − Q(x)‖/‖x‖ of normal numbers."""
    coding, rows = coding_of(name), torch.randn(64, width, generator=seeded(0, "rows"))
    keys = torch.arange(64)
    message = coding.encode(rows, keys)
    error = (rows - coding.decode(message, width, keys)).norm() / rows.norm()
    return message.shape[1], 8 * message.shape[1] / width, float(error)


def table(width: int) -> str:
    """A line a coding, as Markdown."""
    lines = [
        "| coding | bytes of a row | bits a number | less than float32 | lost of a row |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in SHOWN:
        size, bits, error = cost(name, width)
        lines.append(f"| {name} | {size} | {bits:.2f} | {32 / bits:.1f} × | {100 * error:.1f} % |")
    return "\n".join(lines)


def correction_table() -> str:
    """What is left of ΔW by coding and method, from numbers kept in docs/data."""
    found: dict[str, dict[str, list[float]]] = {}
    with CORRECTION.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row["coding"], {}).setdefault(row["method"], []).append(float(row["error"]))
    methods = {"fedit": "FedIT", "lora_fair": "LoRA-FAIR", "flex_lora": "FlexLoRA"}
    text = ["| coding | " + " | ".join(methods.values()) + " |", "|---|" + "---:|" * len(methods)]
    text += [
        f"| {coding} | " + " | ".join(f"{statistics.fmean(errors[m]):.3f}" for m in methods) + " |"
        for coding, errors in found.items()
    ]
    return "\n".join(text)


def read() -> dict[str, dict[int, tuple[float, float]]]:
    """label -> by draw, accuracy in % and megabytes."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    with ACCURACY.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row["label"], {})[int(row["draw"])] = (float(row["accuracy"]), float(row["megabytes"]))
    return found


def points() -> list[Point]:
    """The means over draws, fewest megabytes first."""
    means = [
        Point(label, statistics.fmean(mb for _, mb in runs.values()), statistics.fmean(a for a, _ in runs.values()))
        for label, runs in read().items()
    ]
    return sorted(means, key=lambda point: (point.megabytes, -point.accuracy))


def accuracy_table() -> str:
    """Megabytes, accuracy, and the difference to FedIT in float32 over the draws that both have."""
    runs = read()
    base = runs["fedit"]
    text = ["| runs | draws | MB | less than FedIT | accuracy | points above FedIT | standard error |",
            "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for point in reversed(points()):
        pairs = [runs[point.label][draw][0] - base[draw][0] for draw in runs[point.label] if draw in base]
        error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
        less = statistics.fmean(mb for _, mb in base.values()) / point.megabytes
        mine = "" if point.label == "fedit" else f"{statistics.fmean(pairs):+.2f} | {error:.2f}"
        text.append(
            f"| `{point.label}` | {len(pairs)} | {point.megabytes:.2f} | {less:.1f} × | {point.accuracy:.1f} | "
            f"{mine or ' | '} |"
        )
    return "\n".join(text)


def glyphs_table() -> str:
    """What codings cost and save, from the stored draws of GlyphDomains: differences to FedIT in float32."""
    stored, base = Stored(DATA / "compression_glyphs.csv"), "fedit"
    [setting] = {setting for setting, _ in stored.lines}
    text = ["| runs | draws | MB | less than FedIT | points above FedIT, 95 % interval |", "|---|---:|---:|---:|---:|"]
    plain = stored.mean(setting, base, "megabytes") or 0.0
    for label in stored.methods(setting):
        draws, megabytes = len(stored.values(setting, label)), stored.mean(setting, label, "megabytes") or plain
        above = "" if label == base else stored.difference(setting, label, base)
        text.append(f"| `{label}` | {draws} | {megabytes:.2f} | {plain / megabytes:.1f} × | {above} |")
    return "\n".join(text)


def draw() -> Figure:
    """Accuracy against megabytes: a colour for each method."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = figure.subplots()
    found = points()
    methods = {"fedit": "#4a525c", "lora_fair": "#e08a00", "flex_lora": "#3a8fd0", "ffa_lora": "#2a9d6f"}
    for method, color in methods.items():
        mine = [point for point in found if point.label.startswith(method)]
        x, y = [point.megabytes for point in mine], [point.accuracy for point in mine]
        axes.plot(x, y, "o", color=color, markersize=5, label=METHODS.title(method))
    for place, point in enumerate(best := best_of(found)):
        method = next(name for name in methods if point.label.startswith(name))
        text = point.label.removeprefix(method).strip("_").replace("_", " 1/") or "float32"
        offset, side = ((6, -11), "left") if place % 2 else ((-6, 5), "right")  # neighbours would lie over each other
        axes.annotate(text, (point.megabytes, point.accuracy), offset, textcoords="offset points", ha=side, size=8)
    axes.plot(
        [p.megabytes for p in best], [p.accuracy for p in best], color="#c3c8cf", drawstyle="steps-post", zorder=0
    )
    axes.set(xlabel="MB sent and received by all clients in all rounds", ylabel="mean accuracy (%)", xscale="log")
    axes.margins(x=0.15, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure

"""Bytes of one layer and round by method: the table and figure of concepts/traffic.md.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from matplotlib.figure import Figure

from lorafair.aggregation.base import aggregate
from lorafair.aggregation.registry import build_aggregator
from lorafair.communication.traffic import Traffic, round_traffic
from lorafair.model.adapter import AdapterLayout
from lorafair.registry import METHODS
from lorafair.seeding import seeded


@cache
def layer_traffic(
    method: str, *, outputs: int, inputs: int, lora_ranks: Sequence[int], round_index: int = 0
) -> Traffic:
    """What K clients of these LoRA ranks send and receive of one layer (O, I) in a round (from 0), in bytes.

    The factors are random numbers, and the update is what the method makes of them, so its size is what a run sends.
    """
    count, largest = len(lora_ranks), max(lora_ranks)
    aggregator = build_aggregator({"name": method})
    layout = AdapterLayout.of({"layer": ((largest, inputs), (outputs, largest))}, {}, aggregator.core)
    generator = seeded(0, "traffic table")
    rows = torch.randn(count, layout.length, generator=generator)
    clients = layout.unpack(layout.truncated(rows, torch.tensor(lora_ranks)))
    start = layout.unpack(torch.randn(layout.length, generator=generator))
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    update = aggregate(aggregator, clients, weights, start, aggregator.receives(round_index))
    return round_traffic(layout, aggregator, update, round_index, lora_ranks)


def table(*, outputs: int, inputs: int, lora_rank: int, clients: int) -> str:
    """Kilobytes a client, and those of all clients, as a Markdown table; methods of equal traffic in one line."""
    lines: dict[tuple[int, int], list[str]] = {}
    for method in METHODS.names:
        if not METHODS.is_from_plugin(method):
            traffic = layer_traffic(method, outputs=outputs, inputs=inputs, lora_ranks=(lora_rank,) * clients)
            lines.setdefault((traffic.up, traffic.down), []).append(f"`{method}`")
    text = ["| method | up, kB a client | down, kB a client | both, kB of all clients |", "|---|---:|---:|---:|"]
    for (up, down), methods in sorted(lines.items(), key=lambda line: sum(line[0])):
        numbers = (up / clients, down / clients, up + down)
        text.append(f"| {', '.join(methods)} | " + " | ".join(f"{n / 1000:,.1f}" for n in numbers) + " |")
    return "\n".join(text)


def draw(*, outputs: int, inputs: int, lora_rank: int, clients: Sequence[int]) -> Figure:
    """Bytes down, a client of the round, over the number of clients in the round."""
    shown = {"lora_fair": ("LoRA-FAIR, FedIT", "-"), "fedex_lora": ("FedEx-LoRA", "--"), "ffa_lora": ("FFA-LoRA", ":")}
    figure = Figure(figsize=(7.4, 3.0), layout="constrained")
    axes = figure.subplots()
    for (method, (label, style)), color in zip(shown.items(), ("#e08a00", "#3a8fd0", "#4a525c"), strict=True):
        kilobytes = [
            layer_traffic(method, outputs=outputs, inputs=inputs, lora_ranks=(lora_rank,) * count).down / count / 1000
            for count in clients
        ]
        axes.plot(clients, kilobytes, style, color=color, marker="o", markersize=4, label=label)
    axes.axhline(outputs * inputs * 4 / 1000, color="#c3c8cf", linewidth=1)
    axes.text(clients[0], outputs * inputs * 4 / 1000 * 1.06, "the whole layer, O · I numbers", size=9, color="#4a525c")
    axes.set(xlabel="clients of the round, K", ylabel="kB down a client and layer", xscale="log", yscale="log")
    axes.set_xticks(clients, [str(count) for count in clients])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure

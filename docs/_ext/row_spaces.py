"""What the correction of LoRA-FAIR can reach on trained factors: the figure and table of concepts/lora_fair.md.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

import lorafair
from lorafair.aggregation.factor_algebra import split_ideal_update
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.registry import METHODS

COMMAND = ("synthetic.yaml", "rounds=1", "client.steps=40", "fabric.devices=1", "method.name=recorded")
COLORS = {"row": "#e08a00", "column": "#3a8fd0", "outside": "#c3c8cf"}


@dataclass(frozen=True)
class Recorded(LoRAFair):
    """LoRA-FAIR that keeps what the server has been given last."""

    seen: ClassVar[dict[str, Any]] = {}

    def combine_layers(
        self,
        layers: Mapping[str, lorafair.LoRAFactors],
        weights: Tensor,
        start: Mapping[str, lorafair.LoRAFactors] | None = None,
    ) -> dict[str, lorafair.LayerUpdate]:
        """As LoRA-FAIR."""
        copies = {path: lorafair.LoRAFactors(A=f.A.clone(), B=f.B.clone()) for path, f in layers.items()}
        self.seen.update(layers=copies, weights=weights.clone())
        return super().combine_layers(layers, weights, start)


def train_one_round() -> tuple[dict[str, lorafair.LoRAFactors], Tensor]:
    """The factors that the three clients of a round return, A (K, R, I) and B (K, O, R) by layer, and their weights."""
    lorafair.register_method("recorded")(Recorded)
    logging.disable(logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            lorafair.run(*COMMAND, run_dir=Path(folder, "run"))
    finally:
        logging.disable(logging.NOTSET)
        METHODS.remove("recorded")
    return Recorded.seen["layers"], Recorded.seen["weights"]


@dataclass(frozen=True)
class Reach:
    """One layer. Fractions of ‖ΔR‖² by where they lie, and the relative errors of the update."""

    row: float  # in the row space of Ā: a correction of B reaches it
    column: float  # outside of it, in the column space of B̄: a correction of A reaches it
    outside: float  # neither
    before: float  # ‖ΔW − B̄Ā‖/‖ΔW‖
    after: float  # the same of LoRA-FAIR's B'Ā
    floor: float  # the least that any correction of B can leave


def reach(clients: lorafair.LoRAFactors, weights: Tensor) -> Reach:
    """Split the bias of one layer and correct it."""
    ideal = split_ideal_update(clients, weights)
    A, B, bias = ideal.mean.A, ideal.mean.B, ideal.bias.B @ ideal.bias.A
    update = B @ A + bias
    rows, columns = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)  # the projectors, (I, I) and (O, O)
    in_rows = bias @ rows
    in_columns = columns @ (bias - in_rows)
    rest = bias - in_rows - in_columns
    corrected = LoRAFair().combine(clients, weights).factors
    size, of_bias = update.norm(), bias.square().sum()
    return Reach(
        row=float(in_rows.square().sum() / of_bias),
        column=float(in_columns.square().sum() / of_bias),
        outside=float(rest.square().sum() / of_bias),
        before=float(bias.norm() / size),
        after=float((update - corrected.B @ corrected.A).norm() / size),
        floor=float((bias - in_rows).norm() / size),
    )


def draw(layers: Mapping[str, lorafair.LoRAFactors], weights: Tensor) -> Figure:
    """Where the bias of every layer lies, and the error before and after the correction."""
    found = {path.removeprefix("blocks."): reach(clients, weights) for path, clients in layers.items()}
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    names = list(found)[::-1]
    labels = {"row": "in the row space of Ā", "column": "in the column space of B̄ only", "outside": "outside of both"}
    begin = dict.fromkeys(names, 0.0)
    for part, label in labels.items():
        widths = [getattr(found[name], part) for name in names]
        left.barh(names, widths, 0.6, left=list(begin.values()), color=COLORS[part], label=label)
        for row, name in enumerate(names):
            if widths[row] > 0.055:
                left.text(begin[name] + widths[row] / 2, row, f"{widths[row]:.0%}", ha="center", va="center", size=8)
            begin[name] += widths[row]
    left.set(xlim=(0, 1), xlabel="fraction of ‖ΔR‖²", xticks=[0, 0.5, 1])
    for row, name in enumerate(names):
        right.plot([found[name].floor, found[name].before], [row, row], color=COLORS["outside"], zorder=1)
    right.scatter([found[n].before for n in names], names, color="#4a525c", label="before", zorder=3)
    right.scatter([found[n].after for n in names], names, color=COLORS["row"], label="after LoRA-FAIR", zorder=3)
    right.scatter([found[n].floor for n in names], names, marker="|", s=120, color="black", label="least possible")
    right.set(xlim=(0, None), xlabel="relative error ‖ΔW − X‖/‖ΔW‖")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.legend(
            fontsize=8,
            frameon=False,
            ncols=1,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            handletextpad=0.5,
            borderpad=0.2,
        )
    return figure


def solver_table(clients: lorafair.LoRAFactors, weights: Tensor) -> str:
    """Both solvers on one layer, with B as it is and a hundredth of it, as a Markdown table."""
    lines = ["| B | solver | objective | ‖B′‖/‖B̄‖ | relative error |", "|---|---|---:|---:|---:|"]
    for name, size in (("as trained", 1.0), ("× 0.01", 0.01)):
        scaled = lorafair.LoRAFactors(A=clients.A, B=size * clients.B)
        ideal = split_ideal_update(scaled, weights)
        update = ideal.mean.B @ ideal.mean.A + ideal.bias.B @ ideal.bias.A
        for solver in ("exact", "sgd"):
            method = LoRAFair(solver=solver)
            corrected = method.combine(scaled, weights).factors
            value = float(method.objective(scaled, weights)(corrected))
            error = float((update - corrected.B @ corrected.A).norm() / update.norm())
            ratio = float(corrected.B.norm() / ideal.mean.B.norm())
            lines.append(f"| {name} | {solver} | {value:.6f} | {ratio:.3f} | {error:.3f} |")
    return "\n".join(lines)

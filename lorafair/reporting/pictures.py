"""Pictures of a run.

Letters: Q classes.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = 150  # classes of a picture; more labels are not readable
_NUMBERED = 40  # classes of a picture whose cells have room for a number
_INCH_PER_CELL, _INCH_PER_LETTER, _DPI = 0.3, 0.085, 100


def confusion_picture(confusion: Tensor, classes: Sequence[str], title: str) -> np.ndarray[Any, Any] | None:
    """A confusion matrix (Q, Q) of counts, true classes in rows, as an RGB picture (H, W, 3) uint8.

    Each row is shown in percent of its class. None for more than LARGEST classes.
    """
    count = len(classes)
    if count > LARGEST:
        return None
    classes, title = [_plain(name) for name in classes], _plain(title)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot would touch the user's display and state
    from matplotlib.figure import Figure

    percent = (100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)).round().to(torch.int64)
    cell = _INCH_PER_CELL if count <= _NUMBERED else 0.16
    side = max(3.0, cell * count)
    margin = 0.9 + _INCH_PER_LETTER * max(map(len, classes))  # of the labels, left and below
    figure = Figure(figsize=(side + margin + 0.3, side + margin + 0.8), layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(percent, cmap="Blues")
    axes.set_xlabel("Predicted class", fontsize=10)
    axes.set_ylabel("True class", fontsize=10)
    size = min(10.0, 62 * side / count)
    axes.set_xticks(range(count), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(count), classes, rotation=0, fontsize=size)
    if count <= _NUMBERED:
        for true, predicted in percent.nonzero().tolist():
            value = int(percent[true, predicted])
            colour = "white" if value > percent.max() / 2 else "black"
            axes.text(predicted, true, str(value), ha="center", va="center", fontsize=0.75 * size, color=colour)
    letters = int((side + margin) / 0.095)
    axes.set_title("\n".join(textwrap.wrap(f"{title}: percent of each true class", letters)), fontsize=11)
    figure.set_dpi(_DPI)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as an empty box
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: between two dollar signs it would read a formula."""
    return name.replace("$", r"\$")

"""What a run leaves to look at: TensorBoard curves, metrics.csv, a progress line, the final table and result.json.

Rank 0 alone makes a Tracker. Scalars are named group/name, e.g. eval/accuracy/sketch; README.md lists them.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lorafair.config import ConfigError


class Tracker:
    """Writes the scalars of each round to TensorBoard and to run_dir/metrics.csv (round, name, value)."""

    def __init__(self, run_dir: Path, *, completed_rounds: int, rounds: int) -> None:
        self._run_dir = run_dir
        self._rounds = rounds
        self._started, self._first_round = time.monotonic(), completed_rounds
        # A continued run repeats the rounds after its checkpoint: their earlier values are dropped in both places.
        self._writer = SummaryWriter(str(run_dir), purge_step=completed_rounds + 1)
        self._csv_file, self._csv = _reopen_csv(run_dir / "metrics.csv", completed_rounds)

    def scalars(self, values: Mapping[str, float], completed_rounds: int) -> None:
        """Record values after this many rounds and make them visible at once."""
        # As one event: add_scalar would write one for each, which took longer than the server's step.
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer._get_file_writer().add_summary(summary, completed_rounds)
        self._csv.writerows([completed_rounds, name, repr(float(value))] for name, value in values.items())
        self._writer.flush()
        self._csv_file.flush()

    def progress(self, completed_rounds: int, parts: Sequence[str]) -> None:
        """Print one line for a round, with the time the rest will take at the pace so far."""
        pace = (time.monotonic() - self._started) / max(1, completed_rounds - self._first_round)
        left = _duration(pace * (self._rounds - completed_rounds))
        say(f"round {completed_rounds:>{len(str(self._rounds))}}/{self._rounds}  {'  '.join(parts)}  ETA {left}")

    def confusion(self, confusion: Tensor, classes: Sequence[str], title: str, completed_rounds: int) -> None:
        """Show a confusion matrix (Q, Q) of counts, true classes in rows, as a picture."""
        picture = confusion_picture(confusion.numpy(), classes, title)
        self._writer.add_image(f"eval/confusion/{title}", picture, completed_rounds, dataformats="HWC")

    def finish(
        self, hyperparameters: Mapping[str, Any], metrics: Mapping[str, float], result: Mapping[str, Any]
    ) -> None:
        """Record hyperparameters with the final metrics, write result.json and close the files."""
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in hyperparameters.items()}
        self._writer.add_hparams(plain, dict(metrics), run_name=".")
        self.close()
        partial = self._run_dir / ".result.json.partial"
        partial.write_text(json.dumps(result, indent=1, default=str) + "\n")
        os.replace(partial, self._run_dir / "result.json")

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()
        self._csv_file.close()


def make_run_dir(run_dir: Path) -> None:
    """Create run_dir and see that files can be made in it. Raises ConfigError where they cannot."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written to ({error.strerror}); choose another one") from error


class Clock:
    """Seconds of the parts of one round: `with clock("train"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a part; on a GPU until its work is done."""
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[part] = time.perf_counter() - began


def say(line: str) -> None:
    """Print a line now: job logs are read while the job runs."""
    print(line, flush=True)


def confusion_picture(confusion: np.ndarray[Any, Any], classes: Sequence[str], title: str) -> np.ndarray[Any, Any]:
    """Draw a confusion matrix (Q, Q), each row as shares of its class: an RGB picture (H, W, 3) uint8."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    count = len(classes)
    cell = max(4, min(28, 720 // count))
    font = ImageFont.load_default(max(8, min(13, cell - 2)))
    labelled = cell >= 10
    margin = 20 + (max(int(font.getlength(name)) for name in classes) if labelled else 0)
    top = 40 + (margin - 20 if labelled else 0)
    picture = Image.new("RGB", (margin + count * cell + 20, top + count * cell + 30), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((margin, 8), f"{title}: rows true, columns predicted, shares of a row", "black", font)
    for i in range(count):
        for j in range(count):
            dark = int(255 * (1 - shares[i, j]))
            x, y = margin + j * cell, top + i * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), (dark, dark, 255 if dark > 40 else 120 + dark))
            if labelled and cell >= 22 and shares[i, j] >= 0.01:
                ink = "black" if dark > 128 else "white"
                draw.text((x + cell // 2, y + cell // 2), f"{100 * shares[i, j]:.0f}", ink, font, anchor="mm")
        if labelled:
            draw.text((margin - 6, top + i * cell + cell // 2), classes[i], "black", font, anchor="rm")
            _vertical_label(picture, classes[i], font, margin + i * cell + cell // 2, top - 6)
    return np.asarray(picture)


def _vertical_label(picture: Image.Image, text: str, font: Any, x: int, bottom: int) -> None:
    width, height = int(font.getlength(text)) + 2, int(font.size) + 4
    label = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(label).text((0, 0), text, "black", font)
    upright = label.rotate(90, expand=True) if len(text) > 2 else label
    picture.paste(upright, (x - upright.width // 2, bottom - upright.height))


def _reopen_csv(path: Path, completed_rounds: int) -> tuple[TextIO, Any]:
    kept: list[list[str]] = []
    if completed_rounds and path.exists():
        with path.open(newline="") as file:
            rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3 and row[0].isdigit()]
        kept = [row for row in rows if int(row[0]) <= completed_rounds]
    partial = path.with_name(".metrics.csv.partial")
    with partial.open("w", newline="") as file:
        csv.writer(file).writerows([["round", "name", "value"], *kept])
    os.replace(partial, path)
    handle = path.open("a", newline="")
    return handle, csv.writer(handle)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"

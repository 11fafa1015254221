"""A logger and a callback: a line of JSON for each round, and the best round so far."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger

import lorafair

log = logging.getLogger("lorafair.shapes")  # below lorafair's: printed with its lines


class JsonLines(Logger):
    """Writes the scalars of each round as one line."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "json_lines"

    @property
    def version(self) -> str:
        """There is one file, which is continued."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One line; what is of the whole run comes with no step."""
        if step is None:
            return
        with self._file.open("a", encoding="utf-8") as file:
            print(json.dumps({"round": step, **metrics}), file=file)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """The run's config.yaml has them."""


@lorafair.register_logger("json_lines")
def json_lines(run_dir: Path, file: str = "rounds.jsonl") -> JsonLines:
    """To a file in the run's directory."""
    return JsonLines(run_dir / file)


@lorafair.register_callback("best_round")
class BestRound(lorafair.Callback):
    """Says at the end which round was the most accurate."""

    def __init__(self) -> None:
        self._best = (0.0, 0)

    def on_evaluation(self, round: int, evaluation: lorafair.Evaluation) -> None:
        """Remember the best."""
        self._best = max(self._best, (evaluation.mean_accuracy, round))

    def on_stop(self, completed_rounds: int, reason: str) -> None:
        """Tell."""
        log.info(f"best round: {self._best[1]}, with {100 * self._best[0]:.1f} %")

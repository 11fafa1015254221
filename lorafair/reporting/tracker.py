"""Where scalars go: TensorBoard, metrics.csv (round, name, value), and Fabric's loggers."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from lorafair.checkpointing.folder import free_name
from lorafair.config.identity import flatten
from lorafair.config.schema import TensorBoardConfig
from lorafair.console import format_count, log
from lorafair.errors import one_line
from lorafair.files.writing import naming, replacing
from lorafair.reporting.board import Board
from lorafair.reporting.run_dir import METRICS_FILE

if TYPE_CHECKING:
    from lightning.fabric.loggers.logger import Logger


class Tracker:
    """Writes the scalars of each round; scalars are named group/name, e.g. eval/accuracy/sketch."""

    def __init__(
        self,
        run_dir: Path,
        completed_rounds: int,
        settings: Mapping[str, Any],
        loggers: list[Logger],
        board: TensorBoardConfig | None = None,
    ) -> None:
        self._loggers = list(loggers)
        self._settings = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in flatten(settings).items()
        }
        self._show_settings()
        self._run_dir = run_dir
        # A continued run repeats the rounds after its checkpoint: their earlier values are dropped in both places.
        self.board = Board(run_dir, completed_rounds, board or TensorBoardConfig())
        self._csv_file, self._csv, self._kept = _reopen_csv(run_dir / METRICS_FILE, completed_rounds)

    def recall(self) -> None:
        """Give the board the values of the rounds before, for its pictures."""
        for round, name, value in self._kept:
            self.board.remember({name: float(value)}, int(round))
        self._kept = []

    def _show_settings(self) -> None:
        """To the loggers that take them: not all do, and config.yaml has them in any case."""
        for logger in self._loggers:
            try:
                logger.log_hyperparams(self._settings)
            except NotImplementedError:
                continue
            except Exception as error:  # raised by the logger
                log.warning(f"logger {type(logger).__name__} did not take the settings: {one_line(error)}")

    def scalars(self, values: Mapping[str, float], round: int) -> None:
        """Record values after this many rounds and make them visible at once."""
        self.board.scalars(values, round)
        with naming(self._run_dir / METRICS_FILE):
            self._csv.writerows([round, name, repr(float(value))] for name, value in values.items())
            self._csv_file.flush()
        self._call_loggers(lambda logger: logger.log_metrics(dict(values), step=round))

    def final(self, metrics: Mapping[str, float]) -> None:
        """Give loggers numbers of the whole run, at no step."""
        self._call_loggers(lambda logger: logger.log_metrics(dict(metrics)))

    def close(self, status: str) -> None:
        """Flush and close everything; `status` is "success" or "failed"."""
        self._call_loggers(lambda logger: logger.finalize(status))
        self.board.close(status)
        with naming(self._run_dir / METRICS_FILE):
            self._csv_file.close()

    def _call_loggers(self, what: Callable[[Logger], object]) -> None:
        """Call each logger; one that fails is left out from then on, and the run continues."""
        for logger in list(self._loggers):
            try:
                what(logger)
            except Exception as error:  # raised by the logger
                self._loggers.remove(logger)
                log.warning(
                    f"logger {type(logger).__name__} failed and gets nothing more of this run "
                    f"({type(error).__name__}: {one_line(error)}); TensorBoard and {METRICS_FILE} have everything"
                )


class Clock:
    """Seconds of the phases of one round: `with clock("train"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase; on a GPU until its work is done."""
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def _reopen_csv(path: Path, completed_rounds: int) -> tuple[TextIO, Any, list[list[str]]]:
    """The file with the lines of the rounds that are done, what writes to it, and those lines."""
    kept = _rows_of(path, completed_rounds) if completed_rounds else []
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["round", "name", "value"], *kept])
    handle = path.open("a", newline="", encoding="utf-8")
    return handle, csv.writer(handle), kept


def _rows_of(path: Path, completed_rounds: int) -> list[list[str]]:
    """The lines of the rounds that are done. Where some are lost, that is said, and the file as it was is kept."""
    if not path.exists():  # as where it continues from the checkpoint of another directory
        log.info(f"{path.parent} has no numbers of rounds before round {completed_rounds + 1}")
        return []
    content = path.read_bytes().decode("utf-8", errors="replace")
    *lines, cut = content.split("\n")
    rows = [_row_of(line) for line in lines[1:]]
    kept = [row for row in rows if row and int(row[0]) <= completed_rounds]
    unreadable = rows.count([])
    number, comma, _ = cut.partition(",")  # a run that was killed leaves a line of the round after its checkpoint so
    if cut and not (comma and number.isdecimal() and int(number) > completed_rounds):
        unreadable += 1
    lost = sorted({*range(1, completed_rounds + 1)} - {int(row[0]) for row in kept})
    if lost or unreadable:
        what = [f"{format_count(unreadable, 'line')} cannot be read"] if unreadable else []
        what += [f"nothing is left of {format_count(len(lost), 'round')}, the first is {lost[0]}"] if lost else []
        aside = free_name(path, "damaged")
        shutil.copyfile(path, aside)
        what.append(f"the file as it was is kept as {aside.name}")
        log.warning(f"{path} is damaged: {'; '.join(what)}; the run goes on, and TensorBoard may still have the values")
    return kept


def _row_of(line: str) -> list[str]:
    """Round, name and value; nothing of a line that is not whole."""
    try:
        [row] = csv.reader([line.rstrip("\r")])
        round, name, value = row
        float(value)
    except (ValueError, csv.Error):
        return []
    return row if round.isascii() and round.isdecimal() and name and "\ufffd" not in name else []

"""Clients of the round in progress that are done, kept on disk so that they are not trained again.

A write makes one file, checkpoints/unfinished_000004/clients_000012.safetensors, with the rows of whole cohorts: the
members of a cohort can influence each other's last bits. It holds the checksum of its content and of everything that
the round starts from; a file that does not match is ignored. Every rank writes its own clients, rank 0 reads.

Letters: C clients of a cohort, p numbers a client returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lorafair.checkpointing.folder import FOLDER, UNFINISHED, CheckpointError, entries, numbered, unreadable_now
from lorafair.checkpointing.rows import bytes_of, read_rows, write_rows
from lorafair.cluster.saved import note_saved
from lorafair.console import EVERY_RANK, log

Cohort = tuple[int, ...]
_OF_CLIENTS = re.compile(r"clients_\d{6,}\.safetensors")


def list_unfinished(run_dir: Path) -> dict[int, Path]:
    """The folders of rounds that were left unfinished, by the number of rounds completed before."""
    return {number - 1: path for number, path in numbered(run_dir, UNFINISHED).items()}


def drop_unfinished(run_dir: Path, completed_rounds: int) -> None:
    """Remove what is left of rounds that are completed."""
    for before, path in list_unfinished(run_dir).items():
        if before < completed_rounds:
            shutil.rmtree(path, ignore_errors=True)


def start_of_round(identity: Mapping[str, Any], completed_rounds: int, adapter: Tensor) -> str:
    """A checksum of what decides a round: the run's settings, images and weights, its number, and its start."""
    text = json.dumps([identity, completed_rounds], sort_keys=True, default=str)
    return hashlib.sha256(text.encode() + bytes_of(adapter)).hexdigest()


class PartialRound:
    """The cohorts of one round that are done: those found on disk, and those of this rank that are not there yet."""

    def __init__(self, run_dir: Path, completed_rounds: int, start: Callable[[], str], seconds: float) -> None:
        self.found: dict[Cohort, Tensor] = {}  # rows (C, p); on rank 0 alone
        self._folder = run_dir / FOLDER / f"{UNFINISHED}{completed_rounds + 1:06d}"
        self._start, self._seconds = start, seconds
        self._pending: dict[Cohort, Tensor] = {}
        self._lock = threading.Lock()  # the watchdog writes, too
        self._written = time.monotonic()

    def read(self) -> None:
        """Read what earlier attempts at this round have saved; a file that does not match is named and ignored.

        Raises CheckpointError for one that cannot be read now.
        """
        files = [file for file in entries(self._folder) if _OF_CLIENTS.fullmatch(file.name)]
        start = self._start() if files else ""
        for file in files:
            try:
                self.found |= _read(file, start)
            except OSError as error:
                raise unreadable_now(file, error.strerror or str(error)) from error
            except (ValueError, KeyError, SafetensorError) as error:
                log.warning(f"{file} is not used: {error}; its clients are trained again")

    def add(self, cohort: Cohort, rows: Tensor) -> None:
        """A cohort of this rank is done; write what is pending if the last write is long enough ago."""
        with self._lock:
            self._pending[cohort] = rows
        if time.monotonic() - self._written >= self._seconds:
            self.write()

    def write(self) -> None:
        """Write the cohorts that are not on disk yet. Raises CheckpointError."""
        with self._lock:
            if self._pending:
                cohorts, rows = list(self._pending), torch.cat(list(self._pending.values())).cpu()
                _write(self._folder / f"clients_{cohorts[0][0]:06d}.safetensors", cohorts, rows, self._start())
                self._pending.clear()
                note_saved()
        self._written = time.monotonic()

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Write what is pending, too, when the block ends with an error, also if other ranks are lost."""
        try:
            yield
        except BaseException:
            try:
                self.write()
            except CheckpointError as error:  # the one that ends the block is the one to raise
                log.warning(str(error), extra=EVERY_RANK)
            raise


def _write(file: Path, cohorts: Sequence[Cohort], rows: Tensor, start: str) -> None:
    try:
        write_rows(file, rows, {"cohorts": json.dumps(cohorts), "start": start})
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise CheckpointError(f"finished clients could not be saved as {file}: {why}") from error


def _read(file: Path, start: str) -> dict[Cohort, Tensor]:
    """The rows of the file's cohorts; Raises what is wrong with them.

    ValueError, KeyError or SafetensorError of damaged ones and those of another run, OSError where they cannot be read.
    """
    rows, described = read_rows(file)
    if described["start"] != start:
        raise ValueError("it belongs to a round that started from something else")
    cohorts = [tuple(cohort) for cohort in json.loads(described["cohorts"])]
    return dict(zip(cohorts, rows.split([len(cohort) for cohort in cohorts]), strict=True))

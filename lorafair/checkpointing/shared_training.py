"""Rows of clients that runs of a comparison have trained, for other runs that begin the same training.

A row is found by the digest of all that its training reads (client/digest.py), so it does not matter which run has
trained it. A file holds the cohorts that one rank has trained in one round, as
.shared_training/draw-3/round_000001.1f0c....safetensors, with their digests and the checksum of its content. Rank 0
reads; every rank writes its own clients. What cannot be read or written is trained again, and nothing else happens.

Letters: C clients of a cohort, p numbers a client returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lorafair.checkpointing.partial_round import Cohort
from lorafair.checkpointing.rows import read_description, read_rows, write_rows
from lorafair.console import EVERY_RANK, log

LIMIT = 4 * 2**30  # bytes of all draws together; half of it for rounds after the first, which fewer runs share
_OF_ROUND, _DIGESTS, _TRAINED_BY = "round_", "digests", "trained_by"


@dataclass(frozen=True)
class SharedRows:
    """The rows of a cohort that another run, or another start of this one, has trained."""

    rows: Tensor  # (C, p)
    trained_by: str


@dataclass(frozen=True)
class SharedTraining:
    """Where the runs of a draw leave what they have trained."""

    folder: Path  # of the draw
    run: str  # this one's name
    later_rounds: bool = True  # whether more than the first round is left: another run goes the same way

    def covers(self, round_index: int) -> bool:
        """Whether a round (from 0) is shared."""
        return round_index == 0 or self.later_rounds

    def find(self, round_index: int, digests: Mapping[Cohort, str]) -> dict[Cohort, SharedRows]:
        """Those of some cohorts, with the digest of each, that are there."""
        found: dict[Cohort, SharedRows] = {}
        wanted = {digest: cohort for cohort, digest in digests.items()}
        for file in self._files(round_index):
            try:
                if wanted.keys() & _digests_in(read_description(file)):
                    of_file = _read(file)
                    found |= {wanted[digest]: rows for digest, rows in of_file.items() if digest in wanted}
            except FileNotFoundError:  # its draw is done, and another process has removed it
                continue
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                log.warning(f"{file} is not used: {error}; its clients are trained again")
        return found

    def add(self, round_index: int, trained: Mapping[str, Tensor]) -> None:
        """Leave cohorts that this rank has trained, by digest, unless there is no room."""
        if not trained:
            return
        described = {
            _DIGESTS: json.dumps([[digest, len(rows)] for digest, rows in trained.items()]),
            _TRAINED_BY: self.run,
        }
        rows = torch.cat(list(trained.values())).cpu()
        limit = LIMIT if round_index == 0 else LIMIT // 2
        name = hashlib.sha256(described[_DIGESTS].encode()).hexdigest()[:32]
        file = self.folder / f"{_OF_ROUND}{round_index + 1:06d}.{name}.safetensors"
        try:
            if not file.exists() and _bytes_in(self.folder.parent) + rows.nbytes <= limit:
                write_rows(file, rows, described)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else error
            log.warning(f"what was trained is not shared with other runs: {file}: {why}", extra=EVERY_RANK)

    def _files(self, round_index: int) -> list[Path]:
        try:
            return sorted(self.folder.glob(f"{_OF_ROUND}{round_index + 1:06d}.*.safetensors"))
        except OSError as error:
            log.warning(f"{self.folder} cannot be read: {error}; nothing is taken over from other runs")
            return []


def drop_shared(folder: Path) -> None:
    """Remove what the runs of a draw have left."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(file: Path) -> dict[str, SharedRows]:
    rows, described = read_rows(file)
    counts = json.loads(described[_DIGESTS])
    parts = rows.split([count for _, count in counts])
    return {digest: SharedRows(part, described[_TRAINED_BY]) for (digest, _), part in zip(counts, parts, strict=True)}


def _digests_in(described: Mapping[str, str]) -> set[str]:
    return {digest for digest, _ in json.loads(described[_DIGESTS])}


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))

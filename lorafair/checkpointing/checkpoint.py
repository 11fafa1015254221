"""What a run continues from: adapters, a round number and what identifies the run, written aside and renamed.

A checkpoint is a folder round_000012 with state.safetensors and state.json; the latter holds the checksum of the
former, so that a half-written or damaged one is recognised. Nothing is pickled.

Letters: P packed length, N clients of the run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafair.cluster.slurm import Job
from lorafair.config.identity import differences
from lorafair.console import log
from lorafair.errors import ConfigError, LorafairError
from lorafair.files.writing import fsync, write_atomically

FORMAT = 1
_RENAMED = {"own": "personal_adapters"}  # tensors, from what they were called in 0.1
FOLDER = "checkpoints"
JOB = ".slurm_job"


class CheckpointError(LorafairError):
    """A checkpoint cannot be written, read, or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """The state between two rounds, on the CPU."""

    completed_rounds: int
    tensors: dict[str, Tensor]  # adapter (P,), base.<path> where folded, and whatever else the rounds hand on
    identity: dict[str, Any]  # must be equal for a run to continue from it
    totals: dict[str, float] = field(default_factory=dict)  # counted since round 1: seconds, bytes, ...
    client_seconds: dict[int, float] = field(default_factory=dict)  # that each client took lately


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write run_dir/checkpoints/round_<completed> atomically, then drop all but the newest `keep`; returns its path."""
    folder = run_dir / FOLDER
    target = folder / f"round_{checkpoint.completed_rounds:06d}"
    partial = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tensors = partial / "state.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, tensors)
        meta = {
            "format": FORMAT,
            "completed_rounds": checkpoint.completed_rounds,
            "sha256": _sha256(tensors),
            "identity": checkpoint.identity,
            "totals": checkpoint.totals,
            "seconds": checkpoint.client_seconds,
        }
        meta = json.loads(json.dumps(meta, default=str))
        (partial / "state.json").write_text(json.dumps(meta | {"checksum": _checksum(meta)}, indent=1))
        for path in (tensors, partial / "state.json", partial):
            fsync(path)
        shutil.rmtree(target, ignore_errors=True)  # only left from a run that was continued from an earlier round
        os.replace(partial, target)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {target} could not be written: {error}") from error
    # Later rounds can only be there if they were unreadable and the run went on from an earlier one.
    later = [path for path in list_checkpoints(run_dir) if path > target]
    for path in later + [path for path in list_checkpoints(run_dir) if path <= target][:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder; CheckpointError says what is wrong with it."""
    try:
        meta = json.loads((path / "state.json").read_text())
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {meta.get('format')}; this version reads {FORMAT}")
        if meta.pop("checksum", None) != _checksum(meta):
            raise CheckpointError(f"{path} is damaged: state.json does not match its checksum")
        if _sha256(path / "state.safetensors") != meta["sha256"]:
            raise CheckpointError(f"{path} is damaged: state.safetensors does not match its checksum")
        # Copied, because load_file maps the file into memory: it may be removed, and network file systems then fail.
        tensors = {
            _RENAMED.get(name, name): tensor.clone() for name, tensor in load_file(path / "state.safetensors").items()
        }
        return Checkpoint(
            completed_rounds=int(meta["completed_rounds"]),
            tensors=tensors,
            identity=dict(meta["identity"]),
            totals={str(name): float(total) for name, total in meta["totals"].items()},
            client_seconds={int(client): float(seconds) for client, seconds in meta.get("seconds", {}).items()},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from error


def find_checkpoint(run_dir: Path, resume: str, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to continue from, as the option `resume` says; None to start anew. Call on rank 0 only.

    auto skips unreadable checkpoints with a warning; never moves an earlier run aside; a path must be readable. Raises
    CheckpointError if the checkpoint belongs to a run with other settings, images or weights.
    """
    if resume == "never":
        _move_aside(run_dir)
        return None
    if resume != "auto":
        found = list_checkpoints(Path(resume))  # of a run directory, the newest
        try:
            checkpoint = load_checkpoint(found[-1] if found else Path(resume))
        except CheckpointError as error:
            raise CheckpointError(
                f"resume={resume}: {error}; give a run directory or one of its {FOLDER}/round_<n>"
            ) from error
        return _check_identity(checkpoint, identity, resume)
    paths = list_checkpoints(run_dir)
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            log.warning(f"{error}; trying the one before")
            continue
        return _check_identity(checkpoint, identity, str(path))
    if paths:
        log.warning(f"no readable checkpoint is left in {run_dir}; starting anew")
    return None


def resume_of_restarted(run_dir: Path, resume: str, job: Job | None) -> str:
    """The option `resume`, or auto in a Slurm job that was requeued and has already begun in run_dir.

    Without this, a job that began with resume=never or another run's checkpoint would do so again each time.
    """
    marker = run_dir / JOB
    if resume == "auto" or job is None or not job.restarts or not marker.exists() or marker.read_text() != job.name:
        return resume
    return "auto" if resume == "never" or list_checkpoints(run_dir) else resume


def mark_begun(run_dir: Path, job: Job | None) -> None:
    """Leave in run_dir which Slurm job has begun in it, for `resume_of_restarted`."""
    if job is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / JOB, job.name)


def make_run_dir(run_dir: Path) -> None:
    """Create run_dir and see that files can be made in it. Raises ConfigError where they cannot."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written to ({error.strerror}); choose another one") from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((run_dir / FOLDER).glob("round_[0-9]*"))


def _move_aside(run_dir: Path) -> None:
    run_dir = run_dir.resolve()
    if run_dir.exists() and any(run_dir.iterdir()):
        used = any((run_dir / name).exists() for name in (FOLDER, "config.yaml", "metrics.csv"))
        if not used or Path.cwd().resolve().is_relative_to(run_dir):
            raise CheckpointError(
                f"resume=never would move {run_dir} aside, which is not the directory of an earlier run alone; "
                "choose another run_dir"
            )
        number = next(n for n in itertools.count(1) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.{number}"))


def _check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any], origin: str) -> Checkpoint:
    differing = differences(checkpoint.identity, identity)
    if differing:
        raise CheckpointError(
            f"{origin} belongs to another run: {differing}. Choose another run_dir, or resume=never to start anew"
        )
    return checkpoint


def _checksum(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

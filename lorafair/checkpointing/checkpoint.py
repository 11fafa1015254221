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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafair.checkpointing.folder import FOLDER, ROUND, CheckpointError, numbered, set_aside, tidy, unreadable_now
from lorafair.checkpointing.lock import LOCK, move_aside
from lorafair.cluster.slurm import Job
from lorafair.config.identity import NOISE, differences, differing_keys
from lorafair.console import log
from lorafair.errors import ConfigError
from lorafair.files.writing import fsync, open_to_others, write_atomically

FORMAT = 1
_RENAMED = {"own": "personal_adapters"}  # tensors, from what they were called in 0.1
BASE = "base."  # before the path of a frozen weight that the federation has changed
MISSED = "missed"  # what clients have to catch up on; not in checkpoints of older versions
JOB = ".slurm_job"


class DamagedCheckpoint(CheckpointError):
    """Its content is not what was written; it will not get better."""


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
    target = folder / f"{ROUND}{checkpoint.completed_rounds:06d}"
    partial = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tensors = partial / "state.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, tensors)
        open_to_others(tensors)
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
        if os.path.lexists(target):  # only of a run that was continued from an earlier round
            set_aside(target, "replaced")
        os.replace(partial, target)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise CheckpointError(f"the checkpoint {target} could not be written: {error}") from error
    for path in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder. Raises DamagedCheckpoint, or CheckpointError where it cannot be read now."""
    try:
        return _load(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if path.is_symlink() and not path.exists():
            raise unreadable_now(path, "it is a link to what is not there") from error
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from error
    except OSError as error:
        raise unreadable_now(path, error.strerror or str(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from error


def _load(path: Path) -> Checkpoint:
    meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
    written = meta.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {written}, and this version of lorafair reads {FORMAT}; install the newer "
            "version that wrote it, or choose another run_dir"
        )
    if written != FORMAT:
        raise DamagedCheckpoint(f"{path} has checkpoint format {written}; this version reads {FORMAT}")
    if meta.pop("checksum", None) != _checksum(meta):
        raise DamagedCheckpoint(f"{path} is damaged: state.json does not match its checksum")
    if _sha256(path / "state.safetensors") != meta["sha256"]:
        raise DamagedCheckpoint(f"{path} is damaged: state.safetensors does not match its checksum")
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


def check_tensors(
    found: Mapping[str, Tensor], needed: Mapping[str, Tensor], origin: str, accept: Collection[str] = ()
) -> None:
    """Raise CheckpointError where a checkpoint has not exactly the tensors that a run needs, in shape and type.

    Frozen weights (BASE) are there all or none. Options that the user accepts as different may be why it has others.
    """
    optional = {name for name in needed if name.startswith(BASE)}
    wanted = needed.keys() if optional & found.keys() else needed.keys() - optional
    wanted = wanted - ({MISSED} - found.keys())
    problems = [f"{name} is missing" for name in sorted(wanted - found.keys())]
    problems += [f"{name} is of no use here" for name in sorted(found.keys() - wanted)]
    for name in sorted(wanted & found.keys()):
        there, here = (f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (found[name], needed[name]))
        if there != here:
            problems.append(f"{name} is {there} there and {here} here")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        remedy = "Put back the files that belong together"
        if accept:
            remedy = f"accept cannot help where an option changes what is kept: set {', '.join(accept)} as before"
        raise CheckpointError(
            f"{origin} does not fit this run: {'; '.join(problems[:3])}{more}. {remedy}, or choose another run_dir"
        )


def find_checkpoint(
    run_dir: Path, resume: str, identity: Mapping[str, Any], accept: Collection[str] = ()
) -> Checkpoint | None:
    """The checkpoint to continue from, as the option `resume` says; None to start anew. Call on rank 0 only.

    auto moves damaged checkpoints aside with a warning and takes the one before; never moves an earlier run aside; a
    path must be readable. Raises CheckpointError if a checkpoint cannot be read now, or belongs to a run with other
    settings, images or weights than `accept` allows.
    """
    if resume == "never":
        _move_aside(run_dir)
        return None
    tidy(run_dir)
    if resume != "auto":
        return _from_path(run_dir, resume, identity, accept)
    paths = numbered(run_dir, ROUND)
    for number, path in reversed(paths.items()):
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.completed_rounds != number:
                raise DamagedCheckpoint(f"{path} holds the state after round {checkpoint.completed_rounds}")
        except DamagedCheckpoint as error:
            log.warning(f"{error}; it is moved to {set_aside(path, 'damaged').name}; trying the one before")
            continue
        return _check_identity(checkpoint, identity, accept, str(path))
    if paths:
        log.warning(f"no readable checkpoint is left in {run_dir}; starting anew")
    elif (run_dir / "result.json").exists():
        raise CheckpointError(
            f"run_dir={run_dir} has the result of a run and none of its checkpoints, so it would be computed again and "
            "overwritten; choose another run_dir, or resume=never, which moves the earlier run aside"
        )
    return None


def _from_path(run_dir: Path, resume: str, identity: Mapping[str, Any], accept: Collection[str]) -> Checkpoint:
    found = list_checkpoints(Path(resume))  # of a run directory, the newest
    try:
        checkpoint = load_checkpoint(found[-1] if found else Path(resume))
    except DamagedCheckpoint as error:
        raise CheckpointError(
            f"resume={resume}: {error}; give a run directory or one of its {FOLDER}/round_<n>"
        ) from error
    _check_identity(checkpoint, identity, accept, resume)
    for number, path in numbered(run_dir, ROUND).items():
        if number > checkpoint.completed_rounds:  # else the next start would go on from there
            log.warning(f"{path} is moved to {set_aside(path, 'later').name}: resume={resume} begins before it")
    return checkpoint


def resume_of_restarted(run_dir: Path, resume: str, job: Job | None) -> str:
    """The option `resume`, or auto in a Slurm job that was requeued and has already begun in run_dir.

    Without this, a job that began with resume=never or another run's checkpoint would do so again each time.
    """
    marker = run_dir / JOB
    if (
        resume == "auto"
        or job is None
        or not job.restarts
        or not marker.exists()
        or marker.read_bytes() != job.name.encode()
    ):
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
    return list(numbered(run_dir, ROUND).values())


def _move_aside(run_dir: Path) -> None:
    run_dir = run_dir.resolve()
    if run_dir.exists() and any(map(_is_of_a_run, run_dir.iterdir())):
        used = any((run_dir / name).exists() for name in (FOLDER, "config.yaml", "metrics.csv"))
        if not used or Path.cwd().resolve().is_relative_to(run_dir):
            raise CheckpointError(
                f"resume=never would move {run_dir} aside, which is not the directory of an earlier run alone; "
                "choose another run_dir"
            )
        number = next(n for n in itertools.count(1) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
        move_aside(run_dir, run_dir.with_name(f"{run_dir.name}.{number}"))


def _is_of_a_run(entry: Path) -> bool:
    """Whether an entry of a run directory is more than what a start leaves that got no further."""
    return entry.name not in (LOCK, JOB) and not entry.name.startswith(f".{LOCK}.")


def _check_identity(
    checkpoint: Checkpoint, identity: Mapping[str, Any], accept: Collection[str], origin: str
) -> Checkpoint:
    differing = differences(checkpoint.identity, identity, accept)
    if differing:
        keys = [*accept, *differing_keys(checkpoint.identity, identity, accept)]
        go_on = "" if NOISE in keys else f", or 'accept=[{','.join(keys)}]' to go on from it all the same"
        choose = f"Choose another run_dir, or resume=never to start anew{go_on}"
        raise CheckpointError(f"{origin} belongs to another run: {differing}. {choose}")
    if accepted := differences(checkpoint.identity, identity):
        log.warning(f"going on from {origin}, although {accepted} (accept)")
    return checkpoint


def _checksum(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

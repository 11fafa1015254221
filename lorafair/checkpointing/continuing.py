"""What a run continues from: where its checkpoints are, known before it loads, and the checkpoint that fits it.

Both are looked up by rank 0. Call them on every rank.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafair.checkpointing.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    mark_begun,
    resume_of_restarted,
)
from lorafair.checkpointing.folder import FOLDER
from lorafair.checkpointing.partial_round import list_unfinished
from lorafair.cluster.slurm import slurm_job
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.config.schema import Config
from lorafair.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def checkpoints_before(fabric: Fabric, config: Config) -> Path | None:
    """Where the checkpoints are of the run that is continued; None where this one begins.

    Looked up once, before any of them is moved aside.
    """
    found = None
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero:
            found = _find_checkpoints_before(config)
    return fabric.broadcast(found)


def _find_checkpoints_before(config: Config) -> Path | None:
    resume = resume_of_restarted(config.folder, config.resume, slurm_job(os.environ))
    if resume == "never":
        return None
    path = config.folder if resume == "auto" else Path(resume)
    if path.parent.name == FOLDER:  # resume may be one of a run's checkpoints
        path = path.parent.parent
    return path / FOLDER if list_checkpoints(path) or list_unfinished(path) else None


def checkpoint_to_continue_from(fabric: Fabric, config: Config, identity: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint of a run of this identity: before minutes are spent on tokens."""
    found = None
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero:
            job = slurm_job(os.environ)
            resume = resume_of_restarted(config.folder, config.resume, job)
            found = find_checkpoint(config.folder, resume, identity, config.accept)
            mark_begun(config.folder, job)
            if found is not None and found.completed_rounds > config.rounds:
                raise ConfigError(
                    f"rounds={config.rounds}: {config.folder} has {found.completed_rounds} rounds already; set more "
                    "rounds, or choose another run_dir"
                )
    return fabric.broadcast(found)

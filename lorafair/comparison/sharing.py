"""Which runs of a comparison share their training, and which draw a process works on.

The runs of a draw start alike, so what one has trained another takes over (checkpointing/shared_training.py). Each
process takes a draw that no other works on, while there is one: then it finds what it has trained itself.
"""

from __future__ import annotations

import contextlib

from lorafair.checkpointing.checkpoint import make_run_dir
from lorafair.checkpointing.lock import RunDirInUse, RunLock, acquire
from lorafair.checkpointing.shared_training import SharedTraining, drop_shared
from lorafair.comparison.plan import FAILED, Comparison, Run
from lorafair.config.identity import differing_keys, run_identity
from lorafair.reporting.run_dir import RESULT_FILE

FOLDER = ".shared_training"  # no label of a setting begins with a dot
_OF_EVALUATION = ("evaluation",)  # settings that leave training as it is in every round


def draw_of(run: Run) -> str:
    """The name of what shares: a draw or seed in all settings, or all of tuning."""
    return "tuning" if run.candidate is not None else f"draw-{run.seed}"


def shared_training(comparison: Comparison, run: Run, candidate: int) -> SharedTraining | None:
    """What a run shares with others of its draw; None where compare.share_training is false."""
    if not comparison.share_training:
        return None
    mine = run_identity(comparison.config(run, candidate))
    others = [other for other in comparison.runs if other != run and draw_of(other) == draw_of(run)]
    alike = (other for other in others if not _differing(comparison, other, mine))
    name = run.folder.relative_to(comparison.folder).as_posix()
    return SharedTraining(comparison.folder / FOLDER / draw_of(run), name, later_rounds=any(alike))


def _differing(comparison: Comparison, other: Run, mine: dict[str, object]) -> bool:
    """Whether another run goes another way after the first round."""
    choice = comparison.choice(other.setting, other.method) if other.candidate is None else None
    if other.candidate is None and (choice is None or choice.best is None):
        return True
    theirs = run_identity(comparison.config(other, None if choice is None else choice.best))
    return bool(differing_keys(theirs, mine, accept=_OF_EVALUATION))


class WorkingOn:
    """The draw that this process works on, held by a lock so that other processes choose another one."""

    def __init__(self, comparison: Comparison, *, alone: bool = True) -> None:
        self._comparison, self._alone = comparison, alone and comparison.share_training
        self._draw = ""
        self._lock: RunLock | None = None

    def try_draw(self, run: Run) -> bool:
        """Hold the draw of a run, and no other one; false where another process holds it. `alone`: only then."""
        if not self._alone or draw_of(run) == self._draw:
            return True
        self.release()
        if run.candidate is not None:  # all processes tune first
            return True
        folder = self._comparison.folder / FOLDER / draw_of(run)
        make_run_dir(folder)
        try:
            self._lock = acquire(folder)
        except RunDirInUse:
            return False
        self._draw = draw_of(run)
        return True

    def release(self) -> None:
        """Let others work on the draw; what its runs have left for one another goes if they are done."""
        if self._lock is not None:
            draw, lock = self._draw, self._lock
            self._draw, self._lock = "", None
            lock.release()
            drop_if_done(self._comparison, draw)


def tidy(comparison: Comparison) -> None:
    """Remove what runs have left for one another in draws that are done."""
    root = comparison.folder / FOLDER
    if root.is_dir():
        for folder in list(root.iterdir()):
            drop_if_done(comparison, folder.name)
        with contextlib.suppress(OSError):  # some are not done
            root.rmdir()


def drop_if_done(comparison: Comparison, draw: str) -> None:
    """Remove what the runs of a draw have left for one another, if all of them have ended."""
    if all(_has_ended(comparison, run) for run in comparison.runs if draw_of(run) == draw):
        drop_shared(comparison.folder / FOLDER / draw)


def _has_ended(comparison: Comparison, run: Run) -> bool:
    files = (run.folder / RESULT_FILE, run.folder / FAILED)
    return any(file.exists() for file in files) or bool(comparison.stopped_before(run))

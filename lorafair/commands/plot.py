"""Figures and tables of any runs: from the command as files, from Python as matplotlib figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafair.console import format_count, log, printing
from lorafair.errors import ConfigError

if TYPE_CHECKING:
    from lorafair.comparison.figures import Figures


@dataclass(frozen=True)
class Wanted:
    """What `lorafair plot` is to draw, and where."""

    places: Sequence[Path]
    figures: Sequence[str] = ()  # empty: all
    formats: Sequence[str] = ("pdf",)
    width: str = "column"
    baseline: str | None = None
    out: Path | None = None
    only_list: bool = False


def plot(
    *runs: str | Path | Any,
    figure: str | Sequence[str] | None = None,
    width: str | float = "column",
    baseline: str | None = None,
) -> Figures:
    """Draw figures of runs for a paper; a notebook shows them.

    Args:
        runs: Run directories, folders with runs, a comparison's folder, or results of `run` and `compare`.
        figure: The name of one figure, or several: `accuracy`, `domains`, `traffic`, `frontier`, `time`, `loss`,
            `bias`, `layers`, `differences`, `map`. If not given, all figures for which there is data.
        width: `column` (3.25 inches), `page` (6.75), or a number of inches.
        baseline: The label of the method with which the others are compared; by default the comparison's, else FedIT.

    Returns:
        Figures by name; `figures["accuracy"]` is a matplotlib figure, `figures.save("folder")` writes them as PDF.
        matplotlib's settings do not change.

    Raises:
        ConfigError: There is no run, or the figure, width or baseline does not exist.
        LorafairError: There is no data for the requested figure.

    Example:
        >>> figures = lorafair.plot("runs/methods", figure="accuracy")
        >>> figures.save("figures", formats=("pdf", "png"))
    """
    from lorafair.comparison.figures import draw_figures
    from lorafair.comparison.folders import read_folders

    if not runs:
        raise ConfigError("lorafair.plot needs a run: a run directory, a folder with runs, or a comparison's folder")
    kinds = [figure] if isinstance(figure, str) else figure
    outcomes, notes = read_folders([_folder_of(run) for run in runs], baseline)
    figures = draw_figures(outcomes, kinds, width)
    figures.notes = [*notes, *figures.notes]
    with printing():
        for note in figures.notes:
            log.info(note)
    return figures


def plot_command(wanted: Wanted) -> int:
    """Write figures and tables; returns the exit status."""
    from lorafair.comparison.figures import KINDS, check_formats, check_kind, draw_figures
    from lorafair.comparison.folders import read_folders

    if wanted.only_list:
        for name, kind in KINDS.items():
            log.info(f"{name:12} {kind.caption}")
        return 0
    if not wanted.places:
        raise ConfigError("lorafair plot needs a RUN: a run directory, a folder with runs, or a comparison's folder")
    for name in wanted.figures:
        check_kind(name)
    check_formats(wanted.formats)
    outcomes, notes = read_folders(wanted.places, wanted.baseline)
    for note in notes:
        log.info(note)

    from lorafair.comparison.table_files import write_tables

    out = wanted.out or (wanted.places[0] if len(wanted.places) == 1 else Path("figures"))
    figures = draw_figures(outcomes, wanted.figures or None, wanted.width)
    for note in figures.notes:
        log.info(note)
    paths = figures.save(out, wanted.formats)
    log.info(f"figures:  {format_count(len(paths), 'file')} in {out}: {', '.join(path.name for path in paths)}")
    tables = [] if wanted.figures else write_tables(outcomes, out)
    if tables:
        log.info(f"tables:   {format_count(len(tables), 'file')} in {out}: {', '.join(path.name for path in tables)}")
    return 0


def _folder_of(run: Any) -> Path:
    """The folder of what `lorafair.plot` is given."""
    place = getattr(run, "run_dir", None) or getattr(run, "folder", None) or run
    if not isinstance(place, str | os.PathLike):
        raise ConfigError(f"lorafair.plot: {run!r} is no run; give a folder, or what lorafair.run or compare returned")
    return Path(place).expanduser()

"""The figures that there are, by name, and how they are drawn, shown by a notebook and saved."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lorafair.comparison import contrasts, curves
from lorafair.comparison.canvas import FORMATS, finish, paper_settings, to_bytes, width_in_inches
from lorafair.comparison.frontier import frontier_figure
from lorafair.comparison.outcomes import AFTER, BEFORE, Outcomes, RecordedRun
from lorafair.console import format_count, some
from lorafair.errors import ConfigError, LorafairError, did_you_mean
from lorafair.files.writing import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Kind:
    """A kind of figure."""

    caption: str
    draw: Callable[[Outcomes, str, float], Figure | None]  # of a setting, in this width
    scalar: str = ""  # what runs must have recorded
    of_setting: bool = True  # one for each setting; else one for all of them
    empty: str = ""  # why there is none where runs have what it needs


KINDS: dict[str, Kind] = {
    "accuracy": Kind("Mean accuracy over domains, by round.", curves.accuracy_figure, curves.ACCURACY),
    "domains": Kind("Accuracy on each domain, by round.", curves.domains_figure, curves.ACCURACY),
    "traffic": Kind(
        "Mean accuracy by the megabytes that all clients have sent and received. Those that send nothing are left out.",
        curves.traffic_figure,
        curves.ACCURACY,
        empty="nothing is sent by these methods",
    ),
    "frontier": Kind(
        "Mean accuracy after the last round by the megabytes that it took, and those that none beats in both.",
        frontier_figure,
        curves.ACCURACY,
        empty="all of these methods send the same, or nothing",
    ),
    "loss": Kind(
        "Training loss of the clients and loss on the test images, by round.", curves.loss_figure, "train/loss"
    ),
    "bias": Kind(
        "Relative aggregation bias by round: of the plain average of the factors, and of what the method makes of it.",
        curves.bias_figure,
        BEFORE,
    ),
    "correction": Kind(
        "By round, mean over layers: the relative error that the method leaves, and the norm of its B to that of the "
        "mean of the clients' B.",
        curves.correction_figure,
        curves.NORM_RATIO,
    ),
    "layers": Kind("Relative aggregation bias left by the method, by layer and round.", curves.layers_figure, AFTER),
    "differences": Kind(
        "Differences of mean accuracy to the baseline, pair by pair of runs, with the intervals of the table.",
        contrasts.differences_figure,
        empty="there are no two methods with finished runs of one seed, one of them the baseline",
    ),
    "map": Kind(
        "Differences to the baseline by its aggregation bias, over settings, with their intervals.",
        lambda outcomes, _, width: contrasts.map_figure(outcomes, width),
        of_setting=False,
        empty="it needs two settings with finished runs and the aggregation bias of the baseline",
    ),
}

# Where runs are priced with a profile.
PRICED_KINDS: dict[str, Kind] = {
    "time": Kind(
        "Mean accuracy by virtual time, with each profile.",
        curves.time_figure,
        curves.ACCURACY,
        empty="no profile is given (lorafair timeline RUN --profile NAME, or compare.profile), or no run recorded work",
    ),
}


class Figures(Mapping[str, "Figure"]):
    """Figures by name; a notebook shows all of them.

    A name is that of the figure, preceded by that of its setting if there are settings: `feature-accuracy`. If only one
    setting has the figure, `accuracy` finds it, too. `captions` has a sentence for each name; `notes` has lines about
    runs that are not finished or that a figure leaves out.
    """

    def __init__(self, figures: Mapping[str, Figure], captions: Mapping[str, str], notes: Sequence[str] = ()) -> None:
        self._figures, self.captions, self.notes = dict(figures), dict(captions), list(notes)

    def __getitem__(self, name: str) -> Figure:
        if name in self._figures:
            return self._figures[name]
        longer = [known for known in self._figures if known.endswith(f"-{name}")]
        if len(longer) == 1:
            return self._figures[longer[0]]
        raise KeyError(f"{name}: the figures are {', '.join(self._figures)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)

    def __repr__(self) -> str:
        return f"Figures({', '.join(self._figures)})"

    def _repr_html_(self) -> str:
        """For a notebook."""
        pictures = (
            f'<figure><img style="max-width: 100%" alt="{escape(name)}" '
            f'src="data:image/png;base64,{base64.b64encode(to_bytes(figure, "png")).decode()}"></figure>'
            for name, figure in self._figures.items()
        )
        return "\n".join(pictures)

    def save(self, folder: str | Path, formats: Sequence[str] = ("pdf",)) -> list[Path]:
        """Write every figure into a folder.

        Args:
            folder: It is created if it does not exist.
            formats: A selection of `pdf`, `svg` and `png`.

        Returns:
            The paths of the files.

        Raises:
            ConfigError: A format is unknown.
            LorafairError: A file cannot be written.
        """
        check_formats(formats)
        paths = []
        for name, figure in self._figures.items():
            for kind in formats:
                path = Path(folder, f"{name}.{kind}")
                make_folder(path.parent)
                write_atomically(path, to_bytes(figure, kind))
                paths.append(path)
        return paths


def draw_figures(outcomes: Outcomes, kinds: Collection[str] | None = None, width: str | float = "column") -> Figures:
    """Draw these kinds of figures, or all for which there is something to show.

    Raises ConfigError for a kind or a width that is unknown, LorafairError for a kind with nothing to show.
    """
    inches = width_in_inches(width)
    for kind in kinds or ():
        check_kind(kind)
    figures: dict[str, Figure] = {}
    captions: dict[str, str] = {}
    notes: list[str] = []
    with paper_settings():
        for kind in kinds or kinds_of(outcomes):
            drawn = dict(_drawn(outcomes, kind, inches))
            if not drawn and kinds:
                raise LorafairError(f"there is nothing to show in figure {kind}: {_why_empty(outcomes, kind)}")
            figures |= drawn
            captions |= dict.fromkeys(drawn, of_kind(kind).caption)
            if drawn and (without := _without(outcomes, of_kind(kind).scalar)):
                notes.append(f"{kind} leaves out {format_count(len(without), 'run')} without {of_kind(kind).scalar}: "
                             f"{some(without)}")  # fmt: skip
    return Figures(figures, captions, notes)


def _drawn(outcomes: Outcomes, kind: str, inches: float) -> Iterator[tuple[str, Figure]]:
    """Name and figure, for each setting where there is something to show."""
    drawn = of_kind(kind)
    for setting in list(outcomes.comparison.settings) if drawn.of_setting else [""]:
        figure = drawn.draw(outcomes, setting, inches)
        if figure is not None:
            yield file_stem(setting, kind), finish(figure)


def file_stem(setting: str, what: str) -> str:
    """The name of a file about a setting."""
    return f"{setting.replace('/', '-')}-{what}" if setting else what


def _without(outcomes: Outcomes, scalar: str) -> list[str]:
    runs: list[RecordedRun] = [run for runs in outcomes.recorded.values() for run in runs]
    return [run.run.name for run in runs if scalar and run.curves and not run.curves.get(scalar)]


def _why_empty(outcomes: Outcomes, kind: str) -> str:
    scalar = of_kind(kind).scalar
    runs = [run for runs in outcomes.recorded.values() for run in runs]
    if scalar and not any(run.curves.get(scalar) for run in runs):
        return f"no run has recorded {scalar} yet"
    return of_kind(kind).empty or "no run has what it shows"


def kinds_of(outcomes: Outcomes) -> list[str]:
    """The kinds of figures that runs may have."""
    return [*KINDS, *(PRICED_KINDS if outcomes.pricings else ())]


def of_kind(kind: str) -> Kind:
    """What is known about a kind. ConfigError for one that there is not."""
    known = KINDS | PRICED_KINDS
    if kind not in known:
        raise ConfigError(f"there is no figure {kind}; {did_you_mean(kind, known)}figures: {', '.join(known)}")
    return known[kind]


def check_kind(kind: str) -> None:
    """Raise ConfigError for a figure that there is not."""
    of_kind(kind)


def check_formats(formats: Sequence[str]) -> None:
    """Raise ConfigError for a format that there is not."""
    for kind in formats:
        if kind not in FORMATS:
            raise ConfigError(f"there is no format {kind}; {did_you_mean(kind, FORMATS)}formats: {', '.join(FORMATS)}")


def make_folder(folder: Path) -> None:
    """Make a folder for results. LorafairError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorafairError(f"{folder} cannot be made: {error.strerror}; name another folder") from error

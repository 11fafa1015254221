"""Figures as papers print them: a column or a page wide, with embedded fonts, and with nothing outside or cut.

matplotlib is imported where it is used, and its settings are changed for the time of drawing and saving alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorafair.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = {"column": 3.25, "page": 6.75}  # inches, of a paper in two columns
FORMATS = ("pdf", "svg", "png")
DPI = 200  # of PNG
_NARROWEST, _WIDEST = 2.0, 20.0  # inches
_SMALL, _LETTER_INCH = 6.0, 0.059  # points; width of a letter of the text
_SETTINGS: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so figures are alike everywhere
    "font.size": 7.0,
    "axes.labelsize": 7.0,
    "axes.titlesize": 7.0,
    "xtick.labelsize": _SMALL,
    "ytick.labelsize": _SMALL,
    "legend.fontsize": _SMALL,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "lines.dash_capstyle": "butt",
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.35,
    "legend.borderpad": 0.1,
    "legend.borderaxespad": 0.2,
    "text.hinting": "no_hinting",  # text is as wide in a PNG as in a PDF
    "text.parse_math": False,  # a name between dollar signs is no formula
    "pdf.fonttype": 42,  # TrueType, embedded; some publishers refuse Type 3
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lorafair",  # the same figure is the same file
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.04,
}


@contextmanager
def paper_settings() -> Iterator[None]:
    """matplotlib's settings for papers in the block; those of the user before and after it."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as an empty box
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def width_in_inches(width: str | float) -> float:
    """From `column`, `page` or a number. ConfigError for anything else."""
    if str(width) in WIDTHS:
        return WIDTHS[str(width)]
    try:
        inches = float(width)
    except (TypeError, ValueError):
        inches = 0.0
    if not _NARROWEST <= inches <= _WIDEST:
        names = " or ".join(f"{name} ({inch} inches)" for name, inch in WIDTHS.items())
        raise ConfigError(f"width={width} must be {names}, or a number of inches from {_NARROWEST:g} to {_WIDEST:g}")
    return inches


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, without pyplot, which would touch the user's display and state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class PaperFigure(Figure):
        """A figure that keeps its look wherever it is saved, and that a notebook shows."""

        def savefig(self, fname: Any, **options: Any) -> None:
            with paper_settings():
                super().savefig(fname, **options)

        def _repr_png_(self) -> bytes:
            return to_bytes(self, "png")

    figure = PaperFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as a PDF, SVG or PNG file, without the date, so that the same figure is the same file."""
    undated: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=undated[kind], dpi=DPI)
    content = buffer.getvalue()
    return _shorter_numbers(content) if kind == "svg" else content


def _shorter_numbers(svg: bytes) -> bytes:
    """Coordinates in hundredths of a point: half the size, and no difference to see. Text keeps what it says."""

    def rounded(match: re.Match[bytes]) -> bytes:
        return f"{float(match[0]):.2f}".rstrip("0").rstrip(".").encode()

    def in_tag(tag: re.Match[bytes]) -> bytes:
        return re.sub(rb"-?\d+\.\d{3,}(?![\w.])", rounded, tag[0])

    head, start, body = svg.partition(b"<svg")
    return head + re.sub(rb"<[^>]*>", in_tag, start + body)


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the axes, in as many columns as fit; the figure grows by its height."""
    width, height = figure.get_size_inches()
    texts = [shown(label, width - 0.6) for label in labels]
    for columns in range(min(len(labels), 6), 0, -1):
        legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns)
        box = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if columns == 1 or box.width / figure.dpi <= width - 0.12:
            break
        legend.remove()
    figure.set_size_inches(width, height + box.height / figure.dpi)


def finish(figure: Figure) -> Figure:
    """Arrange the parts of a figure once, for all formats."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def shown(name: str, inches: float, size: float = _SMALL) -> str:
    """A name as it is drawn in this width: in several lines where it is long, broken behind _ - . + = and blanks."""
    letters = max(8, int(inches / (_LETTER_INCH * size / 7.0)))
    lines = [""]
    for part in re.findall(rf"[^_\-.+=\s]{{1,{letters}}}[_\-.+=\s]*|[_\-.+=\s]+", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > letters:
            lines.append("")
        lines[-1] += part
    text = "\n".join(line.rstrip() for line in lines)
    return f" {text}" if text.startswith("_") else text  # a legend leaves out what starts so

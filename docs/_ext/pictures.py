"""Figures of matplotlib as the output of a page."""

from __future__ import annotations

import io

from IPython.display import SVG
from matplotlib.figure import Figure


def show(figure: Figure) -> SVG:
    """The figure as a vector graphic."""
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return SVG(content.getvalue())

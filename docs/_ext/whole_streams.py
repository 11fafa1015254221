"""Output of commands in notebooks as it was printed.

A kernel hands on what a command prints in pieces that end anywhere. myst-nb 1.4.0 ends each of them with a line break
and drops empty lines before it, which tears lines and tables apart. Here the pieces are joined first. Folders of the
machine that builds the site are shown as those of a reader.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from myst_nb.core import render

_merge = render.coalesce_streams
_PLACES = {  # the first that fits; pages are run in a temporary folder
    re.escape(sys.prefix): "/home/you/.venv",
    re.escape(tempfile.gettempdir()) + r"/tmp\w{8}": "/home/you/project",
    re.escape(str(Path.home())): "/home/you",
}


def joined(outputs: Sequence[Any]) -> list[Any]:
    """Outputs of a cell with all of stdout in one, and all of stderr; where the first piece was."""
    whole: list[Any] = []
    streams: dict[str, Any] = {}
    for output in outputs:
        if output["output_type"] != "stream":
            whole.append(output)
        elif output["name"] in streams:
            streams[output["name"]]["text"] += output["text"]
        else:
            streams[output["name"]] = output.copy()
            whole.append(streams[output["name"]])
    for output in streams.values():
        output["text"] = _with_places_of_a_reader(output["text"])
    return whole


def _with_places_of_a_reader(text: str) -> str:
    for place, shown in _PLACES.items():
        text = re.sub(rf"(?<![\w.-]){place}(?![\w.-])", shown, text)
    return text


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    render.coalesce_streams = lambda outputs: _merge(joined(outputs))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

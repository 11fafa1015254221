"""A report as one HTML page that needs nothing else: styles and figures are in it, and there is no script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING

from lorafair.comparison.canvas import to_bytes
from lorafair.comparison.document import Commands, FigurePart, Heading, Items, Paragraph, Part
from lorafair.comparison.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 1_600_000  # characters of all figures of a page, so that it can be sent by mail
_IMPORTANCE = (
    "differences", "accuracy", "bias", "correction", "map", "domains", "frontier", "traffic", "time", "layers", "loss",
)  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --paper: #ffffff; --line: #d5d5d5; --mark: #0072b2;
  --warn: #8a3b00; --warn-paper: #fff3e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a8a8a8; --paper: #16181b; --line: #3a3d42;
  --mark: #56b4e9; --warn: #ffb570; --warn-paper: #33241a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; }
a { color: var(--mark); }
ul.answer { border-left: 4px solid var(--mark); margin: 1rem 0; padding: .25rem 0 .25rem 2rem; }
ul.answer.single { list-style: none; padding-left: 1rem; }
p.warning { border-left: 4px solid var(--warn); background: var(--warn-paper); color: var(--warn); padding: .6rem 1rem;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
p.caption { color: var(--soft); font-size: .875rem; margin: 1.5rem 0 .4rem; }
th, td { padding: .25rem .7rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.words, th.words { text-align: left; overflow-wrap: anywhere; }
th:first-child, td:first-child, td.words, th.words { min-width: 8em; }
td.number { white-space: nowrap; }
thead th { border-top: 2px solid var(--ink); border-bottom: 1px solid var(--ink); font-weight: 600;
  vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 2px solid var(--ink); }
tbody tr:hover { background: color-mix(in srgb, var(--mark) 8%, transparent); }
figure { margin: 1.5rem 0; break-inside: avoid; }
figure .paper { background: #ffffff; border-radius: 4px; padding: .5rem; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: "DejaVu Sans", Verdana, sans-serif; }
figure svg { display: block; width: 100%; height: auto; max-width: 46rem; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .4rem; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .75rem 1rem; font-size: .85rem; border-radius: 4px; }
@media print { :root { --ink: #000000; --soft: #444444; --paper: #ffffff; } nav { display: none; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; } table { font-size: 8pt; } tr { break-inside: avoid; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; } }
"""


def to_html(parts: Iterable[Part], figures: Mapping[str, Figure]) -> str:
    """The page; a figure that is not among `figures` is left out."""
    parts = list(parts)
    title = next(part.text for part in parts if isinstance(part, Heading) and part.level == 1)
    sections = [part for part in parts if isinstance(part, Heading) and part.level > 1]
    links = "".join(f'<li><a href="#{_anchor(part, parts)}">{escape(part.text)}</a></li>' for part in sections)
    svgs = _fitting(
        {
            part.name: inline_svg(figures[part.name], _anchor(part, parts), f"{part.name}: {part.caption}")
            for part in parts
            if isinstance(part, FigurePart) and part.name in figures
        }
    )
    body: list[str] = []
    for part in parts:
        body += _html(part, _anchor(part, parts), svgs)
        if isinstance(part, FigurePart) and part.name in figures and part.name not in svgs:
            body.append(f"<p>{escape(part.caption)} This page has no room for it: {escape(part.name)}.png has it.</p>")
        if isinstance(part, Items) and links:  # behind the answers
            body.append(f"<nav><ul>{links}</ul></nav>")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>",
            "<body>",
            *body,
            "</body></html>",
            "",
        ]
    )


def _anchor(part: Part, parts: list[Part]) -> str:
    return f"part{next(number for number, other in enumerate(parts) if other is part)}"


def _html(part: Part, anchor: str, svgs: Mapping[str, str]) -> Iterator[str]:
    if isinstance(part, Heading):
        yield f'<h{part.level} id="{anchor}">{escape(part.text)}</h{part.level}>'
    elif isinstance(part, Paragraph):
        yield f'<p class="{part.kind}">{escape(part.text)}</p>'
    elif isinstance(part, Items):
        items = [f"{f'<b>{escape(term)}:</b> ' if term else ''}{escape(text)}" for term, text in part.items]
        single = " single" if len(items) == 1 else ""
        yield f'<ul class="answer{single}">{"".join(f"<li>{item}</li>" for item in items)}</ul>'
    elif isinstance(part, Table):
        yield from _table(part, anchor)
    elif isinstance(part, Commands):
        lines = "\n\n".join(f"# {escape(what)}\n{escape(line)}" for line, what in part.lines)
        yield f"<pre>{lines}</pre>"
    elif part.name in svgs:
        drawn = f'<div class="paper">{svgs[part.name]}</div>'
        yield f"<figure>{drawn}<figcaption>{escape(part.caption)}</figcaption></figure>"


def _table(part: Table, anchor: str) -> Iterator[str]:
    words = {column for column in range(len(part.header)) if any(_is_words(row[column]) for row in part.texts)}
    yield f'<p class="caption" id="{anchor}">{escape(part.caption)}.</p>'
    yield f'<div class="wide"><table aria-labelledby="{anchor}">'
    kinds = ["words" if column in words else "number" for column in range(len(part.header))]
    heads = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, part.header, strict=True)
    )
    yield f"<thead><tr>{heads}</tr></thead><tbody>"
    for number, row in enumerate(part.texts):
        cells = []
        for column, (kind, text) in enumerate(zip(kinds, row, strict=True)):
            shown = re.sub(r"([_/=])(?=\w)", r"\1<wbr>", escape(text)) if kind == "words" else escape(text)
            shown = f"<strong>{shown}</strong>" if (number, column) in part.best else shown
            cells.append(f'<td class="{kind}">{shown}</td>')
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def _is_words(text: str) -> bool:
    """Whether a cell is no number, no interval and no dash."""
    return re.fullmatch(r"[-+\d.,±()\s–]*( (to|of) [-+\d.,()\s]*)?", text) is None


def _fitting(svgs: Mapping[str, str]) -> dict[str, str]:
    """Those for which a page has room, the more important kinds first."""
    kinds = {name: name.rpartition("-")[2] for name in svgs}
    room, kept = LARGEST, set()
    for name in sorted(svgs, key=lambda name: _IMPORTANCE.index(kinds[name])):
        if len(svgs[name]) <= room:
            room -= len(svgs[name])
            kept.add(name)
    return {name: svg for name, svg in svgs.items() if name in kept}


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """A figure as an element of a page: without what only a file needs, its ids made unique by the prefix."""
    svg = to_bytes(figure, "svg").decode()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None
    body = body[body.index(">") + 1 :].replace("xlink:href", "href").replace("; font-family: 'DejaVu Sans'", "")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r'\bd="([^"]*)"', lambda m: f'd="{_shorter_path(m[1])}"', body)
    body = re.sub(r">\s+<", "><", body).strip()
    return f'<svg role="img" aria-label="{escape(label)}" {box[0]}>{body}'


def _shorter_path(path: str) -> str:
    """The same path in tenths of a point."""
    path = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", " ".join(path.split()))

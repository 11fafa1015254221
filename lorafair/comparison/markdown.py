"""A report as Markdown, and as text for the console."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from lorafair.comparison.document import Commands, FigurePart, Heading, Items, Paragraph, Part
from lorafair.comparison.tables import Table
from lorafair.console import markdown_table, table


def to_markdown(parts: Iterable[Part], figures: Container[str]) -> str:
    """Figures are links to PNG files beside the report, those of `figures` that there are."""
    return "\n\n".join(text for part in parts for text in _markdown(part, figures)) + "\n"


def to_text(parts: Iterable[Part]) -> str:
    """For the console: without marks, and without figures."""
    return "\n\n".join(text for part in parts for text in _text(part))


def _markdown(part: Part, figures: Container[str]) -> Iterator[str]:
    if isinstance(part, Heading):
        yield f"{'#' * part.level} {part.text}"
    elif isinstance(part, Items):
        yield "\n".join(f"- {f'**{term}:** ' if term else ''}{text}" for term, text in part.items)
    elif isinstance(part, Table):
        yield f"{part.caption}:"
        yield markdown_table(part.header, part.texts)
    elif isinstance(part, FigurePart):
        if part.name in figures:
            yield f"![{part.caption}]({part.name}.png)"
    elif isinstance(part, Commands):
        yield "\n".join(["```bash", *(f"{line}  # {what}" for line, what in part.lines), "```"])
    else:
        yield part.text


def _text(part: Part) -> Iterator[str]:
    if isinstance(part, Heading | Paragraph):
        yield part.text
    elif isinstance(part, Items):
        yield "\n".join(f"{f'{term}: ' if term else ''}{text}" for term, text in part.items)
    elif isinstance(part, Table):
        yield f"{part.caption}:"
        yield table(part.header, part.texts)
    elif isinstance(part, Commands):
        yield "\n".join(line for line, _ in part.lines)

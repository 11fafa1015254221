"""Pictures of a run, drawn by Pillow: in milliseconds, and without the half second that matplotlib takes to import.

Letters: H rows, W columns, Q classes, N images.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lorafair import third_party

LARGEST = 150  # classes of a confusion matrix; more labels are not readable
_NUMBERED = 40  # rows of a picture that all have their label, and classes whose cells have room for a number
_MOST_CELLS = 320  # rows or columns; of more, neighbours are shown as their mean
_WIDE, _HIGH, _LARGEST_CELL, _NUMBERED_CELL = 230, 360, 30, 28  # pixels; a card shows a width of 380 without loss
_FONT, _LINE, _GAP, _BAR = 13, 15, 6, 14
_INK, _PAPER, _MISSING = (34, 34, 34), (255, 255, 255), (217, 217, 217)
# ColorBrewer's Blues: one hue from light to dark, told apart without seeing colours.
_BLUES = np.array(
    [
        (247, 251, 255), (222, 235, 247), (198, 219, 239), (158, 202, 225), (107, 174, 214),
        (66, 146, 198), (33, 113, 181), (8, 81, 156), (8, 48, 107),
    ]
)  # fmt: skip

Pixels = np.ndarray[Any, Any]  # (height, width, 3) uint8


def heat_map(
    values: np.ndarray[Any, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    axes: tuple[str, str],
    *,
    numbers: bool = False,
    least: int = 2,
    limits: tuple[float | None, float | None] = (None, None),
) -> Pixels:
    """Values (H, W) as cells from light to dark, grey where there is none; `axes` name rows and columns.

    `numbers`: each cell also shows its value, rounded. `least`: pixels of a cell; from 15 on every row and column has
    its label, below some may go without. `limits`: the values of the lightest and the darkest colour (the
    smallest and the largest).
    """
    values, rows, row_axis = _thinned(np.asarray(values, np.float64), rows, axes[0])
    columns_first, columns, column_axis = _thinned(values.T, columns, axes[1])
    values = columns_first.T
    finite = values[np.isfinite(values)]
    low = limits[0] if limits[0] is not None else finite.min() if finite.size else 0.0
    high = limits[1] if limits[1] is not None else finite.max() if finite.size else 1.0
    scaled = (values - low) / ((high - low) or 1.0)
    height = _cell(len(rows), max(least, _LINE) if len(rows) <= _NUMBERED else least, _HIGH)
    width = _cell(len(columns), least, _WIDE)
    cells = np.kron(_colours(scaled), np.ones((height, width, 1), np.uint8))
    left = _FONT + 4 * _GAP + max((_length(rows[i]) for i in _shown(len(rows), height, _LINE)), default=0)
    ends = _ends(low, high)
    wide = left + cells.shape[1] + 4 * _GAP + _BAR + max(map(_length, ends))
    below = _LINE if _fits(columns, width) else max(map(_length, columns), default=0)
    high_enough = max(cells.shape[0], _length(row_axis))
    canvas, top = _titled(title, wide, high_enough + below + _FONT + 3 * _GAP)
    canvas.paste(Image.fromarray(cells), (left, top))
    _label(canvas, rows, columns, (left, top), (height, width))
    _turned(canvas, row_axis, (_GAP + _FONT // 2, top + high_enough // 2), anchor="middle")
    draw = ImageDraw.Draw(canvas)
    draw.text((left + cells.shape[1] / 2, canvas.height - _GAP), column_axis, _INK, _font(), anchor="mb")
    if numbers:
        _draw_numbers(draw, values, scaled, (left, top), (height, width))
    _draw_bar(canvas, (left + cells.shape[1] + 2 * _GAP, top), cells.shape[0], ends)
    return np.asarray(canvas)


def confusion_picture(confusion: Tensor, classes: Sequence[str], title: str) -> Pixels | None:
    """A confusion matrix (Q, Q) of counts, true classes in rows, each row in percent of its class.

    None for more than LARGEST classes.
    """
    if len(classes) > LARGEST:
        return None
    counts = confusion.cpu().numpy().astype(np.float64)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes, has_numbers = ("True class", "Predicted class"), len(classes) <= _NUMBERED
    title, least = f"{title}: percent of each true class", _NUMBERED_CELL if has_numbers else _LINE
    return heat_map(percent, classes, classes, title, axes, numbers=has_numbers, least=least, limits=(0.0, 100.0))


def mosaic(groups: Sequence[tuple[str, Sequence[Pixels | None]]], title: str) -> Pixels:
    """Some images (side, side, 3) uint8 of each group behind its name; a crossed tile for one that cannot be read."""
    side = next((tile.shape[0] for _, tiles in groups for tile in tiles if tile is not None), 32)
    most = max((len(tiles) for _, tiles in groups), default=1)
    left = max((_length(name) for name, _ in groups), default=0) + _GAP
    block = left + most * (side + 2) + 2 * _GAP
    across = max(1, round((len(groups) * (side + 2) / block * 1.3) ** 0.5))  # a third wider than high
    deep = -(-len(groups) // across)
    canvas, top = _titled(title, across * block + 2 * _GAP, deep * (side + 2) + _GAP)
    draw = ImageDraw.Draw(canvas)
    for index, (name, tiles) in enumerate(groups):
        x, y = _GAP + index // deep * block, top + index % deep * (side + 2)
        draw.text((x + left - _GAP, y + side // 2), name, _INK, _font(), anchor="rm")
        for place, tile in enumerate(tiles):
            at = (x + left + place * (side + 2), y)
            if tile is not None:
                canvas.paste(Image.fromarray(tile), at)
                continue
            draw.rectangle((*at, at[0] + side - 1, y + side - 1), _MISSING)
            draw.line((*at, at[0] + side - 1, y + side - 1), _INK)
    return np.asarray(canvas)


def encode(picture: Pixels, *, is_drawing: bool) -> bytes:
    """A drawing as PNG in the colours of heat maps and of text, photographs as JPEG: small files, in milliseconds."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if is_drawing:
        image.quantize(palette=_palette(), dither=Image.Dither.NONE).save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _titled(title: str, wide: int, high: int) -> tuple[Image.Image, int]:
    """Paper for a drawing of this size below its title, and how far below."""
    lines = _wrapped(title, max(wide, _WIDE) - 2 * _GAP)
    top = 2 * _GAP + len(lines) * (_FONT + 6)
    canvas = Image.new("RGB", (max(wide, *(_length(line) + 2 * _GAP for line in lines)), top + high), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, line in enumerate(lines):
        draw.text((_GAP, _GAP + index * (_FONT + 6)), line, _INK, _font())
    return canvas, top


def _label(
    canvas: Image.Image,
    rows: Sequence[str],
    columns: Sequence[str],
    corner: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    """The names of rows to the left of the cells and of columns below, as many as there is room for."""
    draw, (left, top), (height, width) = ImageDraw.Draw(canvas), corner, cell
    for i in _shown(len(rows), height, _LINE):
        draw.text((left - _GAP, top + (i + 0.5) * height), rows[i], _INK, _font(), anchor="rm")
    flat, bottom = _fits(columns, width), top + len(rows) * height + _GAP
    for i in _shown(len(columns), width, _step(columns) if flat else _LINE):
        middle = left + (i + 0.5) * width
        if flat:
            draw.text((middle, bottom), columns[i], _INK, _font(), anchor="mt")
        else:
            _turned(canvas, columns[i], (round(middle), bottom), anchor="top")


def _ends(low: float, high: float) -> tuple[str, str]:
    """The largest and the smallest value, with as many digits as tell them apart."""
    digits = next((digits for digits in range(3, 7) if f"{high:.{digits}g}" != f"{low:.{digits}g}"), 3)
    return f"{high:.{digits}g}", f"{low:.{digits}g}"


def _thinned(
    values: np.ndarray[Any, Any], names: Sequence[str], axis: str
) -> tuple[np.ndarray[Any, Any], list[str], str]:
    """At most _MOST_CELLS rows: means of neighbours, named after the first of them."""
    each = -(-len(names) // _MOST_CELLS)
    if each <= 1:
        return values, list(names), axis
    starts = np.arange(0, len(names), each)
    known = np.isfinite(values)
    count = np.add.reduceat(known, starts, axis=0, dtype=np.int64)
    total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means, list(names[::each]), f"{axis} (mean of {each})"


def _cell(count: int, least: int, side: int) -> int:
    """Pixels of a cell along an axis with so many."""
    return max(least, min(_LARGEST_CELL, side // max(count, 1)))


def _colours(scaled: np.ndarray[Any, Any]) -> Pixels:
    """Of values from 0 to 1."""
    at = np.clip(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0), 0, 1) * (len(_BLUES) - 1)
    mixed = np.stack([np.interp(at, range(len(_BLUES)), _BLUES[:, channel]) for channel in range(3)], axis=-1)
    mixed[np.isnan(scaled)] = _MISSING
    return mixed.round().astype(np.uint8)


@cache
def _palette() -> Image.Image:
    """128 blues, the grey of what is missing, and greys from ink to paper; none that could be taken for paper."""
    greys = np.append(np.linspace(_INK[0], 240, 126).round(), _PAPER[0]).astype(np.uint8)[:, None].repeat(3, axis=1)
    colours = np.concatenate([_colours(np.linspace(0, 1, 128)), np.array([_MISSING], np.uint8), greys])
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.tobytes())
    return palette


def _draw_numbers(
    draw: ImageDraw.ImageDraw,
    values: np.ndarray[Any, Any],
    scaled: np.ndarray[Any, Any],
    corner: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    for row, column in np.argwhere(np.isfinite(values) & (values.round() != 0)).tolist():
        place = (corner[0] + (column + 0.5) * cell[1], corner[1] + (row + 0.5) * cell[0])
        colour = _PAPER if scaled[row, column] > 0.55 else _INK
        draw.text(place, f"{values[row, column]:.0f}", colour, _font(), anchor="mm")


def _draw_bar(canvas: Image.Image, corner: tuple[int, int], height: int, ends: Sequence[str]) -> None:
    """The colours from high to low, with the values at their ends."""
    tall = max(height, 4 * _FONT)
    shades = _colours(np.linspace(1, 0, tall))[:, None].repeat(_BAR, axis=1)
    canvas.paste(Image.fromarray(shades), corner)
    draw, right = ImageDraw.Draw(canvas), corner[0] + _BAR + _GAP
    draw.text((right, corner[1]), ends[0], _INK, _font(), anchor="lt")
    draw.text((right, corner[1] + tall), ends[1], _INK, _font(), anchor="lb")


def _turned(canvas: Image.Image, text: str, place: tuple[int, int], anchor: str) -> None:
    """A text that runs upwards, with its middle or its end at a place."""
    length = _length(text)
    label = Image.new("L", (length, _FONT + 4), 0)
    ImageDraw.Draw(label).text((0, (_FONT + 4) // 2), text, 255, _font(), anchor="lm")
    label = label.transpose(Image.Transpose.ROTATE_90)
    x, y = place[0] - label.width // 2, place[1] - (length // 2 if anchor == "middle" else 0)
    canvas.paste(Image.new("RGB", label.size, _INK), (x, y), label)


def _shown(count: int, cell: int, space: int) -> list[int]:
    """Which labels have so many pixels: every one, every second one, every fifth ..."""
    every = next(n for n in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000) if n * cell >= space or n == 1000)
    return list(range(0, count, every))


def _step(names: Sequence[str]) -> int:
    return max(map(_length, names), default=0) + 2 * _GAP


def _fits(names: Sequence[str], cell: int) -> bool:
    """Whether labels below run from left to right: short ones, as numbers of rounds."""
    return _step(names) <= max(cell, 48)


def _wrapped(title: str, width: int) -> list[str]:
    """Lines of at most so many pixels, where the words allow it."""
    lines: list[str] = []
    for word in title.split():
        if lines and _length(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines or [""]


def _length(text: str) -> int:
    """Pixels of a text."""
    return int(np.ceil(_font().getlength(text)))


@cache
def _font() -> Any:
    file = third_party.font_file()
    return ImageFont.load_default(_FONT) if file is None else ImageFont.truetype(str(file), _FONT)

"""Tables as files for a paper: LaTeX with booktabs, and CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from lorafair.comparison.figures import file_stem, make_folder
from lorafair.comparison.left_behind import balance_table, head_table, spread_table
from lorafair.comparison.outcomes import Difference, Outcomes, Summary
from lorafair.comparison.tables import Cell, Table, difference_table, result_table
from lorafair.files.writing import replacing, write_atomically

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "–": "--", "−": "$-$", "Δ": r"$\Delta$", "‖": r"$\|$",
}  # fmt: skip


def write_tables(outcomes: Outcomes, folder: Path) -> list[Path]:
    """Results, differences and what stands beside them of each setting, as LaTeX and as CSV; returns the files."""
    make_folder(folder)
    paths = []
    for setting in outcomes.settings():
        for what, table in (
            ("results", result_table(outcomes, setting)), ("differences", difference_table(outcomes, setting)),
            ("balance", balance_table(outcomes, setting)), ("left_behind", spread_table(outcomes, setting)),
            ("heads", head_table(outcomes, setting)),
        ):  # fmt: skip
            if table.rows:
                stem = folder / file_stem(setting, what)
                paths += [stem.with_name(f"{stem.name}.tex"), stem.with_name(f"{stem.name}.csv")]
                write_atomically(paths[-2], latex_table(table))
                _write_csv(table, paths[-1])
    return paths


def latex_table(table: Table) -> str:
    r"""A tabular with booktabs' rules, for \input; what it shows stands above it as a comment."""
    lines = [
        f"% {' '.join(table.caption.split())}.",
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        _line([latex_escaped(name) for name in table.header]),
        r"\midrule",
    ]
    for number, row in enumerate(table.rows):
        lines.append(_line([_latex_cell(cell, (number, column) in table.best) for column, cell in enumerate(row)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex_escaped(text: str) -> str:
    """A text that LaTeX sets as it is."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"


def _latex_cell(cell: Cell, is_best: bool) -> str:
    if isinstance(cell, Summary) and cell.values:
        mean = f"{cell.mean:.1f}"
        mean = rf"\mathbf{{{mean}}}" if is_best else mean
        return f"${mean}$" if cell.std is None else rf"${mean} \pm {cell.std:.1f}$"
    text = str(cell)
    if isinstance(cell, Difference) or _is_signed(text):
        return f"${text}$"
    low, to, high = text.partition(" to ")
    if to and _is_signed(low) and _is_signed(high):  # an interval
        return f"$[{low}, {high}]$"
    return latex_escaped(text)


def _is_signed(text: str) -> bool:
    return text[:1] in ("+", "-") and text[1:].replace(".", "", 1).isdigit()


def _write_csv(table: Table, file: Path) -> None:
    """Numbers alone: a mean and its standard deviation in two columns, an interval as its two ends."""
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        columns = [_csv_columns(table, column) for column in range(len(table.header))]
        writer.writerow([name for names, _ in columns for name in names])
        for number in range(len(table.rows)):
            writer.writerow([value for _, rows in columns for value in rows[number]])


def _csv_columns(table: Table, column: int) -> tuple[list[str], list[list[str]]]:
    """The names of the columns that a column of the table becomes, and their values by row."""
    name, cells = table.header[column], [row[column] for row in table.rows]
    if any(isinstance(cell, Summary) for cell in cells):
        rows = []
        for cell in cells:
            known = isinstance(cell, Summary) and bool(cell.values)
            std = cell.std if isinstance(cell, Summary) else None
            rows.append([f"{cell.mean:.4f}" if known and isinstance(cell, Summary) else "",
                         "" if std is None else f"{std:.4f}"])  # fmt: skip
        return [name, f"{name} std"], rows
    if any(isinstance(cell, Difference) for cell in cells):
        return [name], [[f"{cell.mean:.4f}" if isinstance(cell, Difference) else str(cell)] for cell in cells]
    if name.endswith(" interval"):
        ends = [str(cell).partition(" to ") for cell in cells]
        return [f"{name} low", f"{name} high"], [[low, high] if to else ["", ""] for low, to, high in ends]
    return [name], [["" if str(cell) == "–" else str(cell)] for cell in cells]

"""What a part of gpu.py leaves: tables, checks and goals, printed as they come and written to a file at once."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Table:
    """Lines of numbers under a title. A cell is text, a number, or the list of repeats of one."""

    part: Part
    title: str
    columns: Sequence[str]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, *cells: Any) -> None:
        """Add a line; it is printed and kept at once."""
        self.rows.append(dict(zip(self.columns, cells, strict=True)))
        if len(self.rows) == 1:
            self.part.say(f"\n{self.title}\n" + " | ".join(self.columns))
        self.part.say(" | ".join(map(text_of, cells)))
        self.part.save()


@dataclass
class Part:
    """One part in work: where it runs, how long it may take, and what it has found."""

    name: str
    device: Any  # torch.device
    tiny: bool
    scratch: Path  # for files that nobody needs afterwards
    out: Path  # the JSON file of this part
    seconds: float
    peak_tflops: float | None  # dense bf16, of the card
    tables: list[Table] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # what was tried: traceback
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    ended: bool = False

    @property
    def on_gpu(self) -> bool:
        return bool(self.device.type == "cuda")

    @property
    def accelerator(self) -> str:
        """The value of fabric.accelerator."""
        return "cuda" if self.on_gpu else "cpu"

    def say(self, text: str) -> None:
        print(text, flush=True)

    def left(self) -> float:
        """Seconds until this part should end."""
        return self.seconds - (time.monotonic() - self.began)

    def table(self, title: str, *columns: str) -> Table:
        self.tables.append(Table(self, title, columns))
        return self.tables[-1]

    def check(self, name: str, holds: bool, detail: str) -> None:
        """Record whether something is as it must be; if not, the script ends with status 1."""
        self.checks.append({"check": name, "holds": bool(holds), "detail": detail})
        self.say(f"{'ok' if holds else 'NOT OK'}: {name}: {detail}")
        self.save()

    def goal(self, name: str, measured: float, target: float, *, at_least: bool = True) -> None:
        """Record a measured value beside what it should be; a goal that is missed is no failure."""
        met = measured >= target if at_least else measured <= target
        short = abs(measured - target)
        verdict = "met" if met else f"short by {text_of(short)}"
        self.goals.append(
            {"goal": name, "target": target, "at_least": at_least, "measured": measured, "verdict": verdict}
        )
        self.say(f"goal: {name}: {'at least' if at_least else 'at most'} {text_of(target)}, "
                 f"measured {text_of(measured)}: {verdict}")  # fmt: skip
        self.save()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(f"note: {text}")
        self.save()

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """Do something that may fail without ending the part: its error is printed and kept, and None returned.

        Nothing is begun once the part's time is over. What does not fit into the device's memory is a note.
        """
        import torch

        if self.left() <= 0:
            self.note(f"left out, as the time of this part is over: {what}")
            return None
        try:
            return action()
        except torch.OutOfMemoryError as error:
            self.note(f"{what}: out of memory ({str(error).splitlines()[0][:150]})")
        except Exception:
            self.failures[what] = traceback.format_exc()
            self.say(f"FAILED: {what}\n{self.failures[what]}")
        finally:
            self.save()
            if self.on_gpu:
                gc.collect()  # modules and their closures are in circles
                torch.cuda.empty_cache()
        return None

    def content(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        broken = self.failures or any(not check["holds"] for check in self.checks)
        return {
            "status": "failed" if broken else "done" if self.ended else "unfinished",
            "seconds": round(time.monotonic() - self.began, 2),
            "tables": [{"title": t.title, "rows": t.rows} for t in self.tables if t.rows],
            "checks": self.checks,
            "goals": self.goals,
            "notes": self.notes,
            "failures": self.failures,
        }

    def save(self) -> None:
        write_json(self.out, self.content())


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace the file as a whole: this process may be killed at any time."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, file)


def text_of(cell: Any) -> str:
    """A cell as a person reads it; of repeats the median, with the smallest and the largest in brackets."""
    if isinstance(cell, list | tuple):
        if not cell:
            return "–"
        return f"{text_of(statistics.median(cell))} ({text_of(min(cell))}–{text_of(max(cell))})"
    if cell is None:
        return "–"
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return {True: "yes", False: "no"}.get(cell, str(cell))
    if isinstance(cell, int) or abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"


def markdown(parts: Mapping[str, Mapping[str, Any]], header: Mapping[str, Any]) -> str:
    """Header, goals and tables in the form of docs/performance.md."""
    lines = ["# On a GPU", "", *(f"- {name}: {value}" for name, value in header.items())]
    for name, part in parts.items():
        lines += ["", f"## {name}: {part['status']}, {part['seconds']:.0f} s"]
        if part["goals"]:
            lines += ["", "| goal | target | measured | |", "|---|---|---|---|"]
            for g in part["goals"]:
                bound = "≥" if g["at_least"] else "≤"
                row = (g["goal"], f"{bound} {text_of(g['target'])}", text_of(g["measured"]), g["verdict"])
                lines.append(f"| {' | '.join(row)} |")
        for table in part["tables"]:
            columns = list(table["rows"][0])
            lines += ["", f"**{table['title']}**", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(text_of(row[c]) for c in columns)} |" for row in table["rows"]]
        lines += ["", *(f"- {'ok' if c['holds'] else 'NOT OK'}: {c['check']}: {c['detail']}" for c in part["checks"])]
        lines += [*(f"- {note}" for note in part["notes"]), *(f"- FAILED: {what}" for what in part["failures"])]
    return "\n".join(lines) + "\n"

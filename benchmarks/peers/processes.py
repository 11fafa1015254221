"""What a process and its descendants use, from Linux's /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


def family(root: int) -> Iterator[Path]:
    """The folder in /proc of a process and of each of its descendants."""
    waiting = [root]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            waiting += [
                int(pid) for task in (folder / "task").iterdir() for pid in (task / "children").read_text().split()
            ]
        except OSError:  # it has ended
            continue
        yield folder


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def memory(root: int) -> int:
    """Resident bytes; what several processes share is counted once (PSS)."""
    texts = (_read(folder / "smaps_rollup") for folder in family(root))
    return sum(1024 * int(kib) for text in texts for kib in re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE))


def cpu_seconds(root: int) -> float:
    """Seconds of CPU of the processes that are there now, in user and kernel mode."""
    fields = (_read(folder / "stat").rpartition(")")[2].split() for folder in family(root))
    return sum(int(of[11]) + int(of[12]) for of in fields if of) / os.sysconf("SC_CLK_TCK")

"""What a run prints: the lines of the logger "lorafair" on stdout, progress within a round, tables, durations.

Lines come from rank 0 alone, unless they are logged with `extra=EVERY_RANK`. Importing this module changes nothing:
the command and `lorafair.run` switch printing on with `printing`.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

log = logging.getLogger("lorafair")
EVERY_RANK = {"every_rank": True}  # for `extra` of a line that more processes than rank 0 print

_TERMINAL_SECONDS = 0.2  # between two states of a progress line on a terminal
_LOG_SECONDS = 60.0  # the same in a log, which keeps all of them
_NAMED = 3  # things of one kind that a message names
ERASE_LINE = "\r\x1b[K"


class _Console(logging.Handler):
    """Prints to what sys.stdout is at the moment: tests and notebooks replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = 0
        self.progress_shown = False
        self.addFilter(lambda record: self.rank == 0 or getattr(record, "every_rank", False))

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line now: job logs are read while the job runs."""
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.write(f"{prefix}{record.getMessage()}\n")

    def write(self, text: str, *, stays: bool = True) -> None:
        """Write in place of the progress line, if one is shown. `stays`: it is no progress line itself."""
        write_text(sys.stdout, (ERASE_LINE if self.progress_shown else "") + text)
        self.progress_shown = not stays


def write_text(stream: TextIO | None, text: str) -> OSError | None:
    """Write and flush. What the stream's encoding lacks, or a file name has that is no text, becomes \\x.., \\u....

    Raises nothing, because a run goes on when nobody can read it. Returns what has failed, if no reader has just left.
    """
    if stream is None:  # the process was started without it
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except ValueError:  # it was closed
        return None
    except OSError as error:  # the reader, such as `head`, or the terminal is gone, or the disk is full
        _send_to_nowhere(stream)
        return None if isinstance(error, BrokenPipeError) else error
    return None


def _send_to_nowhere(stream: TextIO) -> None:
    """What is written from now on, and what the stream still holds, which Python would write again at its end."""
    with suppress(OSError):  # it has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def open_missing_outputs() -> None:
    """Give this process a stdout and a stderr that lead nowhere, where it was started without: `>&-`, `2>&-`."""
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def flush_outputs() -> None:
    """Write what stdout and stderr hold, of libraries too, where that is possible."""
    write_text(sys.stdout, "")
    write_text(sys.stderr, "")


def write_error(text: str) -> None:
    """A line on stderr."""
    write_text(sys.stderr, f"{text}\n")


def _with_printable_text(record: logging.LogRecord) -> bool:
    """A filter that passes every record on, to handlers of others too, with a text that can be written as UTF-8."""
    text = record.getMessage()
    printable = text.encode(errors="backslashreplace").decode()
    if printable != text:
        record.msg, record.args = printable, None
    return True


log.addFilter(_with_printable_text)
_console = _Console()


@contextmanager
def printing() -> Iterator[None]:
    """Print the lines of the logger "lorafair" for the time of the block, and leave logging as it was."""
    if _console in log.handlers:
        yield
        return
    level, propagate = log.level, log.propagate
    log.addHandler(_console)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    log.propagate = False
    _console.rank = 0
    try:
        yield
    finally:
        log.removeHandler(_console)
        log.setLevel(level)
        log.propagate = propagate


def set_rank(rank: int) -> None:
    """Let only rank 0 print from now on."""
    _console.rank = rank


def is_rank_0() -> bool:
    """Whether this process prints."""
    return _console.rank == 0


class Progress:
    """The progress of a long task in one line: rewritten in place on a terminal, once a minute in a log.

    The line says how much is done, how fast it goes and how long the rest will take at the pace so far.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._began = self._shown = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether `show` would print now: ask before counting takes time."""
        pause = _TERMINAL_SECONDS if _is_on_terminal() else _LOG_SECONDS
        return _console.rank == 0 and _console in log.handlers and time.monotonic() - self._shown >= pause

    def show(self, done: int, more: str = "") -> None:
        """Print how far it is, if the last time is long enough ago. `more` stands between the count and the pace."""
        if not self.is_due or not done:
            return
        self._shown = time.monotonic()
        passed = self._shown - self._began
        left = passed * (self._total - done) / done
        line = (
            f"{self._what}: {more}{done:,} of {self._total:,} {self._unit}, {done / passed:,.0f}/s, "
            f"{clock_text(left)} left"
        )
        if _is_on_terminal():
            _console.write(ERASE_LINE + line[: _columns() - 1], stays=False)
        else:
            _console.write(f"{line}\n")

    def close(self) -> None:
        """Take the line off the terminal."""
        if _console.progress_shown:
            _console.write("")


def _is_on_terminal() -> bool:
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # there is none, or it was closed
        return False


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def clock_text(seconds: float) -> str:
    """A duration as 1:05 (minutes and seconds) or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def duration_text(seconds: float) -> str:
    """A duration in words, as options give it: 8 seconds, 2.5 minutes."""
    number, unit = (seconds / 60, "minute") if seconds >= 60 else (seconds, "second")
    return f"{number:g} {unit}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A plain text table; the first `left` columns left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown; the first column left-aligned, the others right-aligned."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def format_count(count: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 round, 2 rounds; `many` where that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def some(names: Collection[object]) -> str:
    """The first few of them, for a message."""
    first = ", ".join(str(name) for name in itertools.islice(names, _NAMED))
    return first + (", …" if len(names) > _NAMED else "")


def format_value(value: Any) -> str:
    """A value of an option as a user would type it."""
    return f"{value:g}" if isinstance(value, float) else str(value)

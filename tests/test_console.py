"""What is printed: by rank 0, whole lines, and progress that moves without filling a log."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Callable

import pytest

from lorafair import console
from lorafair.console import (
    EVERY_RANK,
    Progress,
    clock_text,
    duration_text,
    format_count,
    log,
    markdown_table,
    printing,
    some,
)


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "é \\u65e5 \\udce9"), ("ascii", "\\xe9 \\u65e5 \\udce9")])
def test_what_the_output_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str) -> None:
    """Also a file name that is no text: Python has a lone surrogate in it for such a byte."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict"))
    with printing():
        log.info("é 日 \udce9")
    assert written.getvalue().decode(encoding) == f"{shown}\n"


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock: the last number of the list."""
    times = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    return times


def test_rank_0_prints_and_others_only_what_every_rank_says(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_rank(1)
    log.info("of rank 0")
    log.warning("careful", extra=EVERY_RANK)
    console.set_rank(0)
    log.info("of rank 0, too")
    assert capsys.readouterr().out == "warning: careful\nof rank 0, too\n"


def test_printing_leaves_logging_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    own = logging.getLogger("lorafair")
    handlers, level = list(own.handlers), own.level
    with printing():
        pass
    assert (own.handlers, own.level) == (handlers, level)


def test_a_terminal_shows_one_line_that_moves(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    progress = Progress("round 1/2", 1000, "images")
    progress.show(1)  # at once: too early to say anything
    for seconds, done in ((10.0, 250), (10.1, 260), (20.0, 500)):
        clock.append(1000.0 + seconds)
        progress.show(done, "1 of 3 clients, ")
    log.info("a line")
    progress.close()
    erase = "\r\x1b[K"
    assert terminal.getvalue() == (
        f"{erase}round 1/2: 1 of 3 clients, 250 of 1,000 images, 25/s, 0:30 left"
        f"{erase}{erase}round 1/2: 1 of 3 clients, 500 of 1,000 images, 25/s, 0:20 left"
        f"{erase}a line\n"
    )


def test_a_line_is_not_wider_than_the_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    progress = Progress("tokens of the frozen blocks", 10, "images")
    clock.append(1010.0)
    progress.show(5)
    assert terminal.getvalue() == "\r\x1b[Ktokens of the froze"
    progress.close()
    assert terminal.getvalue().endswith("\r\x1b[K"), "nothing is left of it"


def test_a_log_gets_a_line_a_minute(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("evaluation", 10_000, "images")
    for second in range(1, 181):
        clock.append(1000.0 + second)
        progress.show(second * 40)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "evaluation: 2,400 of 10,000 images, 40/s, 3:10 left",
        "evaluation: 4,800 of 10,000 images, 40/s, 2:10 left",
        "evaluation: 7,200 of 10,000 images, 40/s, 1:10 left",
    ]


def test_progress_goes_on_without_a_stdout(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stdout in (None, closed):
        monkeypatch.setattr(sys, "stdout", stdout)
        progress = Progress("evaluation", 10, "images")
        clock.append(clock[-1] + 100)
        progress.show(5)
        assert not progress.is_due, "it has shown something"
        progress.close()


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def terminal_that_is_gone() -> int:
    user, process = os.openpty()
    os.close(user)
    return process


@pytest.mark.parametrize(("output", "why"), [(full_disk, errno.ENOSPC), (terminal_that_is_gone, errno.EIO)])
def test_an_output_that_fails_leads_nowhere_from_then_on(output: Callable[[], int], why: int) -> None:
    """Also what the stream still holds: else closing it is an error, and Python's exit status 120."""
    with open(output(), "w") as stream:
        error = console.write_text(stream, "a line\n")
        assert error is not None
        assert error.errno == why
        assert console.write_text(stream, "a line\n") is None


def test_numbers_as_a_reader_wants_them() -> None:
    assert [clock_text(seconds) for seconds in (0.4, 65, 7265)] == ["0:00", "1:05", "2:01:05"]
    assert [duration_text(seconds) for seconds in (8, 150)] == ["8 seconds", "2.5 minutes"]
    assert [format_count(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
    assert format_count(1200, "image") == "1,200 images"


def test_of_many_things_the_first_are_named() -> None:
    assert some([]) == ""
    assert some({"b": 0, 1: 1, "a": 2}) == "b, 1, a"
    assert some(range(4)) == "0, 1, 2, …"


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert markdown_table(["a|b", "c"], [["1", "2"]]) == "| a\\|b | c |\n| --- | ---: |\n| 1 | 2 |"


def test_other_handlers_get_a_text_that_can_be_written_too(caplog: pytest.LogCaptureFixture) -> None:
    """File names may have bytes that are no text."""
    log.warning("%s is no image", "caf\udce9.jpg")
    log.warning("caf\u00e9")
    assert [record.getMessage() for record in caplog.records] == [r"caf\udce9.jpg is no image", "caf\u00e9"]

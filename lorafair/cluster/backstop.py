"""The backstop: ends a process whose interpreter's lock is held for too long, by C code that hangs.

No thread of Python runs then, and so no watchdog. faulthandler's timer is a thread of C that needs no lock: it writes
where every thread stands to stderr, the innermost call first, and ends the process with status 1.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from functools import cache

MARGIN_SECONDS = 30.0  # above the watchdog's limit: it comes first where it can, and may have to save
_TOLERANCE_SECONDS = 2.0  # the timer is set again only for more: that costs half a millisecond


class Backstop:
    """The one timer of the process."""

    def __init__(self) -> None:
        self._ends: float | None = None  # on the monotonic clock
        self._lock = threading.Lock()

    def arm(self, seconds: float) -> None:
        """End the process once `seconds` and a margin have passed, unless this is called again or it is disarmed."""
        with self._lock:
            now = time.monotonic()
            ends = now + max(seconds, 0.0) + MARGIN_SECONDS
            if self._ends is None or abs(self._ends - ends) > _TOLERANCE_SECONDS:
                left = max(0.1, round(min(ends - now, threading.TIMEOUT_MAX), 1))
                faulthandler.dump_traceback_later(left, exit=True, file=stderr_number())
                self._ends = ends

    def disarm(self) -> None:
        """The process may take as long as it likes."""
        with self._lock:
            if self._ends is not None:
                faulthandler.cancel_dump_traceback_later()
                self._ends = None


@cache
def stderr_number() -> int:
    """Of the file to write to from C: a closed stderr's number may be that of another file by now."""
    return os.open(os.devnull, os.O_WRONLY) if sys.__stderr__ is None else 2

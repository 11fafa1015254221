"""TensorBoard's file of a run: one, also after the run was continued."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c

from lorafair.checkpointing.folder import free_name
from lorafair.console import log
from lorafair.files.writing import naming, replacing

_BEGIN = "events.out.tfevents."  # TensorBoard reads files with tfevents in their name
_OURS = ".lorafair"  # files of others, as of a callback, are left alone


class EventFile:
    """Written in place and at once, so an error of the disk is raised where it happens.

    A continued run copies the rounds that are done into a new file, which a TensorBoard that is open finds, and removes
    the one before. What was written at step 0 is not copied: each part of a run writes it.
    """

    def __init__(self, run_dir: Path, completed_rounds: int) -> None:
        self._path = path = _new_name(run_dir)
        earlier = sorted(run_dir.glob(f"{_BEGIN}*{_OURS}"))
        others = set(run_dir.glob(f"{_BEGIN}*")) - set(earlier)
        with naming(path):
            kept = _events_of(earlier, completed_rounds)
            with replacing(path) as partial, partial.open("wb") as file:
                writer = RecordWriter(file)
                writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
                if earlier or others:  # a TensorBoard that has read them drops what comes again
                    start = SessionLog(status=SessionLog.START)
                    step = completed_rounds + 1 if others else 0
                    writer.write(Event(wall_time=time.time(), step=step, session_log=start).SerializeToString())
                for record in kept:
                    file.write(record)
            for old in earlier:
                old.unlink()
            self._file = path.open("ab")
        self._writer = RecordWriter(self._file)

    def write(self, summary: Summary, step: int, wall_time: float | None = None) -> None:
        """Add what belongs to a round, and make it visible at once; at the present time, unless another one is given.

        Raises UnwritableFile.
        """
        at = time.time() if wall_time is None else wall_time
        with naming(self._path):
            self._writer.write(Event(wall_time=at, step=step, summary=summary).SerializeToString())
            self._file.flush()

    def close(self) -> None:
        """Close it. Raises UnwritableFile."""
        with naming(self._path):
            self._file.close()


def _new_name(run_dir: Path) -> Path:
    """As TensorBoard's own writer has it: sorted by time."""
    moment = int(time.time())
    while list(run_dir.glob(f"{_BEGIN}{moment:010d}.*")):
        moment += 1
    return run_dir / f"{_BEGIN}{moment:010d}.{socket.gethostname()}.{os.getpid()}{_OURS}"


def _events_of(files: list[Path], completed_rounds: int) -> list[bytes]:
    """The records of the rounds that are done. A file that is damaged before their end is kept aside, which is said."""
    kept: list[list[bytes]] = []
    rounds: set[int] = set()
    for file in reversed(files):  # where a run was killed while it copied, the newest file has all
        content, here, read = file.read_bytes(), list[bytes](), 0
        steps: set[int] = set()
        for record, event in _records(content):
            read += len(record)
            if 0 < event.step <= completed_rounds and event.step not in rounds and event.HasField("summary"):
                here.append(record)
                steps.add(event.step)
        rounds |= steps
        kept.append(here)
        if read < len(content) and not rounds.issuperset(range(1, completed_rounds + 1)):
            aside = free_name(file.with_name("events"), "damaged")
            shutil.copyfile(file, aside)
            log.warning(f"{file} is damaged and kept as {aside.name}; TensorBoard has what could be read of it")
    return [record for here in reversed(kept) for record in here]


def _records(content: bytes) -> Iterator[tuple[bytes, Event]]:
    """Each record and the event in it: length, its sum, event, its sum. Ends where one is not whole or damaged."""
    at = 0
    while at + 12 <= len(content):
        length, check = struct.unpack_from("<QI", content, at)
        end = at + 16 + length
        if check != masked_crc32c(content[at : at + 8]) or end > len(content):
            return
        try:
            event = Event.FromString(content[at + 12 : end - 4])
        except DecodeError:
            return
        yield content[at:end], event
        at = end

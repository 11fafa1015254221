"""Files are whole at all times, whatever interrupts their writing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafair.files.writing import replacing, write_atomically

CONTENTS = (b"a" * 300_000, b"b" * 700_000)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["größer als λ\n", b"\x00\xff\r\n"], ids=["text", "bytes"])
@pytest.mark.parametrize("existing", [True, False])
def test_what_is_written_takes_the_place_of_the_file(tmp_path: Path, content: str | bytes, existing: bool) -> None:
    file = tmp_path / "file"
    if existing:
        file.write_text("old")
    write_atomically(file, content)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names_in(tmp_path) == ["file"]


def test_until_the_end_of_the_block_the_old_file_is_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
        assert partial.parent == file.parent  # on the same file system, or it could not be renamed
        assert partial.name.startswith(".")  # no listing of results takes it for one
    assert file.read_text() == "new"
    assert names_in(tmp_path) == ["file"]


def test_who_reads_meanwhile_sees_one_whole_file_or_the_other(tmp_path: Path) -> None:
    file, done = tmp_path / "file", threading.Event()
    write_atomically(file, CONTENTS[0])

    def write() -> None:
        for turn in range(200):
            write_atomically(file, CONTENTS[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(file.read_bytes())
    writer.join()
    assert seen <= set(CONTENTS)


def test_the_content_is_on_the_disk_before_the_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a crash of the machine could leave an empty file under the name."""
    calls: list[str] = []

    def watched(name: str) -> Callable[..., None]:
        function = getattr(os, name)

        def call(*arguments: object) -> None:
            calls.append(name)
            function(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name))
    write_atomically(tmp_path / "file", "new")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize(
    "error", [ValueError("cannot be encoded"), OSError("disk full"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_of_the_new_one(
    tmp_path: Path, error: BaseException, existing: bool
) -> None:
    file = tmp_path / "file"
    if existing:
        file.write_text("old")

    def write() -> None:
        with replacing(file) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names_in(tmp_path) == (["file"] if existing else [])
    assert not existing or file.read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_too(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("input/output error")

    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="input/output error"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(file):
        pass
    assert file.read_text() == "old"


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    code = (
        "import pathlib, sys, time\n"
        "from lorafair.files.writing import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)])
    while len(names_in(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert file.read_text() == "old"
    write_atomically(file, "new")  # over what it has left
    assert file.read_text() == "new"
    assert names_in(tmp_path) == ["file"]

"""A disk that is full at any file of a run: one line with the file, and the same command continues."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafair.checkpointing.checkpoint import list_checkpoints
from lorafair.config.schema import Config
from lorafair.errors import LorafairError
from lorafair.federation import run_federation
from lorafair.files.writing import UnwritableFile, naming, write_atomically
from lorafair.reporting.run_dir import read_metrics, read_result
from tests.conftest import launched


def fill_for(name: str, monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    """From now on files of this name cannot be written; the error names no file, as one of `write` does not."""
    original = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax") and re.search(name, str(file)):
            raise OSError(code, os.strerror(code))
        return original(file, mode, *arguments, **options)

    monkeypatch.setattr(io, "open", opened)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.lock", "config.yaml", "events.out.tfevents", "metrics.csv", "result.json"])
def test_the_run_ends_with_the_name_of_the_file_and_the_same_command_continues(
    name: str, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("rounds=1")
    with monkeypatch.context() as patch:
        fill_for(name.replace(".", r"\."), patch)
        with pytest.raises(LorafairError) as caught:
            run_federation(launched(1), config)
    found = re.fullmatch(r"(\S+) cannot be written: No space left on device", str(caught.value))
    assert found is not None
    assert found[1].startswith(str(config.folder / name))
    assert found[1] == str(config.folder / name) or "tfevents" in name
    printed = capsys.readouterr()
    assert "warning" not in printed.out
    assert printed.err == ""  # TensorBoard's thread prints nothing of its own
    assert bool(list_checkpoints(config.folder)) == (name == "result.json")
    run_federation(launched(1), config)
    assert read_result(config.folder)["rounds"] == 1
    assert read_metrics(config.folder)["train/loss"].keys() == {1}
    assert ("round 1/1" in capsys.readouterr().out) == (name != "result.json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_an_error_of_the_disk_names_the_file_and_stays_one(code: int, tmp_path: Path) -> None:
    with pytest.raises(UnwritableFile) as caught, naming(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == f"{tmp_path / 'file'} cannot be written: {os.strerror(code)}"
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == code
    with pytest.raises(ConnectionResetError), naming(tmp_path / "file"):  # of what is read meanwhile
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_an_old_file_stays_where_the_new_one_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", "old")
    fill_for("file", monkeypatch)
    with pytest.raises(UnwritableFile, match=r"/file cannot be written: No space left on device"):
        write_atomically(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"

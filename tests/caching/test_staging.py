"""Copies on the nodes' own disks: made once, whole or not at all, and never what a run depends on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafair.caching.staging import staged, staging_folder
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.config.schema import Config
from lorafair.errors import LorafairError
from lorafair.federation import run_federation
from tests.conftest import launched, run_ranks

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "abc.npy").write_bytes(CONTENT)
    return tmp_path / "shared" / "abc.npy"


def folder_in(path: Path) -> Path:
    folder = staging_folder(str(path), {})
    assert folder is not None
    return folder


def test_auto_takes_the_jobs_own_folder_first() -> None:
    own = f"lorafair-{os.getuid()}"
    assert staging_folder("auto", {"SLURM_TMPDIR": "/a", "TMPDIR": "/b"}) == Path("/a", own)
    assert staging_folder("auto", {"TMPDIR": "/b"}) == Path("/b", own)
    assert staging_folder("auto", {}) is None
    assert staging_folder("/c", {"TMPDIR": "/b"}) == Path("/c", own)


def test_the_copy_is_made_once_and_again_if_its_size_is_wrong(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = str(tmp_path / "local")
    copy = staged(launched(1), shared, local)
    assert copy == folder_in(tmp_path / "local") / "abc.npy"
    assert copy.read_bytes() == CONTENT
    assert f"{copy} (0.0 GB)" in capsys.readouterr().out
    inode = copy.stat().st_ino
    assert staged(launched(1), shared, local).stat().st_ino == inode
    os.truncate(copy, 1000)
    assert staged(launched(1), shared, local).read_bytes() == CONTENT
    assert os.listdir(copy.parent) == ["abc.npy"]
    assert staged(launched(1), shared, None) == shared


def ranks_stage(fabric: Any, file: Path, local: str) -> tuple[str, int]:
    copied = []
    copy = shutil.copyfile
    shutil.copyfile = lambda *paths: (copied.append(paths), copy(*paths))[1]  # type: ignore[assignment]
    return str(staged(fabric, file, local)), len(copied)


@pytest.mark.slow
def test_of_the_ranks_of_a_node_the_first_one_copies(shared: Path, tmp_path: Path) -> None:
    copy = str(folder_in(tmp_path / "local") / "abc.npy")
    assert run_ranks(2, ranks_stage, shared, str(tmp_path / "local")) == [(copy, 1), (copy, 0)]


@pytest.mark.parametrize("full", ["known before", "found out", "cut off"])
def test_without_room_the_shared_file_is_used(
    shared: Path, tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(source: Path, target: Path) -> None:
        target.write_bytes(CONTENT[:100])
        if full == "found out":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copy)
    if full == "known before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    assert staged(launched(1), shared, str(tmp_path / "local")) == shared
    printed = capsys.readouterr().out
    assert "staging skipped on" in printed
    assert {"known before": "0.0 GB are free", "found out": "No space left", "cut off": "only 100 of"}[full] in printed
    assert os.listdir(folder_in(tmp_path / "local")) == []


def test_a_folder_that_cannot_be_written_is_an_error(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LorafairError, match=r"data\.stage=.*/file: .* cannot be written on .*; give a folder"):
        staged(launched(1), shared, str(tmp_path / "file"))


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["images", "tokens"])
def test_training_is_the_same_from_a_copy(
    tiny: Callable[..., Config], kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"images": ("data.cache=always", "model.prefix_cache=never", "model.image_size=48"), "tokens": ()}[kept]
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "local"))
    adapters = []
    for stage in ("null", "auto"):
        config = tiny(*options, f"data.stage={stage}", f"run_dir={tmp_path / stage}", "rounds=1")
        run_federation(launched(1), config)
        adapters.append(load_checkpoint(list_checkpoints(config.folder)[-1]).tensors["adapter"])
    assert torch.equal(*adapters)
    assert len(list(folder_in(tmp_path / "local").glob("*.npy"))) == {"images": 1, "tokens": 2}[kept]


@pytest.mark.slow
def test_a_run_says_why_nothing_is_staged(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    run_federation(launched(1), tiny("data.stage=auto", "rounds=1"))
    assert "nothing is staged: data.stage=auto, and neither SLURM_TMPDIR nor TMPDIR is set" in capsys.readouterr().out
    options = (f"data.stage={tmp_path}", "model.prefix_cache=never", f"run_dir={tmp_path / 'other'}", "rounds=1")
    run_federation(launched(1), tiny(*options))
    assert "nothing is staged: neither decoded images nor tokens are kept" in capsys.readouterr().out

"""What runs leave for one another: found by digest, never an error, never more than there is room for."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lorafair.checkpointing import shared_training
from lorafair.checkpointing.shared_training import SharedTraining, drop_shared

ROWS = {"aa": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bb": torch.tensor([[5.0, 6.0]])}


def store(tmp_path: Path, run: str = "one", *, later_rounds: bool = True) -> SharedTraining:
    return SharedTraining(tmp_path / "shared" / "draw-0", run, later_rounds)


def test_cohorts_are_found_by_digest_in_their_round(tmp_path: Path) -> None:
    store(tmp_path).add(0, ROWS)
    found = store(tmp_path, "two").find(0, {(7, 2): "aa", (5,): "cc", (4,): "bb"})
    assert {cohort: (of.rows.tolist(), of.trained_by) for cohort, of in found.items()} == {
        (7, 2): ([[1, 2], [3, 4]], "one"), (4,): ([[5, 6]], "one"),
    }  # fmt: skip
    assert store(tmp_path).find(1, {(7, 2): "aa"}) == {}
    assert store(tmp_path).find(0, {}) == {}
    store(tmp_path, "two").add(0, {})
    store(tmp_path, "two").add(0, ROWS)  # another process has trained the same meanwhile
    assert len(list((tmp_path / "shared" / "draw-0").iterdir())) == 1
    drop_shared(tmp_path / "shared" / "draw-0")
    assert store(tmp_path).find(0, {(7, 2): "aa"}) == {}


def test_later_rounds_are_shared_where_that_is_asked_for(tmp_path: Path) -> None:
    assert [store(tmp_path, later_rounds=later).covers(n) for later in (True, False) for n in (0, 1)] == [
        True, True, True, False,
    ]  # fmt: skip


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path).add(1, ROWS)
    [first] = tmp_path.rglob("*.safetensors")
    monkeypatch.setattr(shared_training, "LIMIT", first.stat().st_size + 24)
    other = {"dd": torch.zeros(3, 2)}
    store(tmp_path).add(1, other)
    assert store(tmp_path).find(1, {(1, 2, 3): "dd"}) == {}
    store(tmp_path).add(0, other)  # of the first round, which more runs share
    assert len(store(tmp_path).find(0, {(1, 2, 3): "dd"})) == 1
    store(tmp_path).add(0, {"ee": torch.zeros(1, 2)})
    assert store(tmp_path).find(0, {(1,): "ee"}) == {}


def test_a_full_disk_and_a_damaged_file_are_said_and_nothing_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shared_training, "write_rows", full)
        store(tmp_path).add(0, ROWS)
    assert "what was trained is not shared with other runs: " in (printed := capsys.readouterr().out)
    assert printed.rstrip().endswith("No space left on device")
    store(tmp_path).add(0, ROWS)
    [file] = tmp_path.rglob("*.safetensors")
    for content in (file.read_bytes()[:-2] + b"\x00\x7f", file.read_bytes()[:-3], b""):
        file.write_bytes(content)
        assert store(tmp_path).find(0, {(7, 2): "aa"}) == {}
        assert f"{file} is not used: " in capsys.readouterr().out

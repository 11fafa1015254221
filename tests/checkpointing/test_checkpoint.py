"""Checkpoints: atomic, recognised when damaged, refused when they belong to another run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafair.checkpointing.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    mark_begun,
    resume_of_restarted,
    save_checkpoint,
)
from lorafair.cluster.slurm import Job

IDENTITY = {"seed": 0, "model": {"name": "test_vit", "lora": {"targets": ("a", "b")}}, "images": "abc"}


def checkpoint(rounds: int, **identity: Any) -> Checkpoint:
    return Checkpoint(
        rounds, {"adapter": torch.full((3,), float(rounds))}, IDENTITY | identity, {"bytes": 7.0}, {2: 0.5}
    )


def find(run_dir: Path, resume: str = "auto") -> Checkpoint | None:
    return find_checkpoint(run_dir, resume, IDENTITY)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(3), keep=2)
    loaded = load_checkpoint(path)
    assert (loaded.completed_rounds, loaded.totals, loaded.client_seconds) == (3, {"bytes": 7.0}, {2: 0.5})
    assert torch.equal(loaded.tensors["adapter"], torch.full((3,), 3.0))
    assert find(tmp_path) is not None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for rounds in (1, 2, 11, 12):
        save_checkpoint(tmp_path, checkpoint(rounds), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000011", "round_000012"]
    assert list((tmp_path / "checkpoints").glob(".*")) == []


def damage_tensors(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-2])


def damage_json(path: Path) -> None:
    (path / "state.json").write_text('{"format": 1')


def flip_a_digit(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text().replace('"completed_rounds": 5', '"completed_rounds": 7'))


def remove_json(path: Path) -> None:
    (path / "state.json").unlink()


@pytest.mark.parametrize("damage", [damage_tensors, damage_json, flip_a_digit, remove_json])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for rounds in (4, 5):
        path = save_checkpoint(tmp_path, checkpoint(rounds), keep=2)
    damage(path)
    found = find(tmp_path)
    assert found is not None
    assert found.completed_rounds == 4
    assert re.search(r"warning: .*round_000005.*trying the one before", capsys.readouterr().out)
    with pytest.raises(CheckpointError, match=r"resume=.*round_000005.*give a run directory or one of its"):
        find(tmp_path, str(path))
    for checkpoint_folder in list_checkpoints(tmp_path):
        damage_json(checkpoint_folder)
    assert find(tmp_path) is None
    assert "no readable checkpoint is left" in capsys.readouterr().out


def test_resuming_from_a_run_directory_takes_its_newest_checkpoint(tmp_path: Path) -> None:
    for rounds in (4, 5):
        save_checkpoint(tmp_path / "run", checkpoint(rounds), keep=2)
    found = find(tmp_path / "other", str(tmp_path / "run"))
    assert found is not None
    assert found.completed_rounds == 5


def test_a_damaged_later_checkpoint_does_not_outlive_the_rounds_done_again(tmp_path: Path) -> None:
    for rounds in (4, 5):
        path = save_checkpoint(tmp_path, checkpoint(rounds), keep=2)
    damage_tensors(path)
    save_checkpoint(tmp_path, checkpoint(5), keep=2)
    assert [load_checkpoint(p).completed_rounds for p in list_checkpoints(tmp_path)] == [4, 5]


def test_an_interrupted_save_leaves_the_former_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    partial = tmp_path / "checkpoints" / ".round_000002.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    found = find(tmp_path)
    assert found is not None
    assert found.completed_rounds == 1
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    assert not partial.exists()


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1, model={"name": "mixer_b16_224"}, images="def"), keep=2)
    with pytest.raises(CheckpointError) as caught:
        find(tmp_path)
    message = str(caught.value)
    assert "images is def there and abc here" in message
    assert "model.name is mixer_b16_224 there and test_vit here" in message
    assert "resume=never" in message
    assert "\n" not in message


def test_never_moves_the_earlier_run_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for number in (1, 2):
        save_checkpoint(run_dir, checkpoint(number), keep=2)
        assert find(run_dir, "never") is None
        assert len(list_checkpoints(tmp_path / f"run.{number}")) == 1
    assert not run_dir.exists()


def test_never_moves_no_directory_that_holds_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="resume=never would move"):
        find(tmp_path, "never")
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(CheckpointError, match="choose another run_dir"):
        find(Path(".."), "never")
    assert (tmp_path / "precious.txt").exists()


def test_an_empty_or_missing_directory_starts_anew(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    assert find(tmp_path / "none", "never") is None
    with pytest.raises(CheckpointError, match="none is not a readable checkpoint"):
        find(tmp_path, str(tmp_path / "none"))


def test_an_unwritable_directory_is_a_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(blocked, checkpoint(1), keep=2)


def test_a_requeued_job_goes_on_where_it_began_with_resume_never(tmp_path: Path) -> None:
    began, again, other = Job("7", 0), Job("7", 1), Job("8", 1)
    assert resume_of_restarted(tmp_path, "never", began) == "never"
    assert resume_of_restarted(tmp_path, "never", again) == "never"  # it was requeued before it began
    mark_begun(tmp_path, began)
    assert resume_of_restarted(tmp_path, "never", began) == "never"
    assert resume_of_restarted(tmp_path, "never", again) == "auto"
    assert resume_of_restarted(tmp_path, "never", other) == "never"
    assert resume_of_restarted(tmp_path, "never", None) == "never"
    assert resume_of_restarted(tmp_path, "runs/other", again) == "runs/other"  # nothing of its own is saved yet
    save_checkpoint(tmp_path, Checkpoint(1, {"adapter": torch.zeros(1)}, {}), keep=2)
    assert resume_of_restarted(tmp_path, "runs/other", again) == "auto"

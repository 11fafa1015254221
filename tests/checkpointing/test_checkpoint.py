"""Checkpoints: atomic, recognised when damaged, refused when they belong to another run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafair.checkpointing import checkpoint as checkpoint_module
from lorafair.checkpointing.checkpoint import (
    Checkpoint,
    check_tensors,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    mark_begun,
    resume_of_restarted,
    save_checkpoint,
)
from lorafair.checkpointing.folder import CheckpointError
from lorafair.checkpointing.lock import LOCK, acquire
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


def test_who_may_read_the_files_of_a_user_may_read_those_of_a_checkpoint(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    files = list(save_checkpoint(tmp_path, checkpoint(1), keep=1).iterdir())
    assert {file.stat().st_mode for file in files} == {other.stat().st_mode}


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


def test_a_result_whose_checkpoints_were_removed_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has the result of a run and none of its checkpoints.*resume=never"):
        find(tmp_path / "run")
    assert find(tmp_path / "run", "never") is None
    assert (tmp_path / "run.1" / "result.json").is_file()


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


# Folders as people leave them


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_copies_beside_the_checkpoints_are_named_once_and_neither_read_nor_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rounds in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(rounds), keep=9)
    folder = tmp_path / "checkpoints"
    copies = ["round_000003 (1)", "round_000003_old", "round_000009x", "round_4", "unfinished_000004.bak"]
    for name in copies:
        shutil.copytree(folder / "round_000003", folder / name)
    (folder / "round_000008").write_text("a file")
    (folder / "notes.txt").write_text("mine")
    found = find(tmp_path)
    assert found is not None
    assert found.completed_rounds == 3
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {folder}: round_000003 (1), round_000003_old, round_000008, ")
    assert line.endswith("and 1 more: not the name of a checkpoint, so neither read nor removed")
    for rounds in (4, 5):
        save_checkpoint(tmp_path, checkpoint(rounds), keep=1)
    assert names_in(tmp_path) == sorted([*copies, "round_000008", "notes.txt", "round_000005"])


def test_what_a_killed_save_has_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    for name in (".round_000002.partial", ".round_000009.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert find(tmp_path) is not None
    assert names_in(tmp_path) == ["round_000001"]


def test_a_damaged_checkpoint_is_moved_aside_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rounds in (4, 5):
        path = save_checkpoint(tmp_path, checkpoint(rounds), keep=2)
    damage_tensors(path)
    left = (path / "state.safetensors").read_bytes()
    find(tmp_path)
    assert "it is moved to round_000005.damaged" in capsys.readouterr().out
    find(tmp_path)
    assert capsys.readouterr().out == ""
    damage_json(save_checkpoint(tmp_path, checkpoint(5), keep=2))
    find(tmp_path)
    assert names_in(tmp_path) == ["round_000004", "round_000005.damaged", "round_000005.damaged.2"]
    assert (tmp_path / "checkpoints" / "round_000005.damaged" / "state.safetensors").read_bytes() == left


def test_a_checkpoint_under_the_number_of_another_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(tmp_path, checkpoint(3), keep=2)
    shutil.copytree(path, path.with_name("round_000007"))
    found = find(tmp_path)
    assert found is not None
    assert found.completed_rounds == 3
    assert "round_000007 holds the state after round 3; it is moved to" in capsys.readouterr().out


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("what", ["folder", "state.json", "state.safetensors"])
def test_what_cannot_be_read_now_ends_the_run_and_changes_nothing(
    code: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rounds in (4, 5):
        save_checkpoint(tmp_path, checkpoint(rounds), keep=2)
    before = names_in(tmp_path)
    with monkeypatch.context() as patch:

        def fail(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == what or (what == "folder" and path.name == "checkpoints"):
                raise OSError(code, os.strerror(code), str(path))
            return original(path, *arguments, **options)

        name = {"folder": "iterdir", "state.json": "read_text", "state.safetensors": "open"}[what]
        original = getattr(Path, name)
        patch.setattr(Path, name, fail)
        said = rf"cannot be read now \({os.strerror(code)}\).*same command continues"
        with pytest.raises(CheckpointError, match=said):
            find(tmp_path)
    assert names_in(tmp_path) == before


def test_a_link_to_a_disk_that_is_not_there_ends_the_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(4), keep=2)
    (tmp_path / "checkpoints" / "round_000005").symlink_to(tmp_path / "not mounted")
    with pytest.raises(CheckpointError, match="round_000005 cannot be read now"):
        find(tmp_path)


def test_a_checkpoint_of_a_newer_version_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(4), keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "FORMAT", 2)
        save_checkpoint(tmp_path, checkpoint(5), keep=2)
    for resume in ("auto", str(tmp_path)):
        said = r"^[^;]* has checkpoint format 2, .* reads 1; install the newer version [^;]* run_dir$"
        with pytest.raises(CheckpointError, match=said):
            find(tmp_path, resume)
    assert names_in(tmp_path) == ["round_000004", "round_000005"]


def test_going_back_to_an_earlier_round_keeps_the_later_ones_aside(tmp_path: Path) -> None:
    for rounds in (3, 4, 5):
        save_checkpoint(tmp_path, checkpoint(rounds), keep=9)
    found = find(tmp_path, str(tmp_path / "checkpoints" / "round_000003"))
    assert found is not None
    save_checkpoint(tmp_path, checkpoint(4), keep=9)
    assert names_in(tmp_path) == ["round_000003", "round_000004", "round_000004.later", "round_000005.later"]


def test_a_full_disk_leaves_the_checkpoints_before_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(4), keep=1)

    def fail(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(CheckpointError, match=r"round_000005 could not be written: .*No space left on device"):
            save_checkpoint(tmp_path, checkpoint(5), keep=1)
    assert names_in(tmp_path) == ["round_000004"]
    assert find(tmp_path) is not None


def test_a_difference_can_be_accepted_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, checkpoint(1, seed=5, images="def"), keep=2)
    with pytest.raises(CheckpointError, match=re.escape("or 'accept=[seed,images]' to go on from it all the same")):
        find(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape("another run: images is def there and abc here. ")):
        find_checkpoint(tmp_path, "auto", IDENTITY, accept=["seed"])
    assert find_checkpoint(tmp_path, "auto", IDENTITY, accept=["seed", "images"]) is not None
    assert "although seed is 5 there and 0 here; images is def there and abc here" in capsys.readouterr().out


def test_tensors_must_have_the_names_shapes_and_types_that_a_run_needs() -> None:
    needed = {"adapter": torch.zeros(3), "base.a": torch.zeros(2, 2), "base.b": torch.zeros(2, 2)}
    check_tensors({"adapter": torch.zeros(3)}, needed, "it")
    check_tensors(needed, needed, "it")
    for found, message in (
        (
            {"adapter": torch.zeros(4)},
            r"it does not fit this run: adapter is float32 \(4,\) there and float32 \(3,\) here",
        ),
        ({"adapter": torch.zeros(1)}, r"adapter is float32 \(1,\) there"),  # copy_ would repeat it
        ({"adapter": torch.zeros(3).half()}, r"adapter is float16 \(3,\) there"),
        ({}, "adapter is missing"),
        ({"adapter": torch.zeros(3), "moments.first": torch.zeros(3)}, r"moments\.first is of no use here"),
        ({"adapter": torch.zeros(3), "base.a": torch.zeros(2, 2)}, r"base\.b is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_tensors(found, needed, "it")
    with pytest.raises(CheckpointError, match=r"accept cannot help .*: set evaluation\.average_rounds as before"):
        check_tensors({"recent": torch.zeros(3, 9)}, {"recent": torch.zeros(2, 9)}, "it", ["evaluation.average_rounds"])


def test_never_holds_the_new_directory_in_place_of_the_one_moved_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    save_checkpoint(run_dir, checkpoint(1), keep=2)
    held = acquire(run_dir)
    assert find(run_dir, "never") is None
    assert json.loads((run_dir / LOCK).read_text())["token"] == held.holder.token
    assert sorted(path.name for path in (tmp_path / "run.1").iterdir()) == ["checkpoints"]
    held.release()
    assert find(run_dir, "never") is None  # an empty one is not moved
    assert not (tmp_path / "run.2").exists()

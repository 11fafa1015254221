"""Who holds a run directory: one process, until it has ended, on whatever node that was."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafair.checkpointing import lock as lock_module
from lorafair.checkpointing.lock import LOCK, STALE_SECONDS, Holder, RunDirInUse, acquire, check_free, in_progress
from lorafair.errors import LorafairError
from lorafair.files.writing import UnwritableFile

THERE = {"host": "cn02", "kernel": "another machine"}


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def left_by(run_dir: Path, age: float = 0.0, **of_holder: Any) -> Holder:
    """The file of another holder, last renewed `age` seconds ago."""
    holder = dataclasses.replace(Holder.this_process(), **of_holder)
    (run_dir / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(run_dir / LOCK, (time.time() - age, time.time() - age))
    return holder


def is_taken(run_dir: Path) -> bool:
    """Whether the directory can be had; it is given back."""
    try:
        acquire(run_dir).release()
    except RunDirInUse:
        return False
    return True


def test_the_second_one_is_refused_with_the_name_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    first = acquire(tmp_path)
    with pytest.raises(RunDirInUse) as caught:
        acquire(tmp_path)
    expected = f"run_dir={tmp_path} is in use by process {os.getpid()} on {first.holder.host} (Slurm job 42); wait"
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    assert in_progress(tmp_path) == str(first.holder)
    with pytest.raises(RunDirInUse):
        check_free(tmp_path)
    first.release()
    check_free(tmp_path)
    assert in_progress(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    acquire(tmp_path).release()


def test_a_process_of_this_machine_that_has_ended_holds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left_by(tmp_path, pid=ended.pid)
    assert is_taken(tmp_path)
    assert f"process {ended.pid} on " in capsys.readouterr().out


def test_a_zombie_and_a_number_that_is_another_process_now_hold_nothing(tmp_path: Path) -> None:
    zombie = subprocess.Popen(["true"])
    while lock_module._state_and_start(zombie.pid)[0] != "Z":
        time.sleep(0.01)
    left_by(tmp_path, pid=zombie.pid, started=lock_module._state_and_start(zombie.pid)[1])
    assert is_taken(tmp_path)
    zombie.wait()
    left_by(tmp_path, pid=os.getppid(), started=1)
    assert is_taken(tmp_path)
    left_by(tmp_path, pid=os.getppid(), started=lock_module._state_and_start(os.getppid())[1], age=9999)
    assert not is_taken(tmp_path)  # it runs, so its sign of life does not matter


def test_a_killed_process_leaves_nothing_stuck(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from lorafair.checkpointing.lock import acquire\n"
        "held = acquire(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(RunDirInUse, match=f"in use by process {process.pid} on "):
        acquire(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    assert is_taken(tmp_path)


def test_of_another_node_the_sign_of_life_decides_and_the_file_to_remove_is_said(tmp_path: Path) -> None:
    left_by(tmp_path, age=20, **THERE)
    with pytest.raises(RunDirInUse, match=rf"on cn02; .* 2[01] seconds old; without .* remove {tmp_path / LOCK}$"):
        acquire(tmp_path)
    left_by(tmp_path, age=STALE_SECONDS + 5, **THERE)
    assert is_taken(tmp_path)


def test_a_file_that_names_nobody_counts_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"token": "a')
    assert not is_taken(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    assert is_taken(tmp_path)


def test_a_requeued_job_takes_over_from_its_former_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for restarts, can_be_had in ((0, True), (2, False)):
        left_by(tmp_path, **THERE, job="42", restarts=restarts)
        assert is_taken(tmp_path) == can_be_had
    left_by(tmp_path, **THERE, job="42", restarts=0, cluster="another")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "this")
    assert not is_taken(tmp_path)


@pytest.mark.parametrize(
    ("state", "steps", "age", "can_be_had"),
    [
        ("RUNNING", "42.batch 42.3", 9999, False),
        ("RUNNING", "42.batch", 0, True),
        ("COMPLETING", "42.3", 0, False),
        ("SUSPENDED", "", 9999, False),
        ("TIMEOUT", "", 0, True),
        ("PENDING", "", 0, True),
        ("", "", 0, False),
        ("", "", 9999, True),
    ],
)
def test_slurm_says_whether_the_job_of_another_node_has_ended(
    state: str, steps: str, age: float, can_be_had: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue, run_dir = tmp_path / "bin" / "squeue", tmp_path / "run"
    squeue.parent.mkdir()
    run_dir.mkdir()
    failing = f'[ -n "{state}" ] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}'
    squeue.write_text(f'#!/bin/sh\n{failing}\ncase "$*" in *-s*) printf "%s\\n" {steps};; *) echo {state};; esac\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}{os.pathsep}{os.environ['PATH']}")
    left_by(run_dir, age=age, **THERE, job="42", step="3")
    assert is_taken(run_dir) == can_be_had


@pytest.mark.parametrize("turn", range(8))
def test_of_many_that_find_a_file_left_behind_one_takes_over(
    turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a network disk, where each look at a file takes its own time
    delays = random.Random(turn)
    for name in ("_read", "_create", "_age"):
        monkeypatch.setattr(lock_module, name, delayed(getattr(lock_module, name), delays))
    left_by(tmp_path, age=9999, **THERE)
    outcomes: list[object] = []
    together = threading.Barrier(8)

    def take() -> None:
        together.wait()
        try:
            outcomes.append(acquire(tmp_path))
        except LorafairError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [held] = [outcome for outcome in outcomes if isinstance(outcome, lock_module.RunLock)]
    assert json.loads((tmp_path / LOCK).read_text())["token"] == held.holder.token
    held.release()
    assert list(tmp_path.iterdir()) == []


def delayed(call: Callable[..., Any], delays: random.Random) -> Callable[..., Any]:
    def then_wait(*arguments: object) -> Any:
        result = call(*arguments)
        time.sleep(0.01 * delays.random())
        return result

    return then_wait


@pytest.mark.parametrize("ended", [True, False])
def test_a_process_that_was_killed_while_it_took_over_leaves_nothing_stuck(ended: bool, tmp_path: Path) -> None:
    taking_over = left_by(tmp_path, age=9999 if ended else 0, **THERE, token="of another")
    (tmp_path / LOCK).rename(tmp_path / f".{LOCK}.removing")
    left_by(tmp_path, age=9999, **THERE)
    if ended:
        assert is_taken(tmp_path)
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(RunDirInUse, match=f"is in use by {taking_over}; "):
            acquire(tmp_path)


def failing(code: int) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_disks_without_hard_links_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    held = acquire(tmp_path)
    assert not is_taken(tmp_path)
    held.release()
    left_by(tmp_path, age=9999, **THERE)
    assert is_taken(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("step", ["link", "write"])
def test_a_disk_that_is_full_is_said_with_the_file(
    code: int, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step == "link":
        monkeypatch.setattr(os, "link", failing(code))
    else:
        monkeypatch.setattr(Path, "write_text", failing(code))
    with pytest.raises(UnwritableFile, match=rf"^{tmp_path / LOCK} cannot be written: {os.strerror(code)}$"):
        acquire(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_removed_by_hand_is_made_again_and_one_of_another_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock_module, "_CHECK_SECONDS", 0.0)
    held = acquire(tmp_path)
    held.confirm()
    (tmp_path / LOCK).unlink()
    held.confirm()
    assert "was removed while this run goes on" in capsys.readouterr().out
    assert not is_taken(tmp_path)
    other = left_by(tmp_path, **THERE, token="of another")
    with pytest.raises(LorafairError, match=f"was taken over by process {other.pid} on cn02, so this run ends"):
        held.confirm()
    held.release()
    assert (tmp_path / LOCK).exists()  # it is not this one's to remove


def test_the_holder_renews_its_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    held = acquire(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    until = time.monotonic() + 30
    while (tmp_path / LOCK).stat().st_mtime == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    held.release()

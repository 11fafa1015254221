"""The cache folder: what lies in it is complete or absent."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from lorafair.files.cache import CacheError, build_once, cache_dir


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "lorafair"


def write_hello(folder: Path) -> None:
    (folder / "hello.txt").write_text("hello")


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name.endswith(".partial")]


def test_the_cache_is_where_xdg_says_or_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_dir() == cache
    assert not cache.exists()  # asking for it creates nothing
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/invalid")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/lorafair")


def test_a_folder_is_built_once(cache: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write_hello(folder)

    first, second = build_once("set-1", build), build_once("set-1", build)
    assert first == second == cache / "set-1"
    assert len(calls) == 1
    assert (first / "hello.txt").read_text() == "hello"
    assert leftovers(cache) == []


def test_an_interrupted_build_leaves_nothing_and_the_next_one_starts_over(cache: Path) -> None:
    def interrupted(folder: Path) -> None:
        write_hello(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("set-1", interrupted)
    assert not (cache / "set-1").exists()
    assert leftovers(cache) == []
    assert (build_once("set-1", write_hello) / "hello.txt").exists()


def test_what_a_killed_build_left_is_no_cache_entry_and_is_deleted_after_a_day(cache: Path) -> None:
    old, young = cache / ".set-1.aaa.partial", cache / ".set-1.bbb.partial"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "half.npy").touch()
    os.utime(old, (time.time() - 100_000,) * 2)
    build_once("set-1", write_hello)
    assert leftovers(cache) == [young.name]  # it may be another node's, at work


def build_slowly(counter: str) -> None:
    def build(folder: Path) -> None:
        with open(counter, "a") as file:
            file.write("built\n")
        time.sleep(0.2)
        write_hello(folder)

    build_once("set-1", build)


def test_processes_that_start_together_build_once(cache: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_slowly, args=(str(counter),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert counter.read_text() == "built\n"


def test_losing_the_race_against_another_node_is_fine(cache: Path) -> None:
    def overtaken(folder: Path) -> None:
        (cache / "set-1").mkdir()
        (cache / "set-1" / "hello.txt").write_text("the other node's")
        write_hello(folder)

    assert (build_once("set-1", overtaken) / "hello.txt").read_text() == "the other node's"
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line_naming_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(CacheError, match=r"a file/lorafair/set-1 cannot be written .*XDG_CACHE_HOME"):
        build_once("set-1", write_hello)


def test_a_full_disk_names_the_variable_but_other_errors_stay_what_they_are() -> None:
    def fail_with(error: OSError) -> None:
        def build(folder: Path) -> None:
            raise error

        build_once("set-1", build)

    with pytest.raises(CacheError, match=r"No space left.*XDG_CACHE_HOME"):
        fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(FileNotFoundError):
        fail_with(FileNotFoundError(errno.ENOENT, "no such font"))

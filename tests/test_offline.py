"""The cache: folders are complete or absent, and what comes from an index is what was pinned. No network needed."""

from __future__ import annotations

import base64
import errno
import hashlib
import multiprocessing
import os
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from lorafair import offline
from lorafair.offline import CacheError, FetchError, build_once, cache_dir, fetch_npm, fetch_wheels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "lorafair"


def write_hello(folder: Path) -> None:
    (folder / "hello.txt").write_text("hello")


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name.endswith(".partial")]


# The folder


def test_the_cache_is_where_xdg_says_or_in_the_home_folder(monkeypatch, cache):
    assert cache_dir() == cache
    assert not cache.exists()  # asking for it creates nothing
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/invalid")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/lorafair")


def test_a_folder_is_built_once(cache):
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write_hello(folder)

    first, second = build_once("set-1", build), build_once("set-1", build)
    assert first == second == cache / "set-1"
    assert len(calls) == 1
    assert (first / "hello.txt").read_text() == "hello"
    assert leftovers(cache) == []


def test_an_interrupted_build_leaves_nothing_and_the_next_one_starts_over(cache):
    def interrupted(folder: Path) -> None:
        write_hello(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("set-1", interrupted)
    assert not (cache / "set-1").exists()
    assert leftovers(cache) == []
    assert (build_once("set-1", write_hello) / "hello.txt").exists()


def test_what_a_killed_build_left_is_no_cache_entry_and_is_deleted_after_a_day(cache):
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


def test_processes_that_start_together_build_once(cache, tmp_path):
    counter = tmp_path / "counter"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_slowly, args=(str(counter),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert counter.read_text() == "built\n"


def test_losing_the_race_against_another_node_is_fine(cache):
    def overtaken(folder: Path) -> None:
        (cache / "set-1").mkdir()
        (cache / "set-1" / "hello.txt").write_text("the other node's")
        write_hello(folder)

    assert (build_once("set-1", overtaken) / "hello.txt").read_text() == "the other node's"
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line_naming_the_variable(monkeypatch, tmp_path):
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(CacheError, match=r"a file/lorafair/set-1 cannot be written .*XDG_CACHE_HOME"):
        build_once("set-1", write_hello)


def test_a_full_disk_names_the_variable_but_other_errors_stay_what_they_are():
    def fail_with(error: OSError) -> None:
        def build(folder: Path) -> None:
            raise error

        build_once("set-1", build)

    with pytest.raises(CacheError, match=r"No space left.*XDG_CACHE_HOME"):
        fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(FileNotFoundError):
        fail_with(FileNotFoundError(errno.ENOENT, "no such font"))


# Wheels


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in the place of PyPI."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(index: Path, name: str) -> str:
    """A wheel with one data file; its sha256."""
    file = index / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}/data.txt", f"this is {name}")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_wheels_with_the_pinned_hashes_are_unpacked(index, tmp_path):
    good, other = make_wheel(index, "spam"), "0" * 64
    fetch_wheels({"spam==1.0": f"{other} {good}", "eggs==1.0": make_wheel(index, "eggs")}, tmp_path)
    assert (tmp_path / "spam" / "data.txt").read_text() == "this is spam"
    assert (tmp_path / "eggs" / "data.txt").read_text() == "this is eggs"


def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    make_wheel(index, "spam")
    with pytest.raises(FetchError, match=r"spam==1.0 from PyPI is not the pinned one: its sha256 differs"):
        fetch_wheels({"spam==1.0": "0" * 64}, tmp_path)
    assert not (tmp_path / "spam").exists()


def test_without_network_the_message_says_what_to_do(index, tmp_path, cache):
    with pytest.raises(FetchError) as caught:
        fetch_wheels({"spam==1.0": "0" * 64, "eggs==1.0": "0" * 64}, tmp_path)
    message = str(caught.value)
    assert message.startswith("spam==1.0 and 1 more could not be fetched from PyPI")
    assert message.endswith(f"run the same command once on a machine that has it and copy {cache} from there")
    assert "\n" not in message


def test_an_environment_without_pip_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"spam==1\.0 is fetched with pip, which is missing"):
        fetch_wheels({"spam==1.0": "0" * 64}, tmp_path)


# npm packages


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An npm on the PATH that knows one package; the package's integrity."""
    readme = tmp_path / "README"
    readme.write_text("drawings")
    tarball = tmp_path / "known.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(readme, "package/README")
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        f'if [ "$2" = "@set/known@1.0.0" ]; then cp {tarball} "$4/known-1.0.0.tgz"; exit 0; fi\n'
        "echo 'npm warn some setting is old' >&2\necho 'npm error code ENOTFOUND' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    return "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()


def test_the_files_of_an_npm_package_of_the_pinned_integrity(npm):
    assert fetch_npm("@set/known@1.0.0", npm) == {"README": b"drawings"}


def test_an_npm_package_of_another_integrity_is_refused(npm):
    with pytest.raises(FetchError, match=r"@set/known@1.0.0 from npm's registry is not the pinned one"):
        fetch_npm("@set/known@1.0.0", "sha512-AAAA")


def test_an_unreachable_registry_says_what_to_do(npm, cache):
    with pytest.raises(FetchError, match=rf"other@1.0.0 could not be fetched .*code ENOTFOUND.* copy {cache}"):
        fetch_npm("other@1.0.0", npm)


def test_a_missing_npm_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"npm, which was not found on the PATH: .*data\.source"):
        fetch_npm("@set/known@1.0.0", "sha512-AAAA")

"""Packages: what comes from an index is what was pinned. No network needed."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from lorafair.files.download import FetchError, fetch_npm, fetch_wheels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "lorafair"


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


def test_wheels_with_the_pinned_hashes_are_unpacked(index: Path, tmp_path: Path) -> None:
    good, other = make_wheel(index, "spam"), "0" * 64
    fetch_wheels({"spam==1.0": f"{other} {good}", "eggs==1.0": make_wheel(index, "eggs")}, tmp_path)
    assert (tmp_path / "spam" / "data.txt").read_text() == "this is spam"
    assert (tmp_path / "eggs" / "data.txt").read_text() == "this is eggs"


@pytest.mark.slow
def test_a_wheel_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "spam")
    with pytest.raises(FetchError, match=r"spam==1.0 from PyPI is not the pinned one: its sha256 differs"):
        fetch_wheels({"spam==1.0": "0" * 64}, tmp_path)
    assert not (tmp_path / "spam").exists()


def test_without_network_the_message_says_what_to_do(index: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FetchError) as caught:
        fetch_wheels({"spam==1.0": "0" * 64, "eggs==1.0": "0" * 64}, tmp_path)
    message = str(caught.value)
    assert message.startswith("spam==1.0 and 1 more could not be fetched from PyPI")
    assert message.endswith(f"run the same command once on a machine that has it and copy {cache} from there")
    assert "\n" not in message


def test_an_environment_without_pip_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
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


def test_the_files_of_an_npm_package_of_the_pinned_integrity(npm: str) -> None:
    assert fetch_npm("@set/known@1.0.0", npm) == {"README": b"drawings"}


def test_an_npm_package_of_another_integrity_is_refused(npm: str) -> None:
    with pytest.raises(FetchError, match=r"@set/known@1.0.0 from npm's registry is not the pinned one"):
        fetch_npm("@set/known@1.0.0", "sha512-AAAA")


def test_an_unreachable_registry_says_what_to_do(npm: str, cache: Path) -> None:
    with pytest.raises(FetchError, match=rf"other@1.0.0 could not be fetched .*code ENOTFOUND.* copy {cache}"):
        fetch_npm("other@1.0.0", npm)


def test_a_missing_npm_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"npm, which was not found on the PATH: .*data\.source"):
        fetch_npm("@set/known@1.0.0", "sha512-AAAA")

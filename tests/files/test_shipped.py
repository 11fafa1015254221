from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lorafair.files import shipped


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without a distribution, in a folder without version control."""
    package = tmp_path / "lorafair"
    package.mkdir()
    (package / "module.py").touch()
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    return package


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", ["paper/nico_vit.yaml", "paper/nico_vit", "conf/paper/nico_vit.yaml"])
def test_a_shipped_configuration_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = shipped.find_configuration(name)
    assert found is not None
    assert found.is_file()
    assert found.parts[-2:] == ("paper", "nico_vit.yaml")


def test_a_file_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("synthetic.yaml").touch()
    assert shipped.find_configuration("synthetic.yaml") == Path("synthetic.yaml")
    assert shipped.find_configuration("nothing_of_this_name.yaml") is None


def test_folders_are_inside_an_installed_package(package: Path) -> None:
    assert shipped.shipped_folder("conf") == package.parent / "conf"
    (package / "conf").mkdir()
    assert shipped.shipped_folder("conf") == package / "conf"


@pytest.mark.parametrize("name", shipped.shipped_configurations())
def test_a_configuration_says_what_it_is(name: str) -> None:
    about = shipped.about_configuration(shipped.shipped_configurations()[name])
    assert 20 < len(about) <= 100
    assert "train.py" not in about
    assert about.endswith((".", " ..."))


def test_the_commit_of_a_checkout(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped.commit() == ""
    git(package.parent, "init", "--quiet")
    assert shipped.commit() == ""  # there is none yet
    git(package.parent, "add", "--all")
    git(package.parent, "commit", "--quiet", "--message=first")
    first = git(package.parent, "rev-parse", "--short", "HEAD")
    git(package.parent, "tag", "--annotate", "v1", "--message=a tag")
    assert shipped.commit() == first
    (package / "module.py").write_text("changed = True")
    assert shipped.commit() == f"{first}+"
    monkeypatch.setenv("GIT_DIR", str(Path(__file__).parents[2] / ".git"))  # as in a hook of another repository
    assert shipped.commit() == f"{first}+"
    monkeypatch.setenv("PATH", "")
    assert shipped.commit() == ""


@pytest.mark.parametrize(
    ("version", "commit"), [("0.2.0", ""), ("0.2.0+g1234567", "1234567"), ("0.2.0+g1234567.d", "1234567+")]
)
def test_the_commit_of_an_installed_package(
    package: Path, version: str, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = package.parent / f"lorafair-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.4\nName: lorafair\nVersion: {version}\n")
    monkeypatch.syspath_prepend(package.parent)
    assert shipped.installed_version() == version
    assert shipped.commit() == commit

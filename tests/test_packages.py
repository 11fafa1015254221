"""What `pip install` gives: wheel and sdist, built as a user builds them and used where there is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorafair import __version__

ROOT = Path(__file__).parents[1]
SMALL = ("rounds=1", "data.train_images=24", "data.test_images=24")
LEFT_BY_TOOLS = {".git", ".venv", "build", "dist", "runs", "__pycache__", "lorafair.egg-info"}

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints on its standard output; fails with all that it has printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**inherited, **variables}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path, into: Path | None = None) -> None:
    """pip of this environment, without any index."""
    python = [] if into is None else ["--python", into / "bin" / "python"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    call(sys.executable, "-m", "pip", *python, arguments[0], *quiet, *arguments[1:], cwd=cwd)


def backend(hook: str, folder: Path, *, cwd: Path) -> Path:
    """What one of the build backend's hooks has put into a folder."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(folder)!r}))"
    return folder / call(sys.executable, "-c", code, cwd=cwd).splitlines()[-1]


def files_of_the_project() -> list[str]:
    """What is, or is about to be, under version control; in an unpacked sdist all that is there."""
    if (ROOT / ".git").exists():
        listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
        return sorted(name for name in listed if (ROOT / name).is_file())
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(
        str(path)
        for path in paths
        if not {part for part in path.parts if "_cache" in part} | LEFT_BY_TOOLS & set(path.parts)
    )


@dataclass(frozen=True)
class Built:
    """A wheel and an sdist of a copy of this tree."""

    tree: Path
    version: str
    sdist: Path
    unpacked: Path
    wheel: Path  # from the unpacked sdist
    wheel_of_tree: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build all of it, from a repository with one commit."""
    folder = tmp_path_factory.mktemp("packages")
    tree = folder / "tree"
    for name in files_of_the_project():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name in ("PKG-INFO", "setup.cfg"):  # of an sdist: this is a checkout again
        (tree / name).unlink(missing_ok=True)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    call(*git, "init", "--quiet", cwd=tree)
    call(*git, "add", "--all", cwd=tree)
    call(*git, "commit", "--quiet", "--message=all of it", cwd=tree)
    version = f"{__version__}+g{call(*git, 'rev-parse', '--short', 'HEAD', cwd=tree).strip()}"
    gone = tree / "build" / "lib" / "lorafair" / "gone.py"  # of an earlier build, when there was such a module
    gone.parent.mkdir(parents=True)
    gone.touch()
    sdist = backend("build_sdist", folder, cwd=tree)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / f"lorafair-{version}"
    for source, name in ((tree, "of_tree"), (unpacked, "of_sdist")):
        pip("wheel", "--no-build-isolation", "--wheel-dir", folder / name, source, cwd=folder)
    (of_tree,), (of_sdist,) = (folder / "of_tree").iterdir(), (folder / "of_sdist").iterdir()
    return Built(tree, version, sdist, unpacked, of_sdist, of_tree)


def environment(folder: Path) -> Path:
    """A virtual environment that has what this one has, but for lorafair."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file comes last, and .pth files that lie there are not read: this environment's own lorafair is
    # not seen where it is an editable install, and comes second where it is not.
    (packages / "of_the_tests.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("-packages")))
    return folder


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and an empty folder."""

    environment: Path
    empty: Path

    def __call__(self, *words: str | Path) -> str:
        """The command `lorafair`."""
        return call(
            self.environment / "bin" / "lorafair", *words, cwd=self.empty, XDG_CACHE_HOME=str(self.empty / "cache")
        )


@pytest.fixture(scope="module")
def lorafair(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    installed = Installed(environment(folder / "environment"), folder / "empty")
    pip("install", built.wheel, cwd=folder, into=installed.environment)
    installed.empty.mkdir()
    return installed


@pytest.fixture(scope="module")
def run_dir(lorafair: Installed) -> Path:
    lorafair("run", "synthetic.yaml", *SMALL, "run_dir=here")
    return lorafair.empty / "here"


def names(archive: Path, folder: str = "") -> set[str]:
    """The files in a wheel or an sdist, seen from a folder in it."""
    if archive.suffix == ".whl":
        found = zipfile.ZipFile(archive).namelist()
    else:
        with tarfile.open(archive) as tar:
            found = [member.name.partition("/")[2] for member in tar if member.isfile()]
    return {name.removeprefix(folder) for name in found if name.startswith(folder)}


def below(folder: Path) -> set[str]:
    """The files of a folder of this project, seen from it."""
    prefix = f"{folder.relative_to(ROOT)}/"
    return {name.removeprefix(prefix) for name in files_of_the_project() if name.startswith(prefix)}


# What is in them


def test_the_sdist_has_every_file_of_the_project(built: Built) -> None:
    assert set(files_of_the_project()) - names(built.sdist) == set()


def test_the_wheel_has_the_package_its_configurations_and_its_scripts(built: Built) -> None:
    assert names(built.wheel, "lorafair/conf/") == below(ROOT / "conf")
    assert names(built.wheel, "lorafair/slurm/") == below(ROOT / "slurm")
    assert names(built.wheel, "lorafair/profiles/") == below(ROOT / "profiles")
    shipped = ("conf/", "slurm/", "profiles/")
    package = {name for name in names(built.wheel, "lorafair/") if not name.startswith(shipped)}
    assert package == below(ROOT / "lorafair")
    assert {name.partition("/")[0] for name in names(built.wheel)} == {
        "lorafair",
        f"lorafair-{built.version}.dist-info",
    }


def test_the_same_wheel_from_a_checkout_and_from_an_sdist(built: Built) -> None:
    assert names(built.wheel) == names(built.wheel_of_tree)
    assert built.wheel.name == built.wheel_of_tree.name


def test_the_metadata_name_project_and_authors(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        metadata = wheel.read(f"lorafair-{built.version}.dist-info/METADATA").decode()
    for line in (
        "Name: lorafair", f"Version: {built.version}", "Author: lorafair contributors", "License-Expression: MIT",
        "Classifier: Typing :: Typed", "Requires-Python: >=3.11", "Provides-Extra: loggers", "Provides-Extra: export",
    ):  # fmt: skip
        assert f"{line}\n" in metadata
    for label, site in (("Repository", "github.com/lorafair"), ("Changelog", "github.com/lorafair"),
                        ("Documentation", "lorafair.readthedocs.io")):  # fmt: skip
        assert f"Project-URL: {label}, https://{site}/" in metadata


def test_the_version_tells_commits_and_changes_apart(built: Built, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    call("git", "clone", "--quiet", built.tree, clone, cwd=tmp_path)

    def version() -> str:
        return call(sys.executable, "setup.py", "--version", cwd=clone).splitlines()[-1]

    assert version() == built.version
    with (clone / "README.md").open("a") as file:
        file.write("more\n")
    assert version() == f"{built.version}.d"
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    call(*git, "commit", "--quiet", "--all", "--message=more", cwd=clone)
    assert version().startswith(f"{__version__}+g")
    assert version() != built.version
    shutil.rmtree(clone / ".git")
    assert version() == __version__


# The wheel in an empty folder


def test_run(run_dir: Path, built: Built) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    assert result["rounds"] == 1
    assert result["processes"] == 2
    assert built.version == f"{result['versions']['lorafair']}+g{result['versions']['commit']}"


def test_run_list_names_what_is_shipped(lorafair: Installed) -> None:
    listed = [line.split()[0] for line in lorafair("run", "--list").splitlines()]
    assert set(listed) == {name for name in below(ROOT / "conf") if name.endswith(".yaml")}


def test_version(lorafair: Installed, built: Built) -> None:
    number, _, commit = built.version.partition("+g")
    expected = f"lorafair {number} (commit {commit})\n"
    assert lorafair("--version") == expected
    assert call(lorafair.environment / "bin" / "python", "-m", "lorafair", "--version", cwd=lorafair.empty) == expected


def test_slurm(lorafair: Installed) -> None:
    script = lorafair("slurm", "synthetic.yaml", *SMALL)
    assert script.startswith("#!/bin/bash\n")
    assert f"{lorafair.environment}/bin/lorafair" in script
    assert f"cd {lorafair.empty}" in script or f"FOLDER={lorafair.empty}" in script


def test_slurm_of_a_comparison(lorafair: Installed) -> None:
    assert "#SBATCH --array=" in lorafair("slurm", "compare/label_skew")


def test_prepare(lorafair: Installed) -> None:
    assert "synthetic" in lorafair("prepare", "synthetic.yaml", *SMALL)


def test_doctor(lorafair: Installed) -> None:
    assert "2 ranks on cpu" in lorafair("doctor", "synthetic.yaml", *SMALL)


def test_export(lorafair: Installed, run_dir: Path) -> None:
    assert "timm.create_model(" in lorafair("export", run_dir, "out")
    assert (lorafair.empty / "out" / "model.safetensors").is_file()


# The sdist's own tests


def test_the_tests_of_the_sdist_run(built: Built) -> None:
    """All are found; those run here that read what is shipped, with the code of the sdist."""
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-o", "addopts=--strict-markers")
    collected = call(*pytest_, "--collect-only", cwd=built.unpacked)
    for file in below(ROOT / "tests"):
        if Path(file).name.startswith("test_"):
            assert f"tests/{file}::" in collected
    assert " passed" in call(*pytest_, "tests/files/test_shipped.py", cwd=built.unpacked)
    code = "import lorafair; print(lorafair.__file__)"
    assert call(sys.executable, "-c", code, cwd=built.unpacked).strip() == f"{built.unpacked}/lorafair/__init__.py"


# Nothing is changed


UNCHANGED = """
import logging, os, signal, sys, threading, warnings

def state():
    loggers = {name: (of.handlers, of.level) for name, of in logging.root.manager.loggerDict.items()
               if isinstance(of, logging.Logger) and (of.handlers or of.level)}
    return {
        "import hooks": (list(sys.meta_path), list(sys.path_hooks), list(sys.path)),
        "environment": dict(os.environ),
        "logging": (list(logging.root.handlers), logging.root.level, loggers),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "warnings": list(warnings.filters),
        "threads": threading.enumerate(),
        "streams and hooks": (sys.stdout, sys.stderr, sys.excepthook, sys.displayhook, threading.excepthook),
        "open files": sorted(os.listdir("/proc/self/fd")),
    }

os.environ.clear()  # it comes from the process of the tests, which has imported lorafair itself
before = state()
import lorafair
after = state()
for name, value in before.items():
    assert after[name] == value, f"import lorafair has changed {name}: {value} -> {after[name]}"
expected = {"lorafair", "__main__", "sitecustomize", *sys.stdlib_module_names}
imported = {name.partition(".")[0] for name in sys.modules} - expected
assert not imported, imported
"""


def test_importing_lorafair_changes_nothing(lorafair: Installed) -> None:
    assert call(lorafair.environment / "bin" / "python", "-c", UNCHANGED, cwd=lorafair.empty) == ""
    (packages,) = lorafair.environment.glob("lib/python*/site-packages")
    assert [file.name for file in packages.rglob("*.pth")] == ["of_the_tests.pth"]


def test_an_editable_install_is_a_path_and_no_code(built: Built, tmp_path: Path) -> None:
    wheel = zipfile.ZipFile(backend("build_editable", tmp_path, cwd=built.tree))
    outside = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert [Path(name).suffix for name in outside] == [".pth"]
    assert wheel.read(outside[0]).decode().splitlines() == [str(built.tree)]


def test_another_clone_runs_its_own_code(built: Built, tmp_path: Path) -> None:
    """In an environment in which the first clone is installed for development, on both processes of a run."""
    there = environment(tmp_path / "environment")
    pip("install", "--no-build-isolation", "--editable", built.tree, cwd=tmp_path, into=there)
    python, clone, marks = there / "bin" / "python", tmp_path / "clone", tmp_path / "marks"
    where = "import lorafair; print(lorafair.__file__)"
    assert call(python, "-c", where, cwd=tmp_path).strip() == f"{built.tree}/lorafair/__init__.py"
    assert "synthetic.yaml" in call(there / "bin" / "lorafair", "run", "--list", cwd=tmp_path)

    call("git", "clone", "--quiet", built.tree, clone, cwd=tmp_path)
    package = clone / "lorafair" / "__init__.py"
    edited = package.read_text().replace(f'__version__ = "{__version__}"', '__version__ = "edited"')
    package.write_text(f"{edited}\nimport os, pathlib\npathlib.Path(os.environ['MARKS'], str(os.getpid())).touch()\n")
    (clone / "script.py").write_text(where)
    marks.mkdir()
    assert call(python, "script.py", cwd=clone, MARKS=str(marks)).strip() == str(package)
    assert call(python, "train.py", "--version", cwd=clone, MARKS=str(marks)).startswith("lorafair edited")
    for mark in marks.iterdir():
        mark.unlink()
    run = ("run", "synthetic.yaml", *SMALL, f"run_dir={tmp_path / 'run'}")
    call(python, "-m", "lorafair", *run, cwd=clone, MARKS=str(marks), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert len(list(marks.iterdir())) >= 2

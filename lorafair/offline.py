"""What is fetched once from a package index and kept, so that later runs need no network.

Everything lies below `cache_dir()`. A folder there is either complete or absent.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import io
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lorafair.errors import LorafairError

_ONE_DAY = 86400.0  # seconds
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


class CacheError(LorafairError):
    """The cache folder cannot be written."""


class FetchError(LorafairError):
    """A package could not be fetched, or is not the one that was pinned."""


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/lorafair, or ~/.cache/lorafair; it need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lorafair"
    except RuntimeError as error:
        raise CacheError("there is no home folder to cache data in; set XDG_CACHE_HOME to a folder") from error


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `cache_dir()/name`, filled by `build(folder)` on first use.

    `build` gets an empty sibling folder, which is renamed when all of it is on the disk; a build that fails or is
    interrupted leaves nothing under the name. Processes of one machine wait for each other; where file locks do not
    reach (another node of a cluster), both build and the first to finish wins.

    Raises CacheError where the cache cannot be written, and whatever `build` raises.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    with _cache_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{name}.lock")):
            if not target.is_dir():
                _build(target, build)
    return target


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


def _build(target: Path, build: Callable[[Path], None]) -> None:
    _remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    partial.mkdir()  # not tempfile.mkdtemp: a shared cache keeps the permissions that the umask gives
    print(f"building {target} (once)", file=sys.stderr)
    try:
        build(partial)
        _flush(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another node was faster, and its folder is as good
                raise
        _fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Delete what killed builds left. Only after a day: another node may be building, unseen by the lock."""
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _ONE_DAY:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then both build
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cache_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise CacheError(
            f"{target} cannot be written ({error.strerror or error}); set XDG_CACHE_HOME to a folder with room for it"
        ) from error


def _flush(folder: Path) -> None:
    """Force all files to the disk, so that the rename cannot overtake their content in a crash."""
    for where, _, files in os.walk(folder):
        for file in files:
            _fsync(Path(where, file))
        _fsync(Path(where))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """The line of a package client's output that tells most: warnings and log locations come before and after it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "npm error", "npm err!"))]
    return next(iter(errors or lines[-1:]), "no message")

"""Decisions about the structure that a careless change would undo."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lorafair"

# A part of the package, a file or a folder, may import what stands before it.
ORDER = [
    "errors", "console", "third_party", "registry", "files", "config", "cluster", "seeding", "virtual_time", "model",
    "data", "schedule", "aggregation", "communication", "caching", "evaluation", "checkpointing", "privacy",
    "experiment",
    "server", "client", "reporting", "federation", "launch", "comparison", "commands", "cli", "__main__",
]  # fmt: skip
ROOMS = 29  # parts of the package, __init__.py among them
# Nothing heavy may be imported by these: a mistake is found, and a list printed, in a fraction of a second.
LIGHT = ("errors", "console", "third_party", "registry", "files", "config", "cluster", "launch", "cli")


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[str]:
    yield from imports_in(ast.parse(file.read_text()))


def imports_in(tree: ast.AST, *, deep: bool = True) -> Iterator[str]:
    for node in ast.walk(tree) if deep else [tree]:
        if isinstance(node, ast.ImportFrom) and node.module == "lorafair":
            yield from (f"lorafair.{alias.name}" for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    mine = ORDER.index(part_of(file))
    for name in imports_of(file):
        parts = name.split(".")
        if parts[0] == "lorafair" and len(parts) > 1:
            assert ORDER.index(parts[1]) <= mine, f"{file.name} imports {name}"


def test_every_part_has_its_place_and_there_are_few() -> None:
    parts = {part_of(file) for file in MODULES}
    assert parts == set(ORDER)
    assert len(parts) + 1 <= ROOMS


def test_files_state_their_subject_in_the_first_line() -> None:
    for file in MODULES:
        first = file.read_text().splitlines()[0]
        assert first.startswith('"""'), file
        assert len(first) > 20, file


def test_light_parts_import_nothing_heavy() -> None:
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in MODULES if part_of(f) in LIGHT]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        f"for name in {names!r}: __import__(name)\n"
        "import sys\n"
        "heavy = 'torch', 'numpy', 'lightning', 'lightning_fabric', 'timm', 'scipy', 'matplotlib'\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_lightning_is_imported_where_it_is_used() -> None:
    """It takes seconds; everywhere else its names are for types alone."""
    for file in MODULES:
        tree = ast.parse(file.read_text())
        typed = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        for_types = {name for node in typed for name in imports_in(node)}
        at_top = {name for node in tree.body if not isinstance(node, ast.If) for name in imports_in(node, deep=False)}
        assert not [name for name in at_top - for_types if name.split(".")[0].startswith("lightning")], file


def test_tests_mirror_the_package() -> None:
    """A folder of tests has the name of a part, or of something beside the package that is tested."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*ORDER, "slurm"}


@pytest.mark.slow
def test_importing_does_nothing() -> None:
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in MODULES]
    code = (
        "import torch\n"
        "before = torch.random.get_rng_state()\n"
        f"for name in {modules!r}: __import__(name)\n"
        "import torch.distributed as dist\n"
        "assert torch.equal(before, torch.random.get_rng_state()), 'a global random number was drawn'\n"
        "assert not dist.is_initialized(), 'a process group was opened'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_no_module_draws_from_a_global_generator() -> None:
    """`seeded` everywhere; timm's initial weights are the exception, drawn in a fork of the global generator."""
    allowed = {"seeding.py": {"default_rng", "manual_seed"}, "backbone.py": {"manual_seed", "fork_rng"}}
    forbidden = {"default_rng", "manual_seed", "manual_seed_all", "seed_everything", "fork_rng", "RandomState"}
    for file in MODULES:
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not (names & forbidden) - allowed.get(file.name, set()), file

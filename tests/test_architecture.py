"""Decisions about the structure that a careless change would undo."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lorafair"

# A part may import what stands before it. A folder is one part.
ORDER = [
    "errors", "torchvision_import", "config", "cluster", "interruption", "watchdog", "tables", "comparison",
    "submission", "seeding", "adapter", "schedule", "server_optimizer", "control_variates", "offline", "weights",
    "data", "aggregation",
    "lora", "models", "client", "exchange", "tracking", "shared_array", "staging", "image_cache", "prefix_cache",
    "evaluation", "checkpoint", "partial_round", "assembly", "report", "federation", "comparison_findings",
    "comparison_plots", "comparison_report", "comparison_run", "export", "preparation", "doctor", "cli",
]  # fmt: skip
KNOW_FABRIC = {
    "exchange", "shared_array", "staging", "image_cache", "prefix_cache", "evaluation", "assembly", "report",
    "federation", "comparison_run", "doctor",
}  # fmt: skip


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
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


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_few_parts_know_fabric(file: Path) -> None:
    if part_of(file) not in KNOW_FABRIC:
        assert not [name for name in imports_of(file) if name.split(".")[0] == "lightning"]


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
    allowed = {"seeding.py": {"default_rng", "manual_seed"}, "models.py": {"manual_seed", "fork_rng"}}
    forbidden = {"default_rng", "manual_seed", "manual_seed_all", "seed_everything", "fork_rng", "RandomState"}
    for file in MODULES:
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not (names & forbidden) - allowed.get(file.name, set()), file

"""The documentation says what is true: its commands and snippets run, and its reference is complete."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafair
from lorafair import cli, registry
from lorafair.comparison.section import load_comparison
from lorafair.config.loading import load_config
from lorafair.config.options import group_of
from lorafair.errors import ConfigError
from tests import test_cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MEASURED = ("results.md", "results_older.md", "performance.md")
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.name not in MEASURED]
PAGES.append(ROOT / "README.md")
SMALL = ["rounds=1", "fabric.devices=1", "data.train_images=24", "data.test_images=24", "data.cache=never"]
WRITTEN = re.compile(r"^%%writefile (\S+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PLUGIN = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files of all pages in it; what plug-ins of them register is taken back."""
    monkeypatch.chdir(tmp_path)
    for text in [page.read_text(encoding="utf-8") for page in PAGES]:
        for name, code in [*PLUGIN.findall(text), *WRITTEN.findall(text)]:
            (tmp_path / name).write_text(code)
    before = {kind: set(names.names) for kind, names in registry.REGISTRIES.items()}
    yield tmp_path
    for kind, names in registry.REGISTRIES.items():
        for name in set(names.names) - before[kind]:
            names.remove(name)


@pytest.mark.slow
def test_the_commands_of_all_pages_are_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: set[tuple[str, ...]] = set()

    def once(configuration: list[str]) -> object:  # a comparison of a hundred runs takes seconds to check
        files = tuple(word.removeprefix("conf/") for word in configuration)
        if files not in checked and not files[0].startswith("runs/"):
            checked.add(files)
            if load_comparison(configuration) is None:
                load_config(configuration)
        return files

    monkeypatch.setattr(test_cli, "load_comparison", once)
    wrong: dict[str, str] = {}
    found = [(page.name, arguments) for page in PAGES for arguments in test_cli.commands(page.read_text("utf-8"))]
    assert len(found) >= 40
    for page, arguments in found:
        try:
            test_cli.parsed(arguments)
        except ConfigError as error:
            wrong[f"{page}: {shlex.join(arguments)}"] = str(error)
    assert wrong == {}


@pytest.mark.slow
def test_the_cheap_commands_of_the_pages_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those on made-up images, what reads their results, and what prints tables."""
    done = []
    for page in ("../README.md", "howto/run.md", "howto/loggers.md", "howto/extend.md", "howto/export.md"):
        for arguments in test_cli.commands(text_of(page)):
            line = shlex.join(arguments)
            runs = arguments[0] == "run" and "synthetic" in line and "plugins" not in line
            if (
                "wandb" in line
                or "mlflow" in line
                or not (runs or arguments[0] in ("--version", "export", "options", "methods"))
            ):
                continue
            assert cli.main([*arguments, *(SMALL if runs else ())]) == 0, f"{page}: {line}"
            done.append(arguments[0])
    assert {"run", "export", "options", "methods"} <= set(done), done
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["../README.md", "howto/run.md", "howto/export.md", "howto/loggers.md", "reference/python.md"]
)
def test_the_snippets_of_a_page_run(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    assert snippets
    for code in snippets:
        exec(compile(code.replace('"rounds=3"', ", ".join(map(repr, SMALL))), page, "exec"), {"lorafair": lorafair})


def test_the_readme_can_be_followed_from_top_to_bottom() -> None:
    """No line asks a run of a line above it for fewer rounds, which is an error."""
    text = text_of("../README.md")
    lines = [arguments[1:] for arguments in test_cli.commands(text) if arguments[0] == "run"]
    snippets = re.findall(r"^[^#\n]*lorafair\.run\(([^)]*)\)", text, re.MULTILINE)
    assert lines
    assert snippets
    done: dict[str, int] = {}
    for configuration in [*lines, *(list(ast.literal_eval(f"({given},)")) for given in snippets)]:
        config = load_config(configuration)
        assert config.rounds >= done.setdefault(config.run_dir, config.rounds), configuration


def test_every_public_name_is_in_the_reference() -> None:
    page = text_of("reference/python.md")
    configs = {group_of(field) for field in all_fields(lorafair.Config)} | {lorafair.Config}
    missing = [
        name
        for name in lorafair.__all__
        if getattr(lorafair, name) not in configs and not re.search(rf":: lorafair\.{name}$", page, re.MULTILINE)
    ]
    assert missing == []


def all_fields(owner: type) -> list[dataclasses.Field[object]]:
    fields = list(dataclasses.fields(owner))
    return fields + [inner for field in fields if (group := group_of(field)) for inner in all_fields(group)]


def test_every_method_of_the_reference_is_called_by_its_name() -> None:
    """Those without a section get one from the code when the site is built."""
    page = text_of("reference/methods.md")
    sections = re.findall(
        r"^\(method-(\w+)\)=\n## [^\n]+\n\n`(\w+)`\. .*?^```\{lorafair-method\} (\w+)", page, re.M | re.S
    )
    assert len(sections) == page.count("(method-") >= 17
    assert all(one == two == three for one, two, three in sections)
    assert {name for name, *_ in sections} <= set(registry.METHODS.names)


def test_no_picture_of_the_documentation_is_large() -> None:
    files = [file for file in DOCS.rglob("*") if file.is_file()]
    assert {file.name: file.stat().st_size for file in files if file.stat().st_size > 300_000} == {}

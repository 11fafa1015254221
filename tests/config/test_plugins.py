"""Plug-ins: where their files are looked for, what cannot be imported, and the names they bring."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from lorafair import registry
from lorafair.config.loading import load_config, settle, to_yaml
from lorafair.config.schema import Config
from lorafair.errors import ConfigError

METHOD = """
from dataclasses import dataclass
import lorafair
from lorafair.aggregation.fedit import FedIT

@lorafair.register_method("mine")
@dataclass(frozen=True)
class Mine(FedIT):
    strength: float = lorafair.option(1.0, "How much.", above=0)
"""
EVERYTHING = f"""
{METHOD}
@lorafair.register_source("my_images", domains=("left", "right"))
def my_images(config, seed): ...

@lorafair.register_partition("my_split")
def my_split(config, labels, domains, names, seed): ...

@lorafair.register_metric("my_metric")
def my_metric(classes): ...

@lorafair.register_backbone("my_model", head="head", image_size=8)
def my_model(config): ...

@lorafair.register_callback("my_callback")
class MyCallback(lorafair.Callback): ...

@lorafair.register_logger("my_logger")
def my_logger(run_dir, path="x"): ...
"""


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Take back what a test has registered."""
    before = {kind: set(names.names) for kind, names in registry.REGISTRIES.items()}
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("my_module", None)
    for kind, names in registry.REGISTRIES.items():
        for name in set(names.names) - before[kind]:
            names.remove(name)


def test_a_file_beside_the_yaml_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "study", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir()
    (folder / "mine.py").write_text(METHOD)
    (folder / "run.yaml").write_text("plugins: [./mine.py]\nmethod: {name: mine, strength: 2}\n")
    monkeypatch.chdir(elsewhere)
    config = load_config("../study/run.yaml")
    assert config.plugins == (str(folder / "mine.py"),)
    assert registry.METHODS.is_from_plugin("mine")
    assert registry.loaded_files()[-1] == str(folder / "mine.py")
    (elsewhere / "config.yaml").write_text(to_yaml(config))
    monkeypatch.chdir("/")
    assert load_config(elsewhere / "config.yaml") == config, "the run's own config.yaml finds it from anywhere"


@pytest.mark.slow
def test_a_file_is_found_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "run.yaml").write_text("plugins: [mine.py]\n")
    monkeypatch.chdir(tmp_path)
    whole = (str(tmp_path / "mine.py"),)
    assert load_config("conf/run.yaml").plugins == whole
    assert load_config("plugins=[./mine.py]").plugins == whole
    assert load_config(plugins=["mine.py"]).plugins == whole
    assert settle(Config(plugins=("./mine.py",), method={"name": "mine"})).plugins == whole


def test_a_package_is_named_by_its_folder_and_a_module_is_found_beside_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "study", tmp_path / "elsewhere"
    for made in (folder / "package", elsewhere):
        made.mkdir(parents=True)
    (folder / "package" / "__init__.py").write_text("from . import methods\n")
    (folder / "package" / "methods.py").write_text(METHOD)
    monkeypatch.chdir(elsewhere)
    for written in ("./package", "package"):
        (folder / "run.yaml").write_text(f"plugins: [{written}]\nmethod: {{name: mine, strength: 2}}\n")
        config = load_config("../study/run.yaml")
        assert config.plugins == (str(folder / "package"),)
        assert registry.METHODS.is_known_to_others("mine", config.plugins)
        assert (
            registry.METHODS.source_sha256("mine")
            == sha256((folder / "package" / "methods.py").read_bytes()).hexdigest()
        )


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "strength_of_mine.py").write_text("STRENGTH = 3.0")
    (tmp_path / "mine.py").write_text(f"from strength_of_mine import STRENGTH\n{METHOD.replace('1.0', 'STRENGTH')}")
    load_config(f"plugins=[{tmp_path / 'mine.py'}]", "method.name=mine")
    assert registry.METHODS["mine"]().strength == 3


def test_a_module_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    assert load_config("plugins=[my_module]", "method.name=mine").plugins == ("my_module",)


@pytest.mark.parametrize(
    ("plugin", "content", "message"),
    [
        ("./none.py", None, r"^plugins: there is no file \./none\.py in .*; name a \.py file, a folder with an"),
        ("folder/none", None, r"^plugins: there is no file folder/none in "),
        ("no_such_module", None, r"^plugins: no_such_module cannot be imported: ModuleNotFoundError: No module named"),
        ("broken.py", "1 / 0", r"^plugins: .*/broken\.py cannot be imported: ZeroDivisionError: division by zero$"),
        ("broken.py", "def (", r"^plugins: .*/broken\.py cannot be imported: SyntaxError: "),
        (
            "taken.py",
            METHOD.replace('"mine"', '"fedit"'),
            r"^plugins: .*/taken\.py: there is a method fedit already, of lorafair; register yours",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(
    plugin: str, content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / plugin).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(f"plugins=[{plugin}]")
    assert "\n" not in str(caught.value)


def test_a_file_that_failed_is_imported_again_once_it_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_config(f"plugins=[{file}]")
    file.write_text(METHOD)
    assert load_config(f"plugins=[{file}]", "method.name=mine").method == {"name": "mine"}


def test_every_kind_of_name_can_be_brought(tmp_path: Path) -> None:
    file = tmp_path / "everything.py"
    file.write_text(EVERYTHING)
    pairs = [
        f"plugins=[{file}]", "method.name=mine", "method.strength=3", "data.source=my_images", "data.options={size: 4}",
        "data.root=/anywhere", "partition.scheme=my_split", "partition.clients=4", "partition.options.skew=2",
        "model.name=my_model", "model.options.width=8", "evaluation.metrics=[my_metric]", "callbacks=[my_callback]",
        "loggers={my_logger: {path: y}}",
    ]  # fmt: skip
    config = load_config(pairs)
    assert config.data.options == {"size": 4}
    assert config.partition.clients == 4, "a plug-in's partition may take any of the shipped options"
    assert config.partition.alpha is None, "and none is filled in for it"
    assert config.loggers == {"my_logger": {"path": "y"}}
    for pair in ("evaluation.metrics=[other]", "callbacks=[other]", "loggers={other: {}}", "data.source=other"):
        with pytest.raises(ConfigError, match=rf"^{pair.partition('=')[0]}=other is unknown; "):
            load_config([*pairs, pair])


def test_without_the_plugin_its_names_and_free_options_are_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"^data\.source=my_images is unknown; .*data sources: glyph_domains"):
        load_config("data.source=my_images")
    with pytest.raises(ConfigError, match=r"^evaluation\.metrics=my_metric is unknown; metrics: none is registered"):
        load_config("evaluation.metrics=[my_metric]")
    for group, chosen in (("data", "glyph_domains"), ("partition", "domain"), ("model", "vit_base_patch16_224")):
        with pytest.raises(ConfigError, match=rf"^{group}\.options=.* has no effect: .*, and {chosen} is not$"):
            load_config(f"{group}.options={{size: 4}}")


def test_a_name_can_be_registered_again_by_its_own_definition_only(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    for file in (first, second):
        file.write_text(METHOD)
    assert load_config(f"plugins=[{first}]", "method.name=mine") == load_config(
        f"plugins=[{first}]", "method.name=mine"
    )
    message = r"^plugins: .*/second\.py: there is a method mine already, Mine in .*/first\.py; register yours under"
    with pytest.raises(ConfigError, match=message):
        load_config(f"plugins=[{first}, {second}]")


def test_a_package_that_python_has_imported_may_be_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same definition by two names: no mistake, and processes that import the path have it."""
    (tmp_path / "my_module").mkdir()
    (tmp_path / "my_module" / "__init__.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_module")
    path = str(tmp_path / "my_module")
    assert load_config(f"plugins=[{path}]", "method.name=mine").method == {"name": "mine"}
    importlib.reload(sys.modules["my_module"])
    assert registry.METHODS.is_known_to_others("mine", [path])
    assert not registry.METHODS.is_known_to_others("mine", [str(tmp_path / "other")])


def test_an_empty_group_takes_back_what_a_file_has_set(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("loggers: {csv: {name: mine}}\n")
    assert load_config(file).loggers == {"csv": {"name": "mine"}}
    assert load_config(file, "loggers={}").loggers == {}
    assert load_config(file, loggers={}).loggers == {}


def test_a_plugin_that_leaves_is_named(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=r"^plugins: .*/leaving\.py cannot be imported: SystemExit: 3$"):
        load_config(f"plugins=[{tmp_path / 'leaving.py'}]")

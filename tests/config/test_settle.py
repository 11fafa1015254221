"""Configurations from Python: the same checks, the same completion and the same result as from YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lorafair.config.loading import load_config, settle, to_yaml
from lorafair.config.schema import (
    ClientConfig,
    Config,
    DataConfig,
    FabricConfig,
    LoRAConfig,
    ModelConfig,
    PartitionConfig,
    ServerConfig,
)
from lorafair.errors import ConfigError

# The same values as a Config and as key=value pairs.
ALIKE: dict[str, tuple[Config, list[str]]] = {
    "defaults": (Config(), []),
    "method": (
        Config(rounds=3, seed=7, method={"name": "lora_fair", "solver": "sgd"}),
        ["rounds=3", "seed=7", "method.name=lora_fair", "method.solver=sgd"],
    ),
    "conditions": (
        Config(
            partition=PartitionConfig(scheme="dirichlet", alpha=0.3),
            client=ClientConfig(schedule="cosine", steps=5, learning_rate=1),
            server=ServerConfig(optimizer="fedadam"),
        ),
        ["partition.scheme=dirichlet", "partition.alpha=0.3", "client.schedule=cosine", "client.steps=5",
         "client.learning_rate=1", "server.optimizer=fedadam"],
    ),
    "lists and paths": (
        Config(run_dir=Path("x/y"), data=DataConfig(source="folder", root=Path("/data"), domains=("b", "a"))),
        ["run_dir=x/y", "data.source=folder", "data.root=/data", "data.domains=[b, a]"],
    ),
    "ranks": (
        Config(model=ModelConfig(lora=LoRAConfig(rank=4, client_ranks=(4, 2)))),
        ["model.lora.rank=[4, 2]"],
    ),
    "numbers of numpy": (
        Config(rounds=np.int64(3), data=DataConfig(domains=np.array(["a", "b"]))),  # type: ignore[arg-type]
        ["rounds=3", "data.domains=[a, b]"],
    ),
    "levels": (
        Config(model=ModelConfig(lora=LoRAConfig(rank={4: 0.5, 2: 0.5}))),  # type: ignore[arg-type]
        ["model.lora.rank={4: 0.5, 2: 0.5}"],
    ),
    "spellings": (
        Config(fabric=FabricConfig(accelerator="gpu", precision="bf16", devices="auto")),  # type: ignore[arg-type]
        ["fabric.accelerator=gpu", "fabric.precision=bf16", "fabric.devices=auto"],
    ),
    "plain groups": (Config(client={"steps": 5}), ["client.steps=5"]),  # type: ignore[arg-type]
    "loggers": (Config(loggers={"csv": {"name": "table"}}), ["loggers.csv.name=table"]),
}  # fmt: skip

ROOT_OF = {"paper/domainnet_vit_label_skew.yaml": {"data.root": "/data"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_a_configuration_made_in_python_is_completed_as_one_from_pairs(name: str) -> None:
    made, pairs = ALIKE[name]
    assert settle(made) == load_config(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_what_is_settled_stays_as_it_is(name: str) -> None:
    once = settle(ALIKE[name][0])
    assert settle(once) == once
    assert isinstance(once.run_dir, Path)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Config(rounds=0), r"^rounds=0 is out of range: it must be at least 1$"),
        (Config(method={"name": "fedavg"}), r"^method\.name=fedavg is unknown; did you mean fedit\?"),
        (Config(method="fedit"), r"^method=fedit: .*set method\.name=fedit$"),  # type: ignore[arg-type]
        (Config(client=ClientConfig(optimizer="adam")), r"optimizer=adam .* mean adamw\?"),  # type: ignore[arg-type]
        (Config(client=ClientConfig(learning_rate="fast")), r"^client\.learning_rate: "),  # type: ignore[arg-type]
        (Config(client=ClientConfig(epochs=3, steps=2)), r"^client\.epochs=3 has no effect: it needs no client\.steps"),
        (Config(client={"stepz": 2}), r"^there is no option client\.stepz"),  # type: ignore[arg-type]
        (Config(data=DataConfig(source="folder")), r"^data\.root is missing"),
        (Config(data=DataConfig(domains=("a", "a"))), r"^data\.domains=\['a', 'a'\]: name each one once"),
        (Config(data=DataConfig(domains="a")), r"^data\.domains=a must be a list"),  # type: ignore[arg-type]
        (Config(callbacks=("mine",)), r"^callbacks=mine is unknown"),
        (Config(plugins=("./nowhere.py",)), r"^plugins: there is no file \./nowhere\.py in "),
        (Config(method={"name": "fedit", "x": object()}), r"^method=.* is not a supported primitive type$"),
    ],
)
def test_a_mistake_in_python_is_the_same_line(made: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settle(made)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"rounds": 3}, ["rounds=3"]),
        ({"client": {"steps": 5, "learning_rate": 0.2}}, ["client.steps=5", "client.learning_rate=0.2"]),
        ({"client": ClientConfig(steps=5)}, ["client.steps=5"]),
        ({"model": {"lora": LoRAConfig(rank=4)}}, ["model.lora.rank=4"]),
        ({"model.lora": {"rank": 4}}, ["model.lora.rank=4"]),
        ({"method.name": "fedit"}, ["method.name=fedit"]),
        ({"method": {"name": "lora_fair", "solver": "sgd"}}, ["method.name=lora_fair", "method.solver=sgd"]),
        ({"data.domains": ("a", "b"), "run_dir": Path("x")}, ["data.domains=[a, b]", "run_dir=x"]),
        ({"fabric.accelerator": "gpu"}, ["fabric.accelerator=cuda"]),
    ],
)  # fmt: skip
def test_options_are_values_like_any(options: Mapping[str, Any], pairs: list[str]) -> None:
    assert load_config(**options) == load_config(pairs)


def test_options_win_over_pairs_and_pairs_over_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rounds: 3\nseed: 5\nclient: {steps: 7, batch_size: 9}\nmethod: {name: lora_fair, solver: sgd}\n")
    config = load_config(file, ["rounds=4", "client.batch_size=8"], rounds=5, client={"learning_rate": 0.5})
    assert (config.seed, config.rounds) == (5, 5)
    assert (config.client.steps, config.client.batch_size, config.client.learning_rate) == (7, 8, 0.5)
    assert config.run_dir == Path("runs/run/lora_fair-seed5")
    assert load_config(file, **{"method.name": "fedit"}).method == {"name": "fedit"}, "options of another method drop"
    assert load_config(str(file), "rounds=4") == load_config([str(file), "rounds=4"]) == load_config(file, rounds=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, r"^there is no option lr; did you mean client\.learning_rate=0\.1\?"),
        ({"client": {"lr": 0.1}}, r"^there is no option client\.lr; did you mean client\.learning_rate=0\.1\?"),
        ({"client.steps.x": 1}, r"^there is no option client\.steps\.x: client\.steps is a value"),
        ({"client": 3}, r"^client=3: client is a group of options"),
        ({"rounds": object()}, r"^rounds=<object .* is not a supported primitive type"),
    ],
)
def test_a_mistake_in_an_option_is_one_line_that_names_the_key(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALIKE, "demo.yaml", *ROOT_OF])
def test_the_yaml_of_a_configuration_is_plain_and_gives_it_back(name: str, tmp_path: Path) -> None:
    config = settle(ALIKE[name][0]) if name in ALIKE else load_config(name, **ROOT_OF.get(name, {}))
    text = to_yaml(config)
    read = yaml.safe_load(text)
    assert list(read) == [declared.name for declared in dataclasses.fields(Config)], "every group, in its order"
    assert read["run_dir"] == str(config.run_dir)
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == config

"""The configuration: layers of values, and one clear line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorafair.config.loading import load_config, load_config_of_run, settle, to_yaml
from lorafair.config.schema import Config
from lorafair.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_later_values_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("rounds: 3\nclient: {learning_rate: 0.1, batch_size: 8}\n")
    second.write_text("client: {learning_rate: 0.2}\n")
    config = load_config([str(first), str(second), "client.batch_size=4"])
    assert (config.rounds, config.client.learning_rate, config.client.batch_size) == (3, 0.2, 4)
    assert config.run_dir == Path("runs/first/lora_fair-seed0")


def test_the_resolved_configuration_is_itself_runnable(tmp_path: Path) -> None:
    config = load_config(["partition.scheme=dirichlet", "client.steps=7", "method.solver=sgd", "data.domains=[b, a]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "config.yaml")]) == config


def test_what_is_typed_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML would cut a text at ` #`, and take `a: b` for a group."""
    for text in ("runs/try #2", "runs/a: b", "runs/@x", "runs/lr=0.1", "runs/%j"):
        assert load_config(f"run_dir={text}").run_dir == Path(text)
    assert load_config("rounds=7 # of them").rounds == 7
    assert load_config('run_dir="runs/a b"', "data.domains=[a, b]").run_dir == Path("runs/a b")
    file = tmp_path / "lr=0.1.yaml"
    file.write_text("rounds: 3\n")
    assert load_config(file).rounds == 3


def test_a_mode_of_inductor_needs_inductor() -> None:
    assert load_config("model.compile=inductor", "model.compile_mode=max-autotune").model.compile_mode == "max-autotune"
    for given in ([], ["model.compile=eager"]):
        with pytest.raises(ConfigError, match=r"^model\.compile_mode=max-autotune "):
            load_config("model.compile_mode=max-autotune", *given)


def test_a_path_is_expanded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = load_config("run_dir=~/runs/one", "resume=~/runs/two", "model.weights=~/vit.pth", "data.stage=~/s")
    assert (config.run_dir, config.resume) == (Path("/home/me/runs/one"), "/home/me/runs/two")
    assert (config.model.weights, config.data.stage) == ("/home/me/vit.pth", "/home/me/s")
    assert settle(Config(run_dir=Path("~/x"))).run_dir == Path("/home/me/x")
    file = tmp_path / "mine.yaml"
    file.write_text("run_dir: ${oc.env:SCRATCH}/runs\n")
    assert load_config(file).run_dir == Path("/scratch/runs")
    file.write_text("run_dir: $SCRATCH/runs\n")
    message = r"^run_dir=\$SCRATCH/runs: \$SCRATCH is not expanded here; .* in YAML write \$\{oc\.env:SCRATCH\}$"
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_run_directory_that_was_moved_says_which_one_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.yaml names where it was: the run there would go on, or begin anew."""
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    (new / "config.yaml").write_text(f"# lorafair 0.2.0\nmethod: {{name: fedit}}\nrun_dir: {old}\n")
    assert load_config(new / "config.yaml").run_dir == old  # a file alone, kept for the next run
    (new / "metrics.csv").touch()
    with pytest.raises(ConfigError, match=f"moved or copied from there.*: run_dir={new} or run_dir={old}$"):
        load_config(new / "config.yaml")
    assert load_config(new / "config.yaml", f"run_dir={new}").run_dir == new
    assert load_config_of_run(new).run_dir == new
    (new / "config.yaml").write_text("# lorafair 0.2.0\nmethod: {name: fedit}\nrun_dir: new\n")
    with pytest.raises(ConfigError, match="or begun in another working directory"):
        load_config(new / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("new/config.yaml").run_dir == Path("new")


def test_keys_with_dots_in_a_file_are_groups(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model.lora.rank: 4\nmodel: {lora: {alpha: 8}, lora.dropout: 0.5}\nmethod.name: fedit\n")
    config = load_config(file)
    assert (config.model.lora.rank, config.model.lora.alpha, config.model.lora.dropout) == (4, 8, 0.5)
    assert config.method == {"name": "fedit"}
    file.write_text("model.lora.rank: 4\nmodel: {lora: {rank: 8}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: model\.lora\.rank is given twice$"):
        load_config(file)


def test_selecting_another_method_drops_the_options_of_the_former(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: {name: lora_fair, solver: sgd}\n")
    assert load_config([str(file), "method.name=fedit"]).method == {"name": "fedit"}
    assert load_config([str(file), "method.regularization=0"]).method["solver"] == "sgd"


def test_ranks_are_one_number_a_list_or_a_distribution(tmp_path: Path) -> None:
    def ranks(*arguments: str) -> tuple[int, tuple[int, ...] | None, tuple[float, ...] | None]:
        lora = load_config(arguments).model.lora
        return lora.rank, lora.client_ranks, lora.client_rank_probabilities

    assert ranks("model.lora.rank=7") == (7, None, None)
    assert ranks("model.lora.rank=[4, 2, 1]") == (4, (4, 2, 1), None)
    file = tmp_path / "mixed.yaml"
    file.write_text("model: {lora: {rank: {4: 0.5, 16: 0.3, 8: 0.2}}}\n")
    assert ranks(str(file)) == (16, (4, 16, 8), (0.5, 0.3, 0.2))
    assert ranks(str(file), "model.lora.rank=[1, 2]") == (2, (1, 2), None)
    with pytest.raises(ConfigError, match=r"model\.lora\.rank=8 would leave model\.lora\.client_ranks=\[4, 16, 8\]"):
        ranks(str(file), "model.lora.rank=8")
    # s = alpha / 2 of all clients, instead of alpha / 4
    assert ranks("model.lora.rank=4", "model.lora.client_ranks=[2, 2]", "model.lora.client_scaling=own")[1] == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.lora.rank=[4, x]"], r"model\.lora\.rank=.* must be a whole number, a list of them, or a distribution"),
        (["model.lora.rank=[4, 2]", "model.lora.client_ranks=[1]"], r"gives the ranks of clients already"),
        (
            ["model.lora.rank=[4, 4]", "model.lora.client_scaling=own"],
            r"model\.lora\.client_scaling=own has no effect: all model\.lora\.client_ranks are model\.lora\.rank=4$",
        ),
        (["client.optimizr=sgd"], r"no option client\.optimizr; did you mean client\.optimizer\?"),
        (["clint.optimizer=sgd"], r"no option clint; did you mean client\? options: seed, rounds"),
        (["client.optimizer=lion"], r"client\.optimizer=lion is not possible; possible: sgd, adamw$"),
        (["rounds=many"], r"rounds: Value 'many'"),
        (["data.train_images="], r"^data\.train_images= has no value: a variable of the shell may not be set"),
        (["run_dir= "], r"^run_dir= has no value"),
        (["rounds=0"], r"rounds=0 is out of range: it must be at least 1"),
        (["client.learning_rate=nan"], r"client\.learning_rate=nan is out of range"),
        (["client.momentum=1.5"], r"client\.momentum=1\.5 is out of range: .* up to but not including 1"),
        (["checkpoint.keep=1"], r"checkpoint\.keep=1 is out of range: it must be at least 2"),
        (["client=3"], r"client=3: client is a group of options; set client\.optimizer, "),
        (["method=fedit"], r"method=fedit: .*set method\.name=fedit"),
        (["method=[a]"], r"method=\['a'\]: method is a group of options"),
        (["method.name=3"], r"method\.name=3 is no name"),
        (["data=3", "data.source=synthetic"], r"data=3: data is a group of options"),
        (["rounds.x=1"], r"no option rounds\.x: rounds is a value, not a group"),
        (["seed=???"], r"seed=\?\?\? has no value"),
        (["data.domains=serif"], r"data\.domains=serif must be a list: data\.domains=\[serif\]"),
        (["model.lora.targets=[[a]]"], r"model\.lora\.targets=.*give names"),
        (["method.name=null"], r"method\.name is missing"),
        (["model.lora.targets=qkv"], r"model\.lora\.targets=qkv must be a list"),
        (["model.lora.targets=[qkv, qkv]"], r"name each one once"),
        (["run_dir=${oops}"], r"run_dir: .*oops"),
        (["model.lora.rank=[1"], r"model\.lora\.rank=\[1: "),
        (["conf/none.yaml"], r"conf/none\.yaml is neither a YAML file that exists nor a key=value pair"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)


def test_unreadable_yaml_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("rounds: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not readable YAML"):
        load_config([str(broken)])
    broken.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold keys and values"):
        load_config([str(broken)])
    broken.write_text("rounds: 3\nrouns: 4\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml: there is no option rouns; did you mean rounds\?"):
        load_config([str(broken)])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["partition.alpha=0.3"], "partition.alpha"),
        (["partition.clients=3"], "partition.clients"),
        (["client.optimizer=adamw", "client.momentum=0.5"], "client.momentum"),
        (["client.steps=5", "client.epochs=2"], "client.epochs"),
        (["data.root=/tmp"], "data.root"),
    ],
)
def test_a_setting_without_effect_is_an_error(arguments: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.* has no effect: it needs"):
        load_config(arguments)


def test_conditional_options_get_their_default_when_they_apply() -> None:
    config = load_config(["partition.scheme=dirichlet"])
    assert (config.partition.clients_per_domain, config.partition.alpha, config.partition.clients) == (5, 0.5, None)
    with pytest.raises(ConfigError, match=r"data\.root is missing"):
        load_config(["data.source=folder"])


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_configuration_loads_and_starts_with_its_command(file: Path) -> None:
    first_line = file.read_text().splitlines()[0]
    assert first_line.startswith("# python train.py ")
    arguments = first_line.split()[3:]
    assert f"conf/{file.name}" in arguments
    load_config([str(ROOT / a) if a.endswith(".yaml") else a for a in arguments])


def test_a_mistake_is_found_before_torch_is_imported() -> None:
    code = (
        "import sys; from lorafair.config import load_config\n"
        "try: load_config(['rounds=0'])\n"
        "except Exception as error: print(error)\n"
        "print([m for m in ('torch', 'timm', 'lightning') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.splitlines() == ["rounds=0 is out of range: it must be at least 1", "[]"]

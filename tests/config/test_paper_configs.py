"""The configurations in conf/paper: complete, of the paper's protocol, and runnable on folders as the data sets lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning_fabric import Fabric
from PIL import Image

from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.registry import method_of
from lorafair.commands.checks import check_comparison
from lorafair.comparison.plan import Comparison
from lorafair.comparison.section import load_comparison
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.federation import run_federation
from lorafair.seeding import seeded_numpy
from tests.conftest import launched

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "conf" / "paper").glob("*.yaml"))
COMPARISONS = [file for file in FILES if file.stem.startswith(("ablation_", "compare_"))]
RELEASED = ROOT / "conf" / "paper" / "released_code.yaml"  # goes over a setting
SETTINGS = [file for file in FILES if file not in COMPARISONS and file != RELEASED]

DOMAINS = {
    "domainnet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    "nico": ("autumn", "dim", "grass", "outdoor", "rock", "water"),
}
CLASSES = 3
TRAIN_IMAGES, TEST_IMAGES = 10, 1  # of a class in a domain: 30 a domain, enough for ten clients


def tiny(stem: str) -> list[str]:
    """What makes a setting small: other images, another model, one round."""
    mixer = "mixer" in stem
    pairs = [
        "rounds=1",
        f"model.name={'mixer_s32_224' if mixer else 'test_vit'}",
        f"model.image_size={128 if mixer else 32}",  # a Mixer of rank 16 needs 16 tokens
        "model.weights=random",
        "model.lora.last_blocks=1",
        "data.workers=0",
        "client.batch_size=16",
        "fabric.accelerator=cpu",
        "fabric.devices=1",
    ]
    return pairs + (["data.classes=3"] if "domainnet" in stem else [])


def command_of(file: Path) -> list[str]:
    """The arguments in the first line of a file, as if it was run in the repository's root."""
    first = file.read_text().splitlines()[0]
    assert first.startswith("# python train.py conf/paper/"), first
    return [str(ROOT / word) if word.endswith(".yaml") else word for word in first.split()[3:]]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DomainNet and NICO++ as they are distributed, with made-up pictures."""
    found = {}
    for source, domains in DOMAINS.items():
        root = found[source] = tmp_path_factory.mktemp(source)
        lists, images = (root / "NICO_DG_official", root / "NICO_DG") if source == "nico" else (root, root)
        lists.mkdir(exist_ok=True)
        for domain in domains:
            rng = seeded_numpy(0, source, domain)
            for split, numbers in (("train", range(TRAIN_IMAGES)), ("test", range(TRAIN_IMAGES, 11))):
                entries = [(f"{domain}/thing_{c}/{split}_{n:06d}.jpg", c) for c in range(CLASSES) for n in numbers]
                for entry, label in entries:
                    (images / entry).parent.mkdir(parents=True, exist_ok=True)
                    pixels = rng.integers(0, 128, (40, 48, 3)) + 60 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(images / entry)
                lines = [f"{'NICO_DG/' if source == 'nico' else ''}{entry} {label}\n" for entry, label in entries]
                (lists / f"{domain}_{split}.txt").write_text("".join(lines))
    return found


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return launched(1)


def with_real_root(command: list[str], roots: dict[str, Path]) -> list[str]:
    source = "nico" if any("nico" in word for word in command) else "domainnet"
    return [f"data.root={roots[source]}" if word.startswith("data.root=") else word for word in command]


def result_of(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_there_are_the_six_settings_of_the_paper() -> None:
    assert {file.stem for file in SETTINGS} == {
        f"{data}_{kind}" for data in ("domainnet", "nico") for kind in ("vit", "mixer", "vit_label_skew")
    }


@pytest.mark.parametrize("file", SETTINGS, ids=lambda f: f.stem)
def test_a_setting_states_the_protocol_of_the_paper(file: Path) -> None:
    command = command_of(file)
    assert command[0] == str(file)
    assert len(command) == 2
    config = load_config(command)
    stated = yaml.safe_load(file.read_text())
    assert stated["rounds"] == 50
    backbone = "mixer_b16_224" if "mixer" in file.stem else "vit_base_patch16_224"
    lora = {"rank": 16, "alpha": 16, "dropout": 0.1}
    assert stated["model"] == {
        "name": backbone, "weights": "pretrained", "image_size": 224, "normalization": "clip", "lora": lora
    }  # fmt: skip
    assert stated["client"] == {
        "optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 1e-5, "clip_norm": 10,
        "batch_size": 128, "epochs": 1,
    }  # fmt: skip
    assert config.model.lora.targets is None  # those of the paper
    assert config.model.lora.last_blocks is None
    assert config.method == {"name": "lora_fair"}
    assert config.data.source == file.stem.partition("_")[0]
    assert config.data.classes == (100 if config.data.source == "domainnet" else None)
    skewed = "label_skew" in file.stem
    federation: dict[str, Any] = {"weighting": "size"} | ({"clients_per_round": 18} if skewed else {})
    assert stated["federation"] == federation
    partition = {"scheme": "dirichlet", "clients_per_domain": 5, "alpha": 0.5} if skewed else None
    assert stated.get("partition") == partition


@pytest.mark.slow
@pytest.mark.parametrize("file", SETTINGS, ids=lambda f: f.stem)
def test_a_setting_runs(file: Path, roots: dict[str, Path], fabric: Fabric, tmp_path: Path) -> None:
    pairs = [*tiny(file.stem), f"run_dir={tmp_path / 'run'}"]
    if "label_skew" in file.stem:
        pairs.append("partition.min_images=1")
    run_federation(fabric, load_config([*with_real_root(command_of(file), roots), *pairs]))
    lines = result_of(tmp_path / "run")
    source = file.stem.partition("_")[0]
    for domain in DOMAINS[source]:
        assert any(f"eval/accuracy/{domain}," in line for line in lines)
    losses = [line for line in lines if line.split(",")[1].startswith("train/loss/")]
    assert len(losses) == (18 if "label_skew" in file.stem else 6)


def tiny_comparison(file: Path, roots: dict[str, Path], folder: Path) -> Comparison:
    command = with_real_root(command_of(file), roots)
    varied = "client.epochs=1" if "epochs" not in file.stem else "rounds=1"
    pairs = [*tiny(Path(command[0]).stem), varied, f"run_dir={folder}"]
    if "label_skew" in command[0]:
        pairs.append("partition.min_images=1")
    comparison = load_comparison([*command, *pairs])
    assert comparison is not None
    return comparison


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda f: f.stem)
def test_a_comparison_holds_nothing_but_what_it_varies(file: Path) -> None:
    base, own, root = command_of(file)
    assert Path(base) in SETTINGS
    assert Path(own) == file
    assert root.startswith("data.root=/")
    assert list(yaml.safe_load(file.read_text())) == ["compare"]


@pytest.mark.slow
@pytest.mark.parametrize("file", COMPARISONS, ids=lambda f: f.stem)
def test_a_comparison_can_be_run(file: Path, roots: dict[str, Path], fabric: Fabric, tmp_path: Path) -> None:
    comparison = tiny_comparison(file, roots, tmp_path)
    assert comparison.seeds == (0, 1, 2)
    assert comparison.baseline == "fedit"
    check_comparison(comparison)
    for config in one_of_each(comparison):
        run_federation(fabric, config)
        assert any("eval/accuracy," in line for line in result_of(config.folder))


def one_of_each(comparison: Comparison) -> Iterator[Config]:
    """Every method in the first setting, and every setting with the first method, of the first seed."""
    first_method, first_setting = next(iter(comparison.methods)), next(iter(comparison.settings))
    for run in comparison.final_runs:
        if run.seed == 0 and (run.method == first_method or run.setting == first_setting):
            yield comparison.config(run)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda f: f.stem)
def test_the_methods_can_be_compared_in_every_setting(setting: Path, tmp_path: Path) -> None:
    common = [str(setting), "data.root=/data", f"run_dir={tmp_path}"]
    comparison = load_comparison([*common, str(ROOT / "conf" / "paper" / "compare_methods.yaml")])
    assert comparison is not None
    alone = load_config(common)
    for (_, method, _), config in comparison.configs.items():
        differing = {"method": {"name": method}, "seed": config.seed, "run_dir": config.run_dir}
        assert config == dataclasses.replace(alone, **differing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "key", "values"),
    [
        ("ablation_rank", "model.lora.rank", [4, 8, 16, 32, 64]),
        ("ablation_local_epochs", "client.epochs", [1, 2, 5, 10]),
        ("ablation_initialization", "federation.initialization", ["average", "fresh", "local"]),
        ("ablation_clients", "partition.clients_per_domain", [1, 2, 5, 10]),
    ],
)
def test_what_a_comparison_varies(stem: str, key: str, values: list[Any], tmp_path: Path) -> None:
    comparison = load_comparison([*command_of(ROOT / "conf" / "paper" / f"{stem}.yaml"), f"run_dir={tmp_path}"])
    assert comparison is not None
    found = []
    for setting in comparison.settings:
        value: Any = dataclasses.asdict(comparison.configs[setting, "lora_fair", 0])
        for part in key.split("."):
            value = value[part]
        found.append(value)
    assert found == values


@pytest.mark.parametrize("setting", SETTINGS[1:3], ids=lambda f: f.stem)
def test_the_released_code_differs_from_a_setting_in_what_public_code_does(setting: Path) -> None:
    words = command_of(RELEASED)
    assert words[1:3] == [str(RELEASED), "data.root=/path/to/DomainNet"]
    alone, released = load_config([str(setting), *words[2:]]), load_config([str(setting), *words[1:]])
    assert (released.federation.weighting, released.data.antialias) == ("uniform", False)
    method = method_of(released)
    assert method == LoRAFair(
        similarity="cosine_columns",
        regularization=0.01,
        solver="sgd",
        sgd_start="xavier",
        sgd_steps=500,
        sgd_learning_rate=0.01,
        sgd_patience=5,
    )
    same = dataclasses.replace(
        released,
        method=alone.method,
        federation=dataclasses.replace(released.federation, weighting=alone.federation.weighting),
        data=dataclasses.replace(released.data, antialias=alone.data.antialias),
    )
    assert same == alone


def test_the_released_code_is_compared_with_what_it_changes_one_by_one(tmp_path: Path) -> None:
    comparison = load_comparison([str(ROOT / "conf" / "compare" / "released_code.yaml"), f"run_dir={tmp_path}"])
    assert comparison is not None
    (setting,) = comparison.settings
    of = {label: method_of(comparison.configs[setting, label, 0]) for label in comparison.methods}
    public = load_config([str(SETTINGS[0]), str(RELEASED), "data.root=/data"])
    released = method_of(public)
    assert isinstance(released, LoRAFair)
    explicit = {"sgd_learning_rate": 0.01}
    assert dataclasses.replace(of["released"], **explicit) == released
    assert dataclasses.replace(of["released_zero"], **explicit) == dataclasses.replace(released, sgd_start="zero")
    assert dataclasses.replace(of["released_lambda_1"], **explicit) == dataclasses.replace(released, regularization=1)
    assert of["exact"] == LoRAFair(similarity="cosine_columns")
    assert of["lora_fair"] == LoRAFair()
    for config in comparison.configs.values():
        assert config.federation.weighting == public.federation.weighting
        clients = 5 * (config.partition.clients_per_domain or 0)  # GlyphDomains has five domains
        assert (clients, config.federation.clients_per_round) == (100, 10)

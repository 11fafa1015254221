"""The backbone that one run leaves to the next: as it was made, and never another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.model import backbone
from lorafair.model.backbone import build_model
from lorafair.model.kept import keeping_backbone

CONFIG = ModelConfig(name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=4, last_blocks=2))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the backbones that are made."""
    seeds, create = [], backbone.create_backbone

    def counted(config: ModelConfig, classes: int, seed: int) -> Any:
        seeds.append(seed)
        return create(config, classes, seed)

    monkeypatch.setattr(backbone, "create_backbone", counted)
    return seeds


def test_runs_get_the_backbone_as_it_was_made_whatever_one_has_done_with_it(made: list[int]) -> None:
    expected = build_model(CONFIG, 4, 0).fingerprint()
    with keeping_backbone():
        for lora in (CONFIG.lora, LoRAConfig(rank=2, dropout=0.1), CONFIG.lora):
            model = build_model(dataclasses.replace(CONFIG, lora=lora, seed=3), 4, 0)
            plain = build_model(dataclasses.replace(CONFIG, lora=lora), 4, 0)
            assert model.fingerprint() == plain.fingerprint()
            for weight in model.attach("cpu").adapters.base_weights().values():
                weight.add_(1)
            model.hold_frozen_in(torch.bfloat16)
        assert build_model(CONFIG, 4, 0).fingerprint() == expected
        assert made == [0, 0]
    build_model(CONFIG, 4, 0)
    assert made == [0, 0, 0], "nothing is kept behind the block"


def test_another_seed_size_or_file_is_made_anew(made: list[int], tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    with keeping_backbone():
        for config, seed in ((CONFIG, 0), (CONFIG, 1), (dataclasses.replace(CONFIG, image_size=48), 1), (CONFIG, 0)):
            build_model(config, 4, seed)
        assert made == [0, 1, 1, 0]
        with torch.device("meta"):
            assert next(build_model(CONFIG, 4, 0).parameters()).is_meta
        assert not next(build_model(CONFIG, 4, 0).parameters()).is_meta
        plain = backbone._create(CONFIG, 4, 5)
        torch.save(plain.state_dict(), file)
        of_file = dataclasses.replace(CONFIG, weights=str(file))
        one = build_model(of_file, 4, 0).fingerprint()
        assert build_model(of_file, 4, 0).fingerprint() == one
        torch.save({name: tensor * 2 for name, tensor in plain.state_dict().items()}, file)
        assert build_model(of_file, 4, 0).fingerprint() != one

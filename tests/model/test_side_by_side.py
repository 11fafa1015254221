"""How many clients have room on a GPU, with its memory made up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import build_model
from lorafair.model.side_by_side import clients_with_room

GIB = 2**30


@pytest.fixture
def model() -> AdaptedModel:
    config = ModelConfig(name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=2, last_blocks=1))
    return build_model(config, classes=3, seed=0).attach(max_cohort=4)


def make_up(monkeypatch: pytest.MonkeyPatch, *, peak: float, free: float, reserved: float) -> None:
    """A GPU with one GiB in use."""
    made_up: dict[str, Callable[[object], object]] = {
        "reset_peak_memory_stats": lambda _: None,
        "memory_allocated": lambda _: GIB,
        "max_memory_allocated": lambda _: int(peak * GIB),
        "memory_reserved": lambda _: int(reserved * GIB),
        "mem_get_info": lambda _: (int(free * GIB), 80 * GIB),
    }
    for name, function in made_up.items():
        monkeypatch.setattr(torch.cuda, name, function)


def test_room_is_free_memory_over_that_of_one_client(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch, peak=3, free=40, reserved=11)  # a client takes two; ten of fifty free are PyTorch's
    device = torch.device("cuda:0")
    assert clients_with_room(model, nullcontext, 8, device) == int(0.8 * 50 / 2)
    gradient = model.adapters.flat.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0  # a whole step was measured, backward included


def test_one_client_without_room_is_none(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch, peak=3, free=0.1, reserved=1)

    def refuse(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", refuse)
    assert clients_with_room(model, nullcontext, 8, torch.device("cuda:0")) == 0

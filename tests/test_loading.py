"""The way of images to the model: resident on the device, augmented there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafair.checkpoint import list_checkpoints, load_checkpoint
from lorafair.config import Config, ConfigError
from lorafair.data.loading import Indices, ResidentSource
from lorafair.federation import run_federation
from lorafair.seeding import seeded
from tests.conftest import launched

IMAGES = torch.randint(0, 256, (150, 3, 16, 16), dtype=torch.uint8, generator=seeded(0, "images"))


class Source:
    def __init__(self, inputs: torch.Tensor = IMAGES) -> None:
        self.inputs = inputs
        self.read = 0

    def batches(self, indices: Sequence[Indices]) -> Iterator[torch.Tensor]:
        for batch in indices:
            self.read += len(batch)
            yield self.inputs[batch]


def trained(config: Config) -> torch.Tensor:
    run_federation(launched(1), config)
    return load_checkpoint(list_checkpoints(config.folder)[-1]).tensors["adapter"]


@pytest.mark.parametrize("inputs", [IMAGES, IMAGES.float()], ids=["images", "tokens"])
def test_resident_inputs_are_read_once_and_are_the_same(inputs: torch.Tensor) -> None:
    source = Source(inputs)
    resident = ResidentSource(source, len(inputs), torch.device("cpu"))
    order = [np.array([149, 3, 3]), np.arange(100), np.array([64])]
    for _ in range(2):
        for batch, found in zip(order, resident.batches(order), strict=True):
            assert found.dtype == inputs.dtype
            assert torch.equal(found, inputs[batch])
    assert source.read == len(inputs)


@pytest.mark.parametrize("cache", ["never", "always"], ids=["images", "tokens"])
def test_training_is_the_same_with_resident_inputs(tiny: Callable[..., Config], cache: str, tmp_path: Path) -> None:
    adapters = [
        trained(tiny(f"data.resident={resident}", f"model.prefix_cache={cache}", f"run_dir={tmp_path / resident}"))
        for resident in ("true", "false")
    ]
    assert torch.equal(*adapters)


def test_inputs_that_do_not_fit_on_the_device_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 10**9))
    with pytest.raises(ConfigError, match=r"data\.resident=true: the training images need 0\.0 GB, and cuda:0 has"):
        ResidentSource(Source(), len(IMAGES), torch.device("cuda:0"))

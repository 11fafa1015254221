"""Accuracy and loss: every test image once, equal to brute force, the same on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorafair.config import LoRAConfig, ModelConfig
from lorafair.data.loading import Indices
from lorafair.evaluation import Evaluation, Evaluator
from lorafair.models import AdaptedModel, build_model
from lorafair.seeding import seeded
from tests.conftest import launched, run_ranks

CONFIG = ModelConfig(name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=2))
IMAGES = torch.randint(0, 256, (53, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "images"))
LABELS = torch.randint(0, 4, (53,), generator=seeded(0, "labels")).numpy()
DOMAINS = np.array([0] * 20 + [2] * 10 + [1] * 23)


class Source:
    def batches(self, indices: list[Indices]) -> Any:
        return (IMAGES[i] for i in indices)


def model() -> AdaptedModel:
    return build_model(CONFIG, classes=4, seed=0).attach("cpu")


def adapters(m: AdaptedModel, count: int) -> torch.Tensor:
    return torch.stack([m.adapters.draw(seed, 0) * 20 for seed in range(count)])


def evaluated(fabric: Any, count: int) -> Evaluation:
    m = model()
    evaluator = Evaluator(fabric, Source(), LABELS, DOMAINS, classes=4, batch_size=8)
    found = evaluator(m, adapters(m, count))
    return Evaluation(*(t.numpy() for t in (found.accuracy, found.loss, found.confusion)))  # plain arrays travel


def test_equal_to_brute_force() -> None:
    m = model()
    found = Evaluator(launched(1), Source(), LABELS, DOMAINS, classes=4, batch_size=8)(m, adapters(m, 2))
    for index, adapter in enumerate(adapters(m, 2)):
        m.adapters.write(adapter)
        for domain in range(3):
            logits = torch.cat([m(IMAGES[i : i + 1]) for i in np.flatnonzero(domain == DOMAINS)])
            labels = torch.from_numpy(LABELS[domain == DOMAINS])
            right = (logits.argmax(1) == labels).double().mean()
            assert found.accuracy[index, domain] == right
            loss = torch.nn.functional.cross_entropy(logits.double(), labels)
            assert found.loss[index, domain].item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.confusion.sum() == 2 * 53
    assert found.mean_accuracy == pytest.approx(found.accuracy.mean().item())


@pytest.mark.parametrize("count", [1, 3])
def test_the_same_on_1_2_and_3_ranks(count: int) -> None:
    results = [found for world_size in (1, 2, 3) for found in run_ranks(world_size, evaluated, count)]
    for found in results[1:]:
        assert np.array_equal(found.accuracy, results[0].accuracy)
        assert np.array_equal(found.loss, results[0].loss)
        assert np.array_equal(found.confusion, results[0].confusion)

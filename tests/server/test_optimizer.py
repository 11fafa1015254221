"""Server optimisers against their papers' formulas, number by number in Python's float64."""

from __future__ import annotations

import math

import pytest
import torch

from lorafair.config.loading import load_config
from lorafair.config.schema import ServerConfig
from lorafair.seeding import seeded
from lorafair.server.optimizer import Moments, server_step


def paper(config: ServerConfig, start: list[float], changes: list[list[float]]) -> list[float]:
    """Where each number ends after these changes: arXiv 1909.06335 for FedAvgM, 2003.00295 (alg. 2) for the others."""
    assert config.momentum is not None
    assert config.learning_rate is not None
    ends = []
    for i, x in enumerate(start):
        m, v = 0.0, (config.adaptivity or 0) ** 2
        for change in changes:
            delta = change[i]
            if config.optimizer == "fedavgm":
                m = config.momentum * m + delta
                x += config.learning_rate * m
                continue
            assert config.second_momentum is not None
            assert config.adaptivity is not None
            m = config.momentum * m + (1 - config.momentum) * delta
            if config.optimizer == "fedadam":
                v = config.second_momentum * v + (1 - config.second_momentum) * delta**2
            else:
                sign = (v > delta**2) - (v < delta**2)
                v = v - (1 - config.second_momentum) * delta**2 * sign
            x += config.learning_rate * m / (math.sqrt(v) + config.adaptivity)
        ends.append(x)
    return ends


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi"])
def test_four_rounds_as_in_the_paper(optimizer: str) -> None:
    config = load_config([f"server.optimizer={optimizer}", "server.momentum=0.8"]).server
    changes = 0.01 * torch.randn(4, 9, generator=seeded(0), dtype=torch.float64)
    start = torch.randn(9, generator=seeded(1), dtype=torch.float64)
    moments, x = Moments.at_start(config, start), start
    for change in changes:
        x = server_step(config, moments, x, x + change, [slice(0, 9)])
    torch.testing.assert_close(
        x, torch.tensor(paper(config, start.tolist(), changes.tolist())).double(), rtol=1e-6, atol=1e-7
    )
    assert not torch.allclose(x, start + changes.sum(0), atol=1e-3)


def test_without_momentum_and_at_rate_1_fedavgm_is_plain_averaging() -> None:
    config = load_config(["server.optimizer=fedavgm", "server.momentum=0"]).server
    start, proposed = torch.randn(2, 9, generator=seeded(0), dtype=torch.float64)
    moved = server_step(config, Moments.at_start(config, start), start, proposed, [slice(0, 9)])
    torch.testing.assert_close(moved, proposed)


def test_columns_that_are_not_sent_keep_their_numbers_and_moments() -> None:
    config = load_config(["server.optimizer=fedadam"]).server
    start, proposed = torch.randn(2, 9, generator=seeded(0))
    moments = Moments.at_start(config, start)
    moved = server_step(config, moments, start, proposed, [slice(2, 4), slice(6, 9)])
    still = [0, 1, 4, 5]
    assert torch.equal(moved[still], proposed[still])
    assert not moments.first[still].any()
    assert moments.first[[2, 3, 6, 7, 8]].all()

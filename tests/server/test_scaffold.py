"""SCAFFOLD against the paper's algorithm 1, with one number a parameter and quadratic losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorafair.config.schema import ClientConfig
from lorafair.schedule import effective_step_size
from lorafair.seeding import seeded_numpy
from lorafair.server.scaffold import ControlVariates

CLIENTS, NUMBERS, RATE, STEPS = 4, 3, 0.1, (5, 3, 1, 4)


def paper(optima: np.ndarray, rounds: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Algorithm 1, option II, of f_k(y) = ½‖y − optimum_k‖² with η_g = 1: x, c and c_k after these rounds."""
    x, c, own = np.zeros(NUMBERS), np.zeros(NUMBERS), np.zeros((CLIENTS, NUMBERS))
    for sampled in rounds:
        way, change = np.zeros(NUMBERS), np.zeros(NUMBERS)
        for k in sampled:
            y = x.copy()
            for _ in range(STEPS[k]):
                y -= RATE * ((y - optima[k]) - own[k] + c)
            new = own[k] - c + (x - y) / (STEPS[k] * RATE)
            way, change, own[k] = way + y - x, change + new - own[k], new
        x, c = x + way / len(sampled), c + change / CLIENTS
    return x, c, own


def test_as_in_the_paper() -> None:
    optima = seeded_numpy(0, "optima").standard_normal((CLIENTS, NUMBERS))
    rounds = [[0, 1, 2, 3], [1, 3], [0, 2], [2, 3]]
    x, controls = torch.zeros(NUMBERS, dtype=torch.float64), ControlVariates.at_start(CLIENTS, torch.zeros(3).double())
    local = ClientConfig(learning_rate=RATE, momentum=0.0)
    for sampled in rounds:
        rows = []
        for k, correction in zip(sampled, controls.corrections(sampled), strict=True):
            y = x.clone()
            for _ in range(STEPS[k]):
                y -= RATE * (y - torch.from_numpy(optima[k]) + correction)
            rows.append(y)
        ends = torch.stack(rows)
        step_sizes = {"A": [effective_step_size(local, "A", STEPS[k]) for k in sampled]}
        controls.update(sampled, [1 / CLIENTS] * len(sampled), x - ends, {"A": slice(0, NUMBERS)}, step_sizes)
        x = ends.mean(0)
    expected = paper(optima, rounds)
    for mine, theirs in zip((x, controls.server, controls.clients), expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_momentum_too_a_constant_gradient_is_found_exactly(momentum: float) -> None:
    local = ClientConfig(learning_rate=RATE, momentum=momentum)
    gradient = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = torch.optim.SGD([parameter], lr=RATE, momentum=momentum)
    for _ in range(5):
        parameter.grad = gradient.clone()
        optimizer.step()
    controls = ControlVariates.at_start(2, torch.zeros(3).double())
    controls.update([1], [0.5], -parameter.detach(), {"B": slice(0, 3)}, {"B": [effective_step_size(local, "B", 5)]})
    torch.testing.assert_close(controls.clients[1:], gradient)
    torch.testing.assert_close(controls.server, gradient[0] / 2)


def test_the_server_keeps_the_weighted_mean_and_untrained_columns_stay() -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    controls = ControlVariates.at_start(CLIENTS, torch.zeros(6).double())
    for sampled in ([0, 1, 2, 3], [2, 0], [3, 1]):
        moved = torch.randn(len(sampled), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(len(sampled)))
        controls.update(sampled, weights[sampled].tolist(), moved, {"B": slice(2, 5)}, {"B": [0.5] * len(sampled)})
        torch.testing.assert_close(controls.server, (weights.unsqueeze(1) * controls.clients).sum(0))
    assert not controls.clients[:, [0, 1, 5]].any()
    assert controls.clients[:, 2:5].all()

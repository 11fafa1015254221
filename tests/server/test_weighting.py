"""Weights from losses: q-FedAvg as published, in float64, and AFL's projected ascent, by brute force and in a round."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lorafair import federation
from lorafair.aggregation.registry import method_of
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.client.cohort import LocalTraining
from lorafair.communication.collectives import ClientResults
from lorafair.config.schema import ClientConfig, Config
from lorafair.errors import ConfigError
from lorafair.experiment import build_experiment
from lorafair.federation import run_federation
from lorafair.reporting.run_dir import read_metrics
from lorafair.seeding import seeded_numpy
from lorafair.server.weighting import afl_mixture, lipschitz, project, q_step, q_weights
from tests.conftest import launched

Tiny = Callable[..., Config]


def published(w: np.ndarray, clients: np.ndarray, p: np.ndarray, losses: np.ndarray, q: float, L: float) -> np.ndarray:
    """Algorithm 2 of arXiv 1905.10497, with p_k in the sums instead of clients drawn with probability p_k."""
    delta, h = np.zeros_like(w), 0.0
    for w_k, p_k, F_k in zip(clients, p, losses, strict=True):
        dw = L * (w - w_k)
        delta += p_k * F_k**q * dw
        h += p_k * (q * F_k ** (q - 1) * (dw @ dw) + L * F_k**q)
    return w - delta / h


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 3.0])
def test_q_fedavg_is_the_published_update(q: float) -> None:
    draw = seeded_numpy(0, "q", str(q))
    w, clients, losses = draw.normal(size=30), draw.normal(size=(5, 30)), draw.random(5) * 4
    p, L = draw.dirichlet(np.ones(5)), 20.0
    weights = np.array(q_weights(p.tolist(), losses.tolist(), q))
    step = q_step(p.tolist(), losses.tolist(), ((w - clients) ** 2).sum(1).tolist(), q, L)
    np.testing.assert_allclose(w + step * (weights @ clients - w), published(w, clients, p, losses, q, L), rtol=1e-12)
    np.testing.assert_allclose(weights, p * losses**q / (p * losses**q).sum(), rtol=1e-12)
    if q == 0:
        assert step == 1.0, "plain averaging"
    else:
        assert 0 < step < 1


def test_any_q_and_any_loss_give_finite_weights() -> None:
    assert q_weights([0.5, 0.5], [5.0, 4.0], 1000.0) == (1.0, pytest.approx(0.0, abs=1e-90))
    assert q_weights([0.25, 0.75], [0.0, 0.0], 2.0) == (0.25, 0.75)
    assert 0 < q_step([0.5, 0.5], [0.0, 3.0], [1.0, 2.0], 0.5, 10.0) < 1
    assert 0 < q_step([0.5, 0.5], [9.0, 3.0], [1.0, 2.0], 1000.0, 10.0) < 1


def test_l_is_one_over_the_step_of_a_constant_gradient() -> None:
    assert lipschitz(ClientConfig(learning_rate=0.05, momentum=0.0)) == pytest.approx(20.0)
    assert lipschitz(ClientConfig(learning_rate=0.05, momentum=0.9)) == pytest.approx(2.0)


@pytest.mark.parametrize("mass", [1.0, 0.3])
def test_the_projection_is_the_nearest_point(mass: float) -> None:
    draw = seeded_numpy(0, "projection", str(mass))
    for _ in range(20):
        values = draw.normal(size=6)
        found = project(values, mass)
        low, high = values.min() - mass, values.max()  # max(v − τ, 0) has the right sum for one τ
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(values - middle, 0).sum() > mass else (low, middle)
        np.testing.assert_allclose(found, np.maximum(values - low, 0), atol=1e-12)
        assert found.min() >= 0
        assert found.sum() == pytest.approx(mass)
        others = mass * draw.dirichlet(np.ones(6), size=50)
        assert ((others - values) ** 2).sum(1).min() >= ((found - values) ** 2).sum()


def test_the_mixture_moves_to_clients_with_a_high_loss_and_keeps_its_sum() -> None:
    assert afl_mixture([0.5, 0.5], [1.0, 2.0], 0.1) == pytest.approx([0.45, 0.55])
    assert afl_mixture([0.5, 0.5], [1.0, 2.0], 10.0) == [0.0, 1.0]
    assert afl_mixture([0.2, 0.1], [3.0, 1.0], 0.05) == pytest.approx([0.25, 0.05]), "two of many clients"
    assert afl_mixture([0.0, 0.0], [3.0, 1.0], 0.05) == [0.0, 0.0]


class Seen:
    """What `weighted_by_losses` gets and gives in each round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: list[ClientResults] = []
        self.after: list[ClientResults] = []
        original = federation.weighted_by_losses

        def recorded(experiment: Any, state: Any, plan: Any, results: ClientResults) -> ClientResults:
            self.before.append(results)
            self.after.append(original(experiment, state, plan, results))
            return self.after[-1]

        monkeypatch.setattr(federation, "weighted_by_losses", recorded)


def adapters_of(config: Config) -> list[dict[str, torch.Tensor]]:
    return [load_checkpoint(path).tensors for path in list_checkpoints(config.folder)]


def test_a_round_of_fedit_is_the_published_update(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the clients' rows and the losses at their start, in float64."""
    given = (
        "method.name=fedit", "client.optimizer=sgd", "client.learning_rate=0.05", "client.momentum=0", "rounds=1",
        "client.batch_size=64", "client.epochs=3", "federation.weighting=q", "federation.weighting_q=2",
    )  # fmt: skip
    experiment, _ = build_experiment(launched(1), tiny(*given))
    experiment.open_inputs()
    start = experiment.model.adapters.draw(0, 0)
    experiment.model.adapters.resize(1)
    experiment.model.adapters.write(start)
    losses = []
    for client in experiment.clients:
        [inputs] = experiment.inputs.train.batches([client.indices])
        with torch.inference_mode():
            losses.append(float(F.cross_entropy(experiment.model(inputs), experiment.labels[client.indices])))

    seen, config = Seen(monkeypatch), tiny(*given)
    run_federation(launched(1), config)
    [before] = seen.before
    assert before.first_losses == pytest.approx(losses, rel=1e-5)
    assert all(first > mean for first, mean in zip(before.first_losses, before.losses, strict=True))
    p = np.array([len(client.indices) for client in experiment.clients]) / len(experiment.labels)
    rows = before.rows.double().numpy()
    expected = published(start.double().numpy(), rows, p, np.array(before.first_losses), 2.0, 1 / 0.05)
    [state] = adapters_of(config)
    assert 0.05 < seen.after[0].step < 0.95
    np.testing.assert_allclose(state["adapter"].numpy(), expected, rtol=0, atol=2e-7)
    curves = read_metrics(config.folder)
    assert curves["server/step"][1] == seen.after[0].step
    assert curves["train/weight_highest"][1] == max(seen.after[0].weights)


def test_full_steps_and_q_0_are_the_weighted_mean(tiny: Tiny, tmp_path: Any) -> None:
    common = ("method.name=fedit", "client.optimizer=sgd", "rounds=1")
    configs = [
        tiny(*common, f"run_dir={tmp_path / 'size'}"),
        tiny(*common, "federation.weighting=q", "federation.weighting_q=0", f"run_dir={tmp_path / 'q'}"),
    ]
    for config in configs:
        run_federation(launched(1), config)
    [plain], [zero] = map(adapters_of, configs)
    torch.testing.assert_close(plain["adapter"], zero["adapter"], rtol=0, atol=1e-7)
    bytes_of = [read_metrics(config.folder)["comm/up_bytes"][1] for config in configs]
    assert bytes_of[1] - bytes_of[0] == 3 * 4, "a loss of every client"


def test_rounds_of_afl_follow_the_mixture(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """λ before the round weights it, then moves by the losses of the clients drawn; the others' stays."""
    seen = Seen(monkeypatch)
    config = tiny(
        "method.name=fedit", "federation.weighting=afl", "federation.weighting_rate=0.02", "rounds=3",
        "partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=4", "checkpoint.every=1", "checkpoint.keep=3",
    )  # fmt: skip
    run_federation(launched(1), config)
    experiment, _ = build_experiment(launched(1), config)
    mixture = np.array(experiment.sizes) / sum(experiment.sizes)
    for before, after, state in zip(seen.before, seen.after, adapters_of(config), strict=True):
        index, losses = list(before.clients), np.array(before.first_losses)
        assert len(index) == 4
        np.testing.assert_allclose(after.weights, mixture[index] / mixture[index].sum(), rtol=1e-12)
        mixture[index] = project(mixture[index] + 0.02 * losses, mixture[index].sum())
        np.testing.assert_allclose(state["mixture"].numpy(), mixture, rtol=1e-12)
        assert after.step == 1.0
    assert math.fsum(mixture) == pytest.approx(1.0)
    assert np.abs(mixture - np.array(experiment.sizes) / sum(experiment.sizes)).max() > 1e-3


def test_clients_that_are_done_bring_their_first_loss_to_the_continued_round(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        "method.name=fedit",
        "client.cohort=1",
        "federation.weighting=afl",
        "federation.weighting_rate=0.05",
        "rounds=2",
    )
    whole, stopped = tiny(*given), tiny(*given)
    stopped = dataclasses.replace(stopped, run_dir=whole.folder.with_name("stopped"))
    run_federation(launched(1), whole)
    train, calls = LocalTraining.train, []

    def fail_at_the_third(self: Any, cohort: Any, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("Connection closed by peer")
        return train(self, cohort, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(LocalTraining, "train", fail_at_the_third)
        with pytest.raises(RuntimeError, match="closed by peer"):
            run_federation(launched(1), stopped)
    run_federation(launched(1), stopped)
    for one, other in zip(adapters_of(whole), adapters_of(stopped), strict=True):
        assert torch.equal(one["mixture"], other["mixture"])
        assert torch.equal(one["adapter"], other["adapter"])


def test_a_client_without_a_finite_loss_is_left_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    train = LocalTraining.train

    def broken(self: Any, cohort: Any, inputs: Any) -> Any:
        result = train(self, cohort, inputs)
        result.first_losses[0] = math.nan
        return result

    monkeypatch.setattr(LocalTraining, "train", broken)
    seen = Seen(monkeypatch)
    run_federation(launched(1), tiny("method.name=fedit", "federation.weighting=afl", "client.cohort=3", "rounds=1"))
    assert len(seen.before[0].dropped) == 1
    assert len(seen.after[0].weights) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("method.name=local_only", "federation.weighting=afl"),
            r"weighting=afl has no effect with method\.name=local_o",
        ),
        (("method.name=centralized", "federation.weighting=q"), r"weighting=q has no effect with .* possible: fedit, "),
        (("client.scaffold=true", "federation.weighting=afl"), r"weighting=afl does not fit client\.scaffold=true"),
        (
            ("method.name=fedex_lora", "federation.weighting=q"),
            r"step=qfedavg does not fit method\.name=fedex_lora.*=full",
        ),
        (("client.optimizer=adamw", "federation.weighting=q"), r"step=qfedavg does not fit client\.optimizer=adamw"),
        (("server.optimizer=fedavgm", "federation.weighting=q"), r"does not fit server\.optimizer=fedavgm"),
        (("client.b_learning_rate_ratio=4", "federation.weighting=q"), r"does not fit client\.b_learning_rate_ratio=4"),
        (
            ("federation.initialization=fresh", "federation.weighting=q"),
            r"does not fit federation\.initialization=fresh",
        ),
        (
            ("federation.weighting_q=1",),
            r"federation\.weighting_q=1\.0 has no effect: it needs federation\.weighting=q",
        ),
        (("federation.weighting=q", "federation.weighting_rate=1"), r"federation\.weighting_rate=1\.0 has no effect"),
        (("federation.weighting=afl", "federation.weighting_rate=0"), r"weighting_rate=0\.0 is out of range"),
    ],
)
def test_what_makes_no_sense_is_refused(given: tuple[str, ...], message: str, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of(tiny("client.optimizer=sgd", *given))


@pytest.mark.parametrize("name", ["lora_fair", "fedex_lora", "flora", "fedsa_lora", "het_lora"])
def test_weights_alone_fit_every_method_that_averages(name: str, tiny: Tiny) -> None:
    method_of(tiny(f"method.name={name}", "federation.weighting=q", "federation.weighting_step=full"))
    method_of(tiny(f"method.name={name}", "federation.weighting=afl"))

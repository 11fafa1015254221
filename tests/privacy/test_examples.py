"""ε of every client, noise for a target, what a run says of it, what is refused, what is void."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lorafair
from lorafair.aggregation.registry import method_of
from lorafair.config.schema import ClientConfig, Config
from lorafair.errors import ConfigError, LorafairError
from lorafair.federation import run_federation
from lorafair.model.adapter import AdapterLayout
from lorafair.privacy.accounting import Releases, epsilon_of
from lorafair.privacy.checks import check_privacy
from lorafair.privacy.examples import ExampleBudget
from lorafair.privacy.measures import MEASURES, Watch, unmoved_parts
from lorafair.reporting.run_dir import read_metrics
from lorafair.schedule import rounds_of_clients
from tests.conftest import launched

pytest.importorskip("dp_accounting", reason="pip install 'lorafair[privacy]'")
Tiny = Callable[..., Config]
PRIVATE = ("privacy.unit=example", "privacy.noise_multiplier=1.5")


def test_a_client_has_the_epsilon_of_its_samples_and_rounds() -> None:
    budget = ExampleBudget([100, 40, 7], ClientConfig(batch_size=10, epochs=2), 1e-5)
    taken = [3, 5, 0]
    by_hand = [epsilon_of([Releases(1.1, 0.1, 60)], 1e-5), epsilon_of([Releases(1.1, 0.25, 40)], 1e-5), 0.0]
    assert budget.epsilons(1.1, taken) == by_hand
    assert budget.largest_epsilon(1.1, taken) == max(by_hand)
    assert budget.largest_epsilon(1.1, [0, 0, 2]) == epsilon_of([Releases(1.1, 1.0, 4)], 1e-5)


def test_the_noise_for_a_target_is_that_of_the_client_with_the_largest_epsilon() -> None:
    budget = ExampleBudget([200, 90, 40, 12], ClientConfig(batch_size=8, steps=5), 1e-5)
    taken = [6, 6, 5, 1]
    noise = budget.noise_multiplier(3.0, taken)
    epsilons = budget.epsilons(noise, taken)
    assert 2.97 < max(epsilons) <= 3.0
    assert budget.largest_epsilon(noise, taken) == max(epsilons)
    assert budget.largest_epsilon(0.0, taken) == math.inf


def test_participation_is_counted_from_the_clients_drawn() -> None:
    taken = rounds_of_clients(3, 20, 7, 2)
    assert sum(taken) == 40
    assert rounds_of_clients(3, 4, 5, None) == [4] * 5
    assert len(set(taken)) > 1


def test_a_run_says_what_its_epsilon_is(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    target = "data.train_images=30", "privacy.unit=example", "privacy.epsilon=12", "client.batch_size=5"
    config = tiny(*target)
    run_federation(launched(1), config)
    printed = capsys.readouterr().out
    privacy = json.loads((config.folder / "result.json").read_text())["privacy"]
    by_hand = epsilon_of([Releases(privacy["noise_multiplier"], 5 / 30, 12)], 1e-5)
    assert privacy["epsilon"] == privacy["clients"]["plain"] == by_hand <= 12
    assert lorafair.RunResult(config.folder).epsilon == by_hand
    curves = read_metrics(config.folder)
    assert curves["privacy/epsilon"][2] == by_hand > curves["privacy/epsilon"][1]
    assert set(curves) >= {"privacy/clip_fraction", "privacy/norm", "privacy/norm/A", "privacy/signal_to_noise/head"}
    assert "privacy: DP-SGD at the clients, noise multiplier" in printed
    assert "privacy: ε = 12 at δ = 1e-05 for each image of any client" in printed
    assert "this is a simulation" in printed
    longer = tiny(*target, "rounds=9")
    with pytest.raises(LorafairError, match=r"the noise that privacy.epsilon needs over all rounds is σ=.*anew$"):
        run_federation(launched(1), longer)


@pytest.mark.slow
def test_noise_of_the_system_makes_another_run_each_time(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies = []
    for name in ("one", "other"):
        more = "privacy.delta=0.1", "data.train_images=30", "rounds=1", f"run_dir={tmp_path / name}"
        config = tiny(*PRIVATE, "privacy.noise_source=system", *more)
        run_federation(launched(1), config)
        accuracies.append(json.loads((config.folder / "result.json").read_text())["mean_loss"])
    assert accuracies[0] != accuracies[1]
    printed = capsys.readouterr().out
    assert "this run does not repeat" in printed
    assert "privacy.delta=0.1 is not below 1 / 30" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.name=fed_sb", "federation.initialization=average"], "begins with gradients of 50 training images"),
        (["federation.weighting=afl"], "makes weights of the clients' losses"),
        (["federation.head_weighting=class"], "sends how many images of each class"),
        (["model.compile=eager"], "every step has another number of images"),
        (["accept=[client.batch_size]"], "accept: client.batch_size cannot differ"),
        (["accept=[privacy.noise_multiplier]"], "accept: privacy.noise_multiplier cannot differ"),
        (["accept=[data.train_images]"], "accept: data.train_images cannot differ"),
    ],
)
def test_what_would_break_the_promise_is_refused(tiny: Tiny, changes: list[str], message: str) -> None:
    config = tiny(*PRIVATE, *changes)
    with pytest.raises(ConfigError, match=message):
        check_privacy(config, method_of(config))


def test_what_does_not_change_epsilon_may_be_accepted(tiny: Tiny) -> None:
    config = tiny(*PRIVATE, "accept=[client.learning_rate,model.lora.dropout]")
    check_privacy(config, method_of(config))


def test_a_mechanism_without_use_is_said_once_after_some_rounds() -> None:
    watch = Watch()
    void = {"privacy/clip_fraction": 1.0, "privacy/signal_to_noise/B": 0.001, "privacy/signal_to_noise/A": 0.5}
    said = [watch.lines(void, ("core",)) for _ in range(7)]
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 3, 0, 0]
    assert any("every contribution is clipped" in line for line in said[4])
    assert any("the noise on B is over 100 times" in line for line in said[4])
    assert any("core is trained and has no gradient" in line for line in said[4])
    unclipped = Watch()
    for _ in range(4):
        assert unclipped.lines({"privacy/clip_fraction": 0.0}) == []
    assert unclipped.lines({"privacy/clip_fraction": 0.4}) == []  # the row is broken
    assert not any(unclipped.lines({"privacy/clip_fraction": 0.0}) for _ in range(4))
    [line] = unclipped.lines({"privacy/clip_fraction": 0.0})
    assert "nothing is clipped" in line


def test_a_part_that_is_trained_without_a_gradient_is_found() -> None:
    layout = AdapterLayout.of({"layer": ((2, 3), (4, 2))}, {"head.weight": (2, 4)})
    rows = torch.zeros(2, len(MEASURES))
    rows[:, MEASURES.index("signal/B")] = 1.0
    assert unmoved_parts(rows, ("A", "B", "head"), layout) == ("A", "head")
    assert unmoved_parts(rows, ("B",), layout) == ()

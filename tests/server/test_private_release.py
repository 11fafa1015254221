"""Client-level privacy: what the method gets is the noisy mean of clipped updates, over a denominator that stays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lorafair.federation as federation_module
from lorafair.aggregation.registry import build_aggregator
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.commands.checks import check_run
from lorafair.communication.collectives import ClientResults
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.federation import run_federation
from lorafair.model.adapter import AdapterLayout
from lorafair.privacy.clipped_updates import bounds_at_start
from lorafair.reporting.run_dir import read_metrics
from lorafair.server.private_release import ClientRelease
from lorafair.server.state import ServerState
from tests.conftest import launched

Tiny = Callable[..., Config]
LAYOUT = AdapterLayout.of({"a": ((2, 6), (8, 2)), "b": ((2, 8), (6, 2))}, {"head.weight": (5, 8)})
SIGMA, EXPECTED = 0.8, 4.0
PRIVATE = ("privacy.unit=client", f"privacy.noise_multiplier={SIGMA}", "federation.weighting=uniform")


def release_of(*options: str) -> tuple[ClientRelease, ServerState, torch.Tensor]:
    """A stub of a run, of which only the release is real."""
    config = load_config([*PRIVATE, "rounds=1000", "run_dir=/nowhere", *options])
    experiment: Any = SimpleNamespace(
        config=config, layout=LAYOUT, aggregator=build_aggregator(config.method),
        scheduler=SimpleNamespace(expected_clients=EXPECTED),
        fabric=SimpleNamespace(world_size=1, broadcast=lambda value: value),
        noise_multiplier=config.privacy.noise_multiplier,
    )  # fmt: skip
    start = torch.randn(LAYOUT.length, generator=torch.Generator().manual_seed(0))
    state = ServerState(0, start, clip_bounds=bounds_at_start(config.privacy))
    return ClientRelease(experiment), state, start


def results_of(rows: torch.Tensor) -> ClientResults:
    clients = tuple(range(len(rows)))
    return ClientResults(
        clients, (1 / max(1, len(rows)),) * len(rows), (1.0,) * len(rows), (1.0,) * len(rows), (), rows
    )


def changed(start: torch.Tensor, clients: int, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    changes = torch.randn(clients, len(start), generator=generator)
    return start + size * changes / changes.norm(dim=1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "rounds"), [("seeded", 1000), ("system", 200)])
def test_the_noise_has_the_variance_that_the_accountant_takes(source: str, rounds: int) -> None:
    release, state, start = release_of("method.name=fedit", "privacy.clip_norm=0.5", f"privacy.noise_source={source}")
    rows, noise = changed(start, 3, 2.0), []
    clean = 0.5 / 2.0 * (rows.double() - start.double()).sum(0) / EXPECTED
    for state.completed_rounds in range(rounds):
        released = release(state, LAYOUT, start, results_of(rows))
        assert released.row_weights == (1.0,)
        noise.append(released.rows[0].double() - start.double() - clean)
    drawn = torch.stack(noise) * EXPECTED / 0.5 / SIGMA  # (rounds, P), standard normal
    count = drawn.numel()
    assert abs(float(drawn.mean())) < 5 / math.sqrt(count)
    assert abs(float(drawn.var()) - 1) < 5 * math.sqrt(2 / count) + 1e-5
    assert (drawn.var(0) - 1).abs().max() < 6 * math.sqrt(2 / rounds)  # of each number by itself
    correlation = drawn.T @ drawn / rounds - torch.diag(drawn.square().mean(0))
    assert correlation.abs().max() < 6 / math.sqrt(rounds)  # no two numbers have the same noise
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) < 5 / math.sqrt(count)  # nor two rounds


@pytest.mark.slow
def test_each_release_has_the_noise_of_its_share_and_together_they_have_the_budget() -> None:
    release, state, start = release_of(
        "method.name=lora_fair", "privacy.clip_norm=0.5", "privacy.clip_quantile=0.5", "privacy.clip_share=0.2",
        "privacy.products_share=0.3", "privacy.products_clip=0.25",
    )  # fmt: skip
    seen: dict[str, list[torch.Tensor]] = {"mean": [], "products": [], "count": []}
    rows = start.repeat(3, 1)  # nothing but noise is released
    real_stand_ins, real_adapt = release.stand_ins, release.adapt

    def stand_ins(of_round: Any, mean: torch.Tensor) -> Any:
        seen["mean"].append(mean)
        products = of_round.products

        def kept(mean: torch.Tensor) -> Any:
            found = products(mean)
            seen["products"].append(torch.cat([layer.products.flatten() for layer in found.values()]))
            return found

        of_round.products = kept
        return real_stand_ins(of_round, mean)

    def adapt(state: ServerState, of_round: Any) -> None:
        seen["count"].append(torch.tensor(list(of_round.noisy_fractions().values()), dtype=torch.float64))
        bounds = state.clip_bounds.clone() if state.clip_bounds is not None else None
        real_adapt(state, of_round)
        state.clip_bounds = bounds

    release.stand_ins, release.adapt = stand_ins, adapt  # type: ignore[method-assign]
    for state.completed_rounds in range(400):
        release(state, LAYOUT, start, results_of(rows))
    sensitivity = {"mean": 0.5, "products": 0.25 * 0.5**2 / 2, "count": 0.5}
    multipliers = {
        name: float(torch.stack(values).std()) * EXPECTED / sensitivity[name] for name, values in seen.items()
    }
    assert multipliers["mean"] == pytest.approx(SIGMA / math.sqrt(0.5), rel=0.02)
    assert multipliers["products"] == pytest.approx(SIGMA / math.sqrt(0.3), rel=0.02)
    assert multipliers["count"] == pytest.approx(SIGMA / math.sqrt(0.2), rel=0.15)  # one number a round
    assert sum(1 / m**2 for m in multipliers.values()) == pytest.approx(1 / SIGMA**2, rel=0.05)


@pytest.mark.parametrize("method", ["fedit", "lora_fair"])
def test_leaving_a_client_out_moves_each_release_by_at_most_its_bound(method: str) -> None:
    """Neighbouring federations by brute force: the denominator does not follow the number of clients."""
    release, state, start = release_of(f"method.name={method}", "privacy.clip_norm=0.5", "privacy.products_clip=0.3")
    rows = changed(start, 4, 7.0)
    rows[2] = start + 1e6  # one that sends anything

    def released(kept: Sequence[int]) -> torch.Tensor:
        mean, weights = release(state, LAYOUT, start, results_of(rows[kept])).rows, (0.5, 0.5)
        return mean.double().mean(0) if len(mean) == len(weights) else mean[0].double()

    whole = released([0, 1, 2, 3])
    for left_out in range(4):
        moved = released([k for k in range(4) if k != left_out]) - whole
        assert float(moved.norm()) == pytest.approx(0.5 / EXPECTED, rel=1e-4)  # the noise is the same, and cancels


def test_no_client_at_all_is_a_release_of_noise() -> None:
    for method in ("fedit", "lora_fair", "ro_lora"):
        release, state, start = release_of(f"method.name={method}", "privacy.clip_quantile=0.5")
        released = release(state, LAYOUT, start, results_of(start.repeat(0, 1)))
        assert released.rows.isfinite().all()
        moved = released.rows.double().mean(0) - start.double()
        sent = LAYOUT.select(moved, release.experiment.aggregator.sends(0))
        assert float(sent.std()) == pytest.approx(SIGMA / math.sqrt(0.98) / EXPECTED, rel=0.25)
        assert state.clip_bounds is not None
        assert float(state.clip_bounds) != 1.0


def test_what_is_not_sent_gets_no_noise() -> None:
    release, state, start = release_of("method.name=ffa_lora")
    moved = release(state, LAYOUT, start, results_of(changed(start, 3, 1.0))).rows[0] - start
    assert float(LAYOUT.select(moved, ("A",)).norm()) == 0
    assert float(LAYOUT.select(moved, ("B",)).norm()) > 0


def test_parts_have_bounds_of_their_own_and_move_by_themselves() -> None:
    release, state, start = release_of(
        "method.name=fedit", "privacy.clip_norm=3", "privacy.clip_parts={A: 1, B: 2, head: 2}",
        "privacy.clip_quantile=0.5", "privacy.noise_multiplier=0",
    )  # fmt: skip
    assert state.clip_bounds is not None
    assert state.clip_bounds.tolist() == pytest.approx([1, 2, 2])
    rows = start.repeat(3, 1)
    LAYOUT.unpack(rows).factors["a"].A.add_(10)  # beyond the bound of A; nothing else moves
    released = release(state, LAYOUT, start, results_of(rows))
    moved = LAYOUT.select(released.rows[0] - start, ("A",))
    assert released.metrics["privacy/clip_norm"] == pytest.approx(3)
    assert released.metrics["privacy/clip_fraction"] == 1
    assert float(moved.norm()) == pytest.approx(3 / EXPECTED, rel=0.7)
    larger, *smaller = (state.clip_bounds / torch.tensor([1.0, 2.0, 2.0])).tolist()
    assert larger > 1 > max(smaller)


def test_a_run_that_cannot_learn_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    release, state, start = release_of("method.name=fedit", "privacy.clip_norm=0.001")
    rows = changed(start, 3, 1.0)
    LAYOUT.unpack(rows).factors["a"].A.copy_(LAYOUT.unpack(start).factors["a"].A)
    LAYOUT.unpack(rows).factors["b"].A.copy_(LAYOUT.unpack(start).factors["b"].A)
    with caplog.at_level("WARNING", logger="lorafair"):
        for state.completed_rounds in range(4):
            release(state, LAYOUT, start, results_of(rows))
        assert not caplog.messages
        for state.completed_rounds in range(4, 12):
            release(state, LAYOUT, start, results_of(rows))
    begins = ["every contribution is clipped", "the noise on A is over 100 times", "A is trained and "]
    for begin, text in zip(begins, caplog.messages, strict=True):
        assert text.startswith(f"privacy: for 5 rounds {begin}")


def test_noise_far_above_the_signal_and_bounds_far_above_the_updates_are_said(caplog: pytest.LogCaptureFixture) -> None:
    release, state, start = release_of("method.name=fedit", "privacy.clip_norm=1000")
    with caplog.at_level("WARNING", logger="lorafair"):
        for state.completed_rounds in range(6):
            release(state, LAYOUT, start, results_of(changed(start, 3, 1.0)))
    begins = ["nothing is clipped", *(f"the noise on {part} is over 100 times" for part in ("A", "B", "head"))]
    for begin, text in zip(begins, caplog.messages, strict=True):
        assert text.startswith(f"privacy: for 5 rounds {begin}")


def test_the_signal_to_noise_is_that_of_the_mean() -> None:
    release, state, start = release_of("method.name=fedit", "privacy.clip_norm=50")
    rows = changed(start, 3, 2.0)
    released = release(state, LAYOUT, start, results_of(rows))
    mean = LAYOUT.select((rows.double() - start.double()).sum(0) / EXPECTED, ("B",))
    noise = 50 * SIGMA / EXPECTED * math.sqrt(mean.numel())
    assert released.metrics["privacy/signal_to_noise/B"] == pytest.approx(float(mean.norm()) / noise, rel=1e-6)
    assert released.metrics["privacy/noise_std"] == pytest.approx(50 * SIGMA / EXPECTED)
    assert released.metrics["privacy/norm_median"] == pytest.approx(2.0, rel=1e-5)
    assert released.metrics["privacy/norm"] == pytest.approx(2.0, rel=1e-5)
    part = (LAYOUT.select(rows.double() - start.double(), ("B",))).norm(dim=1).mean()
    assert released.metrics["privacy/norm/B"] == pytest.approx(float(part))
    assert released.counts == {"privacy_updates": 3, "privacy_clipped": 0}


def final_of(folder: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(folder)[-1]).tensors["adapter"]


@pytest.mark.slow
def test_a_round_in_which_every_client_fails_goes_on_with_noise(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the run ends must not tell what single clients have."""
    train = federation_module.train_clients

    def broken(*arguments: Any) -> torch.Tensor:
        rows: torch.Tensor = train(*arguments)
        rows[:, 3] = float("nan")
        return rows

    monkeypatch.setattr(federation_module, "train_clients", broken)
    config = tiny(*PRIVATE, "method.name=fedit")
    run_federation(launched(1), config)
    assert final_of(config.folder).isfinite().all()
    assert "warning: client noisy returned NaN or infinity" in capsys.readouterr().out
    assert json.loads((config.folder / "result.json").read_text())["totals"]["dropped"] == 6
    assert "train/loss" not in read_metrics(config.folder)


def test_rounds_in_which_every_client_fails_are_void_and_rounds_without_a_client_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for dropped in ((), (0, 1, 2)):
        release, state, start = release_of("method.name=fedit")
        results = replace(results_of(start.repeat(0, 1)), dropped=dropped)
        for state.completed_rounds in range(5):
            release(state, LAYOUT, start, results)
        printed = capsys.readouterr().out
        assert ("for 5 rounds the noise on B is over 100 times as large as its signal" in printed) == bool(dropped)
        assert "no gradient" not in printed


@pytest.mark.slow
def test_noise_of_the_system_does_not_repeat_and_the_run_says_so(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a target ε, which the curve reaches in the last round and not before."""
    found = []
    for name in ("one", "other"):
        config = tiny(
            "privacy.unit=client", "privacy.epsilon=20", "privacy.noise_source=system", "federation.weighting=uniform",
            "privacy.clip_quantile=0.5", f"run_dir={tmp_path / name}",
        )  # fmt: skip
        run_federation(launched(1), config)
        found.append(final_of(config.folder))
        privacy = json.loads((config.folder / "result.json").read_text())["privacy"]
        assert privacy["repeats"] is False
        assert privacy["sampling_probability"] == 1
        assert 19.9 < privacy["epsilon"] <= 20
        first, last = (read_metrics(config.folder)["privacy/epsilon"][done] for done in (1, 2))
        assert first < last == privacy["epsilon"]
        printed = capsys.readouterr().out
        assert (
            "privacy: noise and samples come from the operating system's generator; this run does not repeat" in printed
        )
        assert "ε = 20 at δ = 1e-05 for each client" in printed
    assert not torch.equal(*found)


@pytest.mark.slow
def test_what_the_accountant_counts_with_cannot_change_in_a_run(tiny: Tiny) -> None:
    for key in ("privacy.clip_norm", "federation.clients_per_round", "partition.scheme"):
        with pytest.raises(ConfigError, match=rf"accept: {key} cannot differ with privacy.unit=client"):
            check_run(tiny(*PRIVATE, f"accept=[{key}]"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("compression.up=topk", "compression.bits=4")])
def test_the_run_without_a_client_differs_by_at_most_the_bound(
    more: Sequence[str], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brute force with a model that is trained: everything after the sum is the same function of it."""
    options = (*PRIVATE[:1], *PRIVATE[2:], "privacy.noise_multiplier=0", "privacy.clip_norm=0.05", "rounds=1")
    train, left_out = federation_module.train_clients, [-1]

    def without_one(experiment: Any, state: Any, plan: Any, *others: Any) -> torch.Tensor:
        rows: torch.Tensor = train(experiment, state, plan, *others)
        for index, client in enumerate(plan.clients_of_rank[0]):
            if client in left_out:
                rows[index, 0] = float("nan")
        return rows

    monkeypatch.setattr(federation_module, "train_clients", without_one)
    found = []
    for left_out[0] in (-1, 1):
        config = tiny(*options, *more, "method.name=fedit", f"run_dir={tmp_path / str(left_out[0])}")
        run_federation(launched(1), config)
        found.append(final_of(config.folder).double())
    whole, without = found
    assert float((whole - without).norm()) == pytest.approx(0.05 / 3, rel=1e-3)  # all three are clipped

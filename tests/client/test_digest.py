"""The digest of what a client's training reads: different wherever it may come out different."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafair.client import digest, training
from lorafair.client.digest import digests_of
from lorafair.client.training import Trainer
from lorafair.config.identity import flatten
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.experiment import build_experiment
from lorafair.server.state import start_or_resume
from tests.conftest import TINY, launched

Tiny = Callable[..., Config]
SMALL = ("data.train_images=16", "data.test_images=8", "model.prefix_cache=never", "model.lora.dropout=0.1")
SKEWED = ("partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=3")


def trainer_of(config: Config) -> Trainer:
    experiment, _ = build_experiment(launched(1), config)
    experiment.open_inputs()
    return Trainer.of_round(experiment, start_or_resume(experiment, None))


def digests(trainer: Trainer) -> dict[Any, str]:
    return digests_of(trainer, [(0,), (1, 2)])


@pytest.fixture
def trainer(tiny: Tiny) -> Trainer:
    return trainer_of(tiny(*SMALL))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    """The digests of the plain training."""
    return digests(trainer_of(load_config([*TINY, f"run_dir={tmp_path_factory.mktemp('plain')}", *SMALL])))


def test_the_same_training_has_the_same_digests_and_every_cohort_its_own(trainer: Trainer, tiny: Tiny) -> None:
    assert digests(trainer) == digests(trainer_of(tiny(*SMALL, "rounds=7", "evaluation.batch_size=8")))
    assert len(set(digests(trainer).values())) == 2
    assert not set(digests_of(trainer, [(1,), (2, 1), (0, 1)]).values()) & set(digests(trainer).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["method.name=lora_fair", "method.align=true"], ["method.name=flora"], ["method.name=fedsa_lora"],
        ["method.name=local_only"], ["federation.head_weighting=class", "federation.weighting=uniform"],
        ["server.optimizer=fedadam"], ["evaluation.average_rounds=2"], ["federation.initialization=local"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_the_server_does_with_the_clients_is_not_read(
    plain: dict[Any, str], tiny: Tiny, options: list[str]
) -> None:
    assert digests(trainer_of(tiny(*SMALL, *options))) == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["client.learning_rate=0.004"], ["client.optimizer=sgd"], ["client.proximal=0.1"], ["client.steps=3"],
        ["client.clip_norm=1"], ["client.batch_size=8"], ["client.seed=5"], ["model.seed=5"], ["seed=5"],
        ["client.schedule=cosine", "client.final_fraction=0.5"], ["client.b_learning_rate_ratio=2"],
        ["client.scaffold=true", "client.optimizer=sgd"], ["model.lora.dropout=0.2"], ["model.lora.dropout=0"],
        ["model.lora.alpha=5"], ["model.lora.rank=2"], ["model.lora.last_blocks=1"],
        ["model.lora.client_ranks=[4,2,1]"],
        ["model.normalization=clip"], ["model.prefix_cache=auto"], [*SKEWED], [*SKEWED, "partition.alpha=0.3"],
        ["data.train_images=15"], ["data.augmentation=flip"], ["fabric.precision=bf16-mixed"],
        ["fabric.precision=bf16-true"],
        ["method.name=ffa_lora"], ["method.name=fed_sb"], ["method.name=centralized"],
        ["model.lora.initialization=pissa"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_a_client_trains_with_is_read(plain: dict[Any, str], tiny: Tiny, options: list[str]) -> None:
    changed = trainer_of(tiny(*SMALL, *options))
    cohorts = [(0,)] if "method.name=centralized" in options else [(0,), (1, 2)]
    found = digests_of(changed, cohorts)
    assert len(found) == len(cohorts)
    assert not set(found.values()) & set(plain.values())


def test_every_setting_is_read_but_those_that_are_named(trainer: Trainer) -> None:
    before = digests(trainer)
    identity = {**flatten(trainer.experiment.identity), "privacy.noise": None, "federation.deadline": None}
    for key in identity:
        trainer.experiment.identity = {**identity, key: "something else"}
        unread = key.split(".")[0] in ("method", "server", "defence", "evaluation") or key in (
            "federation.head_weighting", "federation.weighting", "federation.clients_per_round",
            "federation.initialization",
        )  # fmt: skip
        trainer.experiment.identity.pop("privacy.noise") if key != "privacy.noise" else None
        trainer.experiment.identity.pop("federation.deadline") if key != "federation.deadline" else None
        assert (digests(trainer) == before) == unread, key


def test_the_start_and_the_frozen_weights_are_read_to_the_last_bit(trainer: Trainer) -> None:
    before, state = digests(trainer), trainer.state
    start = state.adapter.clone()
    state.adapter[7] = torch.nextafter(start[7], torch.tensor(9.0))
    assert not set(digests(trainer).values()) & set(before.values())
    state.adapter = start
    assert digests(trainer) == before
    weight = next(iter(trainer.experiment.model.adapters.base_weights().values()))
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    state.folded = True
    folded = digests(trainer)
    weight[0, 1] = torch.nextafter(weight[0, 1], torch.tensor(9.0))
    again = digests(trainer)
    assert len({*before.values(), *folded.values(), *again.values()}) == 6


def test_what_is_not_known_is_read_and_what_has_no_digest_is_not_shared(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(trainer)

    @dataclasses.dataclass(frozen=True)
    class More(training.Cohort):
        more: Any = None

    def with_more(value: Any) -> Callable[..., More]:
        def cohort_of(self: Trainer, cohort: Any, steps: Any) -> More:
            made = original(self, cohort, steps)
            fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
            return More(**fields, more=value)

        return cohort_of

    original = Trainer.cohort_of
    seen = [set(before.values())]
    for value in (None, 1.0, 2.0, torch.ones(2), torch.zeros(2), torch.Generator()):
        monkeypatch.setattr(Trainer, "cohort_of", with_more(value))
        seen.append(set(digests(trainer).values()))
    assert len(set.union(*seen)) == 2 * len(seen)
    monkeypatch.setattr(Trainer, "cohort_of", with_more(lambda: 0))
    assert digests(trainer) == {}
    monkeypatch.setattr(Trainer, "cohort_of", original)
    tensors = trainer.state.tensors()
    monkeypatch.setattr(trainer.state, "tensors", lambda: {**tensors, "residual": torch.zeros(1)})
    assert not set(digests(trainer).values()) & set(before.values())
    monkeypatch.undo()
    assert digests(trainer) == before
    assert digests(dataclasses.replace(trainer, rules=(lambda *_: None,))) == {}  # type: ignore[arg-type, return-value]


def test_arithmetic_and_code_are_read(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(trainer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert digests(trainer) != before
    monkeypatch.undo()
    monkeypatch.setattr(digest, "code_sha256", lambda: "of another version")
    assert digests(trainer) != before
    monkeypatch.undo()
    trainer.state.completed_rounds += 1
    assert digests(trainer) != before


def test_a_penalty_of_the_method_is_not_shared(tiny: Tiny) -> None:
    pruning = ("method.name=het_lora", "method.pruning=0.5", "method.pruning_penalty=0.1")
    assert digests(trainer_of(tiny(*SMALL, *pruning))) == {}


PLUGIN = """
from dataclasses import dataclass
import lorafair

@lorafair.register_method("mine")
@dataclass(frozen=True)
class Mine(lorafair.Aggregator):
    def combine(self, clients, weights, start=None):
        return lorafair.LayerUpdate(lorafair.LoRAFactors(A=clients.A.mean(0), B=clients.B.mean(0)))
"""


def test_the_file_of_a_plug_in_is_read(trainer: Trainer, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    with_plugin = trainer_of(tiny(*SMALL, f"plugins=[{file}]", "method.name=mine"))
    before = digests(with_plugin)
    assert not set(before.values()) & set(digests(trainer).values())
    key, names = "plugins", with_plugin.experiment.identity["plugins"]
    changed = {**with_plugin.experiment.identity, key: dict.fromkeys(names, "0")}
    with_plugin.experiment.identity = changed
    assert not set(digests(with_plugin).values()) & set(before.values())

"""The whole round: the same numbers on any number of ranks, after any interruption, and with clients that fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lorafair
import lorafair.federation as federation_module
from lorafair import experiment
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.checkpointing import lock as lock_module
from lorafair.checkpointing.checkpoint import BASE, list_checkpoints, load_checkpoint, save_checkpoint
from lorafair.checkpointing.lock import acquire
from lorafair.client.cohort import LocalTraining
from lorafair.communication import collectives
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.errors import LorafairError
from lorafair.experiment import build_experiment
from lorafair.federation import run_federation
from lorafair.launch import make_fabric
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import LoRAFactors
from lorafair.model.backbone import build_model, create_backbone
from lorafair.model.side_by_side import NUMBERS_OF_STEP, cohort_size
from lorafair.registry import METHODS
from lorafair.server.state import ServerState
from lorafair.virtual_time.record import RoundWork, read_work
from tests.conftest import damaged_folder, launched, run_ranks

Tiny = Callable[..., Config]


@dataclass(frozen=True)
class Stacking(Aggregator):
    """As in FLoRA (2409.05976): every client's update is merged into the frozen weights, factors start anew."""

    @property
    def folds(self) -> bool:
        return True

    def combine(self, clients: LoRAFactors, weights: torch.Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        A = (clients.A * weights.view(-1, 1, 1).to(clients.A)).flatten(0, 1)  # (K*R, I)
        B = clients.B.transpose(0, 1).flatten(1)  # (O, K*R)
        start = LoRAFactors(A=clients.A.mean(0), B=torch.zeros_like(clients.B[0]))
        return LayerUpdate(factors=start, folded=LoRAFactors(A=A, B=B))


def run(fabric: Any, arguments: Sequence[str], stop_after: int | None = None) -> None:
    """Run a federation on a rank; with stop_after, end it abruptly once so many rounds are saved."""
    METHODS.add("stacking", Stacking)
    config = load_config(arguments)
    if config.fabric.precision != "32-true":  # that of the world's Fabric
        fabric = make_fabric(dataclasses.replace(config.fabric, devices=fabric.world_size))
        fabric.launch()
    if stop_after is not None:
        save = federation_module.save

        def save_and_stop(experiment: Any, state: Any, *, always: bool = False) -> None:
            save(experiment, state, always=always)
            if state.completed_rounds == stop_after:
                raise KeyboardInterrupt

        federation_module.save = save_and_stop
        try:
            run_federation(fabric, config)
        except KeyboardInterrupt:
            pass
        finally:
            federation_module.save = save
    else:
        run_federation(fabric, config)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(folder)[-1]).tensors


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


TINY = (
    "data.source=synthetic", "model.name=test_vit", "model.weights=random", "model.image_size=32", "model.lora.rank=4",
    "model.lora.last_blocks=2", "client.optimizer=adamw", "client.learning_rate=0.005", "client.batch_size=16",
    "fabric.accelerator=cpu", "checkpoint.every=1", "rounds=2", "data.train_images=40", "data.test_images=24",
)  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {
    "fedit": ("method.name=fedit",),
    "lora_fair": ("method.name=lora_fair",),
    "lora_fair_sgd": ("method.name=lora_fair", "method.solver=sgd", "method.sgd_steps=20"),
    "lora_fair_aligned": ("method.name=lora_fair", "method.align=true", "method.fold=true", "method.residual=both"),
    **{name: (f"method.name={name}",) for name in (
        "ffa_lora", "ro_lora", "flora", "flex_lora", "fedex_lora", "fedsvd", "het_lora", "florist", "raflora",
        "fedrot_lora", "fedrpca", "fedsa_lora", "flora_na", "fedmomentum",
        "frlora", "ravan", "fed_sb", "glora",
    )},
    "la_lora": (
        "method.name=la_lora", "client.epochs=3", "partition.scheme=dirichlet", "partition.clients_per_domain=2",
        "partition.min_images=5", "federation.clients_per_round=4", "client.cohort=2", "model.lora.dropout=0.1",
    ),
    "fedask": ("method.name=fedask", "method.freeze_a=false", "model.lora.client_ranks=[4,2,1]"),
    "fedrot_lora_in_turns": ("method.name=fedrot_lora", "method.turns=true", "rounds=3"),
    "coded_fold": (
        "method.name=lora_fair", "method.fold=true", "method.fold_bits=4", "method.fold_rank=16", "rounds=3",
        "federation.head_weighting=class",
    ),
    "coded_mixed_ranks": (
        "method.name=fedex_lora", "method.fold_bits=3", "model.lora.client_ranks=[1,4]",
        "model.lora.client_rank_probabilities=[0.5,0.5]", "partition.scheme=dirichlet",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=3",
    ),
    "mixed_ranks": ("method.name=lora_fair", "model.lora.client_ranks=[4,2,1]"),
    "own_scaling": (
        "method.name=lora_fair", "method.solver=sgd", "method.sgd_start=xavier", "method.sgd_steps=5",
        "model.lora.client_ranks=[4,2,1]", "model.lora.client_scaling=own", "data.antialias=false",
    ),
    "pissa": ("method.name=lora_fair", "model.lora.initialization=pissa"),
    "olora": ("method.name=frlora", "model.lora.initialization=olora", "server.optimizer=fedavgm"),
    "ravan_partial": (
        "method.name=ravan", "method.heads=2", "partition.scheme=dirichlet", "partition.clients_per_domain=2",
        "partition.min_images=5", "federation.clients_per_round=3", "client.cohort=2", "client.optimizer=sgd",
        "client.scaffold=true", "model.lora.dropout=0.1",
    ),
    "fed_plora": (
        "method.name=fed_plora", "model.lora.client_ranks=[1,3]", "model.lora.client_rank_probabilities=[0.5,0.5]",
        "partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=4", "client.cohort=2", "client.clip_norm=0.5",
    ),
    "het_lora_pruning": (
        "method.name=het_lora", "method.pruning=0.5", "method.pruning_penalty=3", "rounds=3",
        "partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=4", "client.cohort=2", "client.optimizer=sgd",
    ),
    "defended": (
        "method.name=lora_fair", "attack.name=sign_flip", "attack.share=0.3", "defence.name=multi_krum",
        "defence.share=0.3", "partition.scheme=iid", "partition.clients=7", "client.cohort=2",
    ),
    "norm_bounding": (
        "method.name=fedex_lora", "attack.name=backdoor", "defence.name=norm_bounding", "partition.scheme=iid",
        "partition.clients=6", "federation.clients_per_round=4", "client.cohort=2",
    ),
    "entry_median": (
        "method.name=ravan", "attack.name=label_flip", "defence.name=entry_median", "partition.scheme=iid",
        "partition.clients=5",
    ),
    "rbla": ("method.name=rbla", "model.lora.client_ranks=[4,2,1]"),
    "mixed_stack": (
        "method.name=flora", "model.lora.client_ranks=[1,4]", "model.lora.client_rank_probabilities=[0.5,0.5]",
        "partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=3", "client.cohort=2",
    ),
    "fed_alora": (
        "method.name=fed_alora", "partition.scheme=dirichlet", "partition.clients_per_domain=2",
        "partition.min_images=5", "federation.clients_per_round=3", "client.cohort=2", "client.optimizer=sgd",
    ),
    "fedsa_partial": (
        "method.name=fedsa_lora", "partition.scheme=dirichlet", "partition.clients_per_domain=2",
        "partition.min_images=5", "federation.clients_per_round=3", "client.cohort=2", "client.optimizer=sgd",
    ),
    "server_adam": ("method.name=lora_fair", "server.optimizer=fedadam", "client.schedule=cosine"),
    "server_momentum": ("method.name=ro_lora", "server.optimizer=fedavgm", "client.proximal=0.1", "rounds=3"),
    "scaffold": (
        "method.name=lora_fair", "client.scaffold=true", "client.optimizer=sgd", "client.b_learning_rate_ratio=4",
        "partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=3", "client.cohort=2", "rounds=3",
    ),
    "q_weighting": (
        "method.name=lora_fair", "federation.weighting=q", "client.optimizer=sgd", "partition.scheme=dirichlet",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=4", "client.cohort=2",
    ),
    "afl": (
        "method.name=fedit", "federation.weighting=afl", "partition.scheme=dirichlet", "rounds=3",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=4", "client.cohort=2",
    ),
    "class_head": (
        "method.name=flex_lora", "federation.head_weighting=class", "model.lora.client_ranks=[4,1]",
        "model.lora.client_rank_probabilities=[0.5,0.5]", "partition.scheme=dirichlet", "partition.alpha=0.1",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=3",
    ),
    "late_clients": (  # some rounds have late clients, one has clients that are away, and one waits for the deadline
        "method.name=fedex_lora", "federation.profile=phones_4g", "federation.over_selection=2",
        "federation.deadline_seconds=0.09", "partition.scheme=iid", "partition.clients=9",
        "federation.clients_per_round=3", "client.cohort=2", "rounds=4",
    ),
    "private_clients": (
        "method.name=lora_fair", "privacy.unit=client", "privacy.noise_multiplier=0.3", "privacy.clip_quantile=0.6",
        "privacy.clip_parts={A: 2, B: 1, head: 1}", "federation.weighting=uniform", "partition.scheme=dirichlet",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=3",
        "client.cohort=2", "rounds=3",
    ),
    "private_turns": (
        "method.name=ro_lora", "privacy.unit=client", "privacy.noise_multiplier=0.3", "privacy.clip_norm=0.2",
        "federation.weighting=uniform", "partition.scheme=iid", "partition.clients=4",
        "federation.clients_per_round=1", "federation.seed=3", "server.optimizer=fedadam", "rounds=3",
        "compression.up=int4", "compression.client_error_feedback=true",
    ),
    "centralized": ("method.name=centralized",),
    "local_only": ("method.name=local_only",),
    "folding": ("method.name=stacking",),
    "averaged_rounds": (
        "method.name=lora_fair", "evaluation.average_rounds=2", "evaluation.average_parts=all", "rounds=3",
    ),
    "fresh": ("federation.initialization=fresh",),
    "local": ("federation.initialization=local",),
    "partial": (
        "partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=4", "client.cohort=2", "model.lora.dropout=0.1",
    ),
    "side_by_side": (
        "client.cohort=auto", "partition.scheme=iid", "partition.clients=34", "client.batch_size=4", "rounds=1",
        "model.gradient_checkpointing=true", "model.compile=eager",
    ),
    "augmented": (
        "data.augmentation=crop_flip", "data.resident=true", "partition.scheme=iid", "partition.clients=4",
        "client.cohort=2", "client.epochs=2",
    ),
    "private_examples": (
        "method.name=lora_fair", "privacy.unit=example", "privacy.epsilon=30", "privacy.clip_norm=0.5",
        "model.lora.client_ranks=[4,2]", "model.lora.client_rank_probabilities=[0.5,0.5]", "model.lora.dropout=0.1",
        "partition.scheme=dirichlet", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=4", "client.cohort=2", "client.batch_size=4", "compression.up=topk",
        "compression.client_error_feedback=true",
    ),
    "compressed": (
        "method.name=lora_fair", "compression.up=topk", "compression.down=topk", "compression.bits=4", "rounds=3",
        "compression.head=int4",
        "federation.head_weighting=class", "client.cohort=2", "partition.scheme=iid", "partition.clients=4",
    ),
    "compressed_partial": (
        "method.name=flex_lora", "compression.up=randomk", "compression.down=ternary", "compression.fraction=0.25",
        "compression.rounding=stochastic", "compression.client_error_feedback=true", "partition.scheme=dirichlet",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=3",
        "client.cohort=2", "rounds=3",
    ),
    "compressed_mixed": (
        "method.name=fed_plora", "model.lora.client_ranks=[1,3]", "compression.up=topk", "compression.down=int4",
        "model.lora.client_rank_probabilities=[0.5,0.5]", "partition.scheme=dirichlet", "rounds=3",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=4",
        "client.cohort=2", "compression.client_error_feedback=true",
    ),
    "compressed_fold": (
        "method.name=fedex_lora", "compression.folded=int4", "compression.down=float16", "compression.up=int8",
        "model.lora.client_ranks=[4,2,1]",
    ),
    "compressed_coded": (
        "method.name=lora_fair", "method.fold=true", "method.fold_bits=4", "compression.down=int8",
        "compression.up=bfloat16",
    ),
    "compressed_cores": ("method.name=ravan", "method.heads=2", "compression.up=int4", "compression.down=unary"),
    "compressed_personal": ("method.name=fedsa_lora", "compression.up=ternary", "compression.down=randomk"),
    "compressed_turns": (
        "method.name=ro_lora", "compression.up=unary", "compression.down=topk", "rounds=3", "server.optimizer=fedavgm",
    ),
    "bf16_true": (
        "fabric.precision=bf16-true", "method.name=fedex_lora", "partition.scheme=dirichlet",
        "partition.clients_per_domain=2", "partition.min_images=5", "federation.clients_per_round=4", "client.cohort=2",
        "model.lora.dropout=0.1",
    ),
    "bf16_true_private": (
        "fabric.precision=bf16-true", "method.name=ravan", "privacy.unit=example", "privacy.noise_multiplier=1",
        "model.gradient_checkpointing=true", "client.batch_size=8", "data.train_images=16",
    ),
    "no_cache": ("model.prefix_cache=never", "partition.scheme=iid", "partition.clients=4", "data.workers=1"),
}  # fmt: skip


def run_all(
    fabric: Any,
    variants: Sequence[str],
    folder: Path,
    world: str,
    stop_after: int | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """Run these variants one after the other; returns the checkpoints each has left."""
    left = []
    for variant in variants:
        run_dir = folder / variant / world
        run(fabric, [*TINY, *VARIANTS[variant], f"run_dir={run_dir}", *more], stop_after)
        left.append(list_checkpoints(run_dir)[-1].name)
    return left


NOT_SHARDED = {
    "local", "het_lora_pruning", "client.scaffold=true", "method.name=fedsa_lora", "method.name=fed_alora",
    "method.name=local_only",
}  # fmt: skip
SHARDED = [
    name for name, options in VARIANTS.items()
    if not NOT_SHARDED & {name, *options}
    and name not in ("side_by_side", "augmented", "no_cache")  # of local training alone, and slow to start
]  # fmt: skip


@pytest.fixture(scope="module")
def all_variants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chosen variants on 1, 2 and 3 ranks, stopped on 1 to be continued on 2, and with a sharded server."""
    items: list[Any] = request.session.items
    chosen = [i.callspec.params["variant"] for i in items if "all_variants" in getattr(i, "fixturenames", ())]
    folder = tmp_path_factory.mktemp("variants")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        for ranks in (1, 2, 3):
            run_ranks(ranks, run_all, chosen, folder, str(ranks), seconds=600)
        [stopped] = run_ranks(1, run_all, chosen, folder, "resumed", 1, seconds=600)
        assert set(stopped) == {"round_000001"}
        run_ranks(2, run_all, chosen, folder, "resumed", seconds=600)
        sharded = [variant for variant in chosen if variant in SHARDED]
        run_ranks(3, run_all, sharded, folder, "sharded", None, ["fabric.server=sharded"], seconds=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_on_1_2_and_3_ranks_and_after_a_resume_on_another_number(
    variant: str, all_variants: Path
) -> None:
    folder = all_variants / variant
    expected = adapter_of(folder / "1")
    for other in ("2", "3", "resumed", *(["sharded"] if variant in SHARDED else [])):
        assert_same_bits(adapter_of(folder / other), expected)
        results = [json.loads((folder / name / "result.json").read_text()) for name in ("1", other)]
        assert results[0]["accuracy"] == results[1]["accuracy"]
        assert results[0]["mean_loss"] == results[1]["mean_loss"]
        assert results[0]["clients"] == results[1]["clients"]
        assert [results[0][f"mean_{kind}"] for kind in ("macro_f1", "calibration_error")] == [
            results[1][f"mean_{kind}"] for kind in ("macro_f1", "calibration_error")
        ]
        if other != "resumed":
            assert server_scalars(folder / other) == server_scalars(folder / "1")
        assert recorded_work(folder / other) == recorded_work(folder / "1")


def recorded_work(run_dir: Path) -> list[RoundWork]:
    """All of it but measured seconds."""
    return [dataclasses.replace(work, server_seconds=0.0) for work in read_work(run_dir)]


def server_scalars(run_dir: Path) -> list[str]:
    return [line for line in (run_dir / "metrics.csv").read_text().splitlines() if ",server/" in line]


def test_training_helps_and_leaves_everything_to_look_at(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("rounds=8", "data.train_images=120")
    run_federation(launched(1), config)
    result = json.loads((config.folder / "result.json").read_text())
    assert result["mean_accuracy"] > 0.55  # chance: 0.25
    assert set(result["accuracy"]) == {"plain", "noisy", "inverted"}
    names = {line.split(",")[1] for line in (config.folder / "metrics.csv").read_text().splitlines()[1:]}
    assert names >= {
        "train/loss", "train/loss/plain", "train/learning_rate", "eval/accuracy", "eval/accuracy/noisy", "eval/loss",
        "server/error_before", "server/error_after", "server/cosine_before", "server/cosine_after",
        "server/norm_ratio", "server/correction_ratio", "server/error_after/blocks.5.attn.proj",
        "server/dropped_clients", "comm/up_bytes", "comm/down_bytes", "comm/total_bytes", "time/train", "time/gather",
        "time/server", "time/broadcast", "time/evaluate", "time/idle_fraction/rank0",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "round 8/8" in printed
    assert any(line.startswith("mean ") for line in printed.splitlines()[-8:])
    assert load_config([str(config.folder / "config.yaml")]) == config


@pytest.mark.slow
def test_a_finished_run_says_so_and_computes_nothing_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny()
    run_federation(launched(1), config)
    first = adapter_of(config.folder), (config.folder / "metrics.csv").read_text()
    table = capsys.readouterr().out.split("seed 0\n")[1]
    monkeypatch.setattr(experiment, "open_inputs", lambda *_: pytest.fail("something is computed again"))
    run_federation(launched(1), config)
    printed = capsys.readouterr().out
    assert "this run was finished before, with 2 rounds" in printed
    assert printed.split("seed 0\n")[1] == table
    assert_same_bits(adapter_of(config.folder), first[0])
    assert (config.folder / "metrics.csv").read_text() == first[1]


@pytest.mark.slow
def test_a_run_whose_result_is_lost_is_evaluated_again(tiny: Tiny) -> None:
    config = tiny()
    run_federation(launched(1), config)
    result = json.loads((config.folder / "result.json").read_text())
    (config.folder / "result.json").unlink()
    run_federation(launched(1), config)
    assert json.loads((config.folder / "result.json").read_text())["domains"] == result["domains"]


@pytest.mark.slow
def test_more_rounds_continue_a_finished_run(tiny: Tiny, tmp_path: Path) -> None:
    run_federation(launched(1), tiny("rounds=1"))
    run_federation(launched(1), tiny("rounds=3"))
    continued = adapter_of(tiny().folder)
    run_federation(launched(1), tiny("rounds=3", f"run_dir={tmp_path / 'whole'}"))
    assert_same_bits(continued, adapter_of(tmp_path / "whole"))


@pytest.mark.slow
def test_another_configuration_does_not_continue_a_run(tiny: Tiny) -> None:
    run_federation(launched(1), tiny("rounds=1"))
    with pytest.raises(LorafairError, match=r"model\.lora\.rank is 4 there and 8 here.*resume=never"):
        run_federation(launched(1), tiny("model.lora.rank=8"))
    run_federation(launched(1), tiny("model.lora.rank=8", "resume=never", "rounds=1"))


@pytest.mark.slow
def test_a_run_that_continues_from_another_directory_has_no_numbers_of_before_and_no_damage(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_federation(launched(1), tiny("rounds=1"))
    there = tmp_path / "there"
    capsys.readouterr()
    run_federation(launched(1), tiny("rounds=2", f"run_dir={there}", f"resume={tiny().folder}"))
    printed = capsys.readouterr().out
    assert f"\n{there} has no numbers of rounds before round 2\n" in printed
    assert "warning" not in printed
    rounds = {line.split(",")[0] for line in (there / "metrics.csv").read_text().splitlines()}
    assert rounds == {"round", "2"}
    assert in_checkpoints(there) == ["round_000002"]


@pytest.mark.slow
def test_a_run_directory_in_use_is_refused_and_not_moved(tiny: Tiny) -> None:
    config = tiny("rounds=1")
    run_federation(launched(1), config)
    before = {file: file.stat().st_mtime_ns for file in config.folder.rglob("*")}
    held = acquire(config.folder)
    for resume in ("auto", "never"):
        with pytest.raises(LorafairError, match=rf"run_dir={config.folder} is in use by process {held.holder.pid} on "):
            run_federation(launched(1), tiny(f"resume={resume}", "rounds=2"))
    held.release()
    assert {file: file.stat().st_mtime_ns for file in config.folder.rglob("*")} == before
    assert [path.name for path in config.folder.parent.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_run_that_another_one_has_taken_over_writes_nothing_more(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_CHECK_SECONDS", 0.0)
    config, train = tiny("rounds=3"), federation_module.train_clients

    def train_and_lose(experiment: Any, state: Any, *others: Any) -> torch.Tensor:
        if state.completed_rounds == 1:
            text = (config.folder / "run.lock").read_text()
            (config.folder / "run.lock").write_text(text.replace(experiment.lock.holder.token, "another"))
        rows: torch.Tensor = train(experiment, state, *others)
        return rows

    monkeypatch.setattr(federation_module, "train_clients", train_and_lose)
    with pytest.raises(LorafairError, match=r"was taken over by process .*, so this run ends"):
        run_federation(launched(1), config)
    assert [path.name for path in list_checkpoints(config.folder)] == ["round_000001"]
    assert "2,train/loss," not in (config.folder / "metrics.csv").read_text()
    assert (config.folder / "run.lock").exists()  # the other one's


@pytest.mark.slow
def test_a_difference_can_be_accepted_and_tensors_that_do_not_fit_are_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("rounds=1")
    run_federation(launched(1), config)
    other = ("rounds=2", "client.learning_rate=0.001")
    with pytest.raises(LorafairError, match=r"or 'accept=\[client\.learning_rate\]' to go on from it"):
        run_federation(launched(1), tiny(*other))
    run_federation(launched(1), tiny(*other, "accept=[client.learning_rate]"))
    assert "although client.learning_rate is 0.005 there and 0.001 here (accept)" in capsys.readouterr().out
    run_federation(launched(1), tiny(*other))  # it was accepted with the checkpoint
    path = list_checkpoints(config.folder)[-1]
    found = load_checkpoint(path)
    save_checkpoint(config.folder, dataclasses.replace(found, tensors={"adapter": found.tensors["adapter"][:1]}), 9)
    monkeypatch.setattr(experiment, "open_inputs", lambda *_: pytest.fail("tokens are computed before"))
    of_what = "^the checkpoint after round 2 that this run continues from does not fit this run: "
    with pytest.raises(LorafairError, match=rf"{of_what}adapter is float32 \(1,\) there and float32 \("):
        run_federation(launched(1), tiny(*other[1:], "rounds=3"))


def with_nan_from(monkeypatch: pytest.MonkeyPatch, *broken: int) -> None:
    """Let these clients return NaN, as a diverged one does."""
    train = federation_module.train_clients

    def train_and_break(experiment: Any, state: Any, plan: Any, *others: Any) -> torch.Tensor:
        rows: torch.Tensor = train(experiment, state, plan, *others)
        for index, client in enumerate(plan.clients_of_rank[0]):
            if client in broken:
                rows[index, 3] = float("nan")
        return rows

    monkeypatch.setattr(federation_module, "train_clients", train_and_break)


def test_a_client_with_nan_is_left_out_of_the_round(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_nan_from(monkeypatch, 1)
    config = tiny()
    run_federation(launched(1), config)
    assert torch.isfinite(adapter_of(config.folder)["adapter"]).all()
    assert json.loads((config.folder / "result.json").read_text())["totals"]["dropped"] == 2
    assert "warning: client noisy returned NaN or infinity" in capsys.readouterr().out
    assert "2,server/dropped_clients,1.0" in (config.folder / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_when_every_client_fails_the_last_good_state_is_kept(
    every: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_federation(launched(1), tiny("rounds=1", f"checkpoint.every={every}"))
    good = adapter_of(tiny().folder)
    with_nan_from(monkeypatch, 0, 1, 2)
    for _ in range(2):
        with pytest.raises(LorafairError, match=r"round 2: every client returned NaN .* lower client\.learning_rate"):
            run_federation(launched(1), tiny("rounds=3", f"checkpoint.every={every}"))
        assert_same_bits(adapter_of(tiny().folder), good)
        assert in_checkpoints(tiny().folder) == ["round_000001", "unfinished_000002"]


def in_checkpoints(folder: Path) -> list[str]:
    """All that is there of checkpoints, whatever it is; not the record of the images."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


@pytest.mark.slow
def test_when_every_client_fails_in_the_first_round_the_next_start_may_change_what_it_was_told(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as diverging:
        with_nan_from(diverging, 0, 1, 2)
        message = r"round 1: every client returned NaN .* or set client\.clip_norm \(10\.0\)$"
        with pytest.raises(LorafairError, match=message):
            run_federation(launched(1), tiny())
    assert list_checkpoints(tiny().folder) == []
    run_federation(launched(1), tiny("client.learning_rate=0.001"))
    assert in_checkpoints(tiny().folder) == ["round_000001", "round_000002"]


def test_every_rank_knows_what_is_saved_and_rank_0_writes_it(tiny: Tiny) -> None:
    config, state = tiny(), ServerState(completed_rounds=2, adapter=torch.zeros(3))
    rank_1: Any = SimpleNamespace(config=config, fabric=SimpleNamespace(is_global_zero=False))
    federation_module.save(rank_1, state)
    assert state.saved_rounds == 2
    assert not config.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "saved"), [(0.0, [2, 3, 4]), (60.0, [2, 4])], ids=["long rounds", "short rounds"])
def test_short_rounds_are_saved_once_an_interval_and_when_the_run_ends(
    interval: float, saved: list[int], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_federation(launched(1), tiny("rounds=2"))
    monkeypatch.setattr("lorafair.federation.SHORTEST_INTERVAL", interval)
    run_federation(launched(1), tiny("rounds=4", "checkpoint.every=auto", "checkpoint.keep=9"))
    kept = [load_checkpoint(path).completed_rounds for path in list_checkpoints(tiny().folder)]
    assert kept[-len(saved) :] == saved


@pytest.mark.slow
def test_more_processes_than_clients_is_said_and_works(tiny: Tiny, tmp_path: Path) -> None:
    printed = run_ranks(3, captured, [*TINY, "data.domains=[plain, noisy]", f"run_dir={tmp_path}", "rounds=1"])
    assert "warning: 1 of 3 processes have no client to train; fabric.devices x fabric.num_nodes = 2" in printed[0]
    assert printed[1:] == ["", ""]


def captured(fabric: Any, arguments: Sequence[str]) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(fabric, arguments)
    return out.getvalue()


@pytest.mark.slow
def test_initialisations_differ_in_where_clients_start(tiny: Tiny, tmp_path: Path) -> None:
    states = {}
    for initialization in ("average", "fresh", "local"):
        config = tiny(f"federation.initialization={initialization}", f"run_dir={tmp_path / initialization}", "rounds=1")
        run_federation(launched(1), config)
        states[initialization] = adapter_of(config.folder)
    length = states["average"]["adapter"].shape[0]
    assert set(states["average"]) == {"adapter"}
    assert states["local"]["personal_adapters"].shape == (3, length)
    assert torch.equal(states["local"]["adapter"], states["average"]["adapter"])
    assert not torch.equal(states["local"]["personal_adapters"][0], states["local"]["personal_adapters"][1])
    assert {name.partition(".")[0] for name in states["fresh"]} == {"adapter", "base"}
    results = [json.loads((tmp_path / i / "result.json").read_text()) for i in ("average", "fresh", "local")]
    # After round 1 the global model is the same function, whether the update sits in the factors or in W0.
    assert results[1]["mean_loss"] == pytest.approx(results[0]["mean_loss"], rel=1e-5)
    assert results[2]["mean_loss"] == results[0]["mean_loss"]


def test_the_centralised_reference_sees_as_many_images_a_round(tiny: Tiny) -> None:
    work = {}
    for method in ("centralized", "fedit"):
        built, _ = build_experiment(launched(1), tiny(f"method.name={method}", "client.steps=3"))
        steps = built.local.steps
        assert steps is not None
        work[method] = steps * len(built.clients)
    assert work == {"centralized": 9, "fedit": 9}


@pytest.mark.slow
def test_the_frozen_model_is_built_once_and_stays_where_it_is(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients there are, a process has one backbone, which is not copied, sent or saved."""
    built = []

    def build_and_count(*arguments: Any) -> Any:
        built.append(build_model(*arguments))
        return built[-1]

    monkeypatch.setattr(experiment, "build_model", build_and_count)
    config = tiny("partition.scheme=iid", "partition.clients=7")
    run_federation(launched(1), config)
    [model] = built
    numbers = sum(tensor.numel() for tensor in adapter_of(config.folder).values())
    assert numbers == model.adapters.layout.length
    result = json.loads((config.folder / "result.json").read_text())
    assert result["totals"]["bytes"] == 2 * config.rounds * 7 * 4 * numbers  # up and down, float32


@pytest.mark.slow
def test_clients_side_by_side_as_many_as_pay_whatever_the_ranks(tiny: Tiny, tmp_path: Path) -> None:
    def size(clients: int, *changes: str) -> int:
        config = tiny("partition.scheme=iid", f"partition.clients={clients}", *changes)
        model = build_model(config.model, classes=4, seed=0)
        return cohort_size(config, [16] * clients, model, torch.device("cpu"))

    assert [size(clients) for clients in (6, 31, 32, 100)] == [1, 1, 2, 6]  # 16 cohorts at least
    assert size(100, "federation.clients_per_round=40") == 2
    assert size(100, "client.cohort=9") == 9
    per_image = build_model(tiny().model, classes=4, seed=0).numbers_per_image()
    assert size(100_000) == int(NUMBERS_OF_STEP["cpu"] / (16 * per_image))

    rows = []
    for cohort in ("auto", "1"):
        plain = ("model.gradient_checkpointing=false", "model.compile=null", f"client.cohort={cohort}")
        options = [*TINY, *VARIANTS["side_by_side"], *plain, f"run_dir={tmp_path / cohort}"]
        run(launched(1), options)
        rows.append(adapter_of(tmp_path / cohort)["adapter"])
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision_trains_too(precision: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(f"fabric.precision={precision}", "rounds=8", "data.train_images=120", f"run_dir={tmp_path}")
    fabric = make_fabric(config.fabric)
    fabric.launch()
    run_federation(fabric, config)
    assert json.loads((tmp_path / "result.json").read_text())["mean_accuracy"] > 0.5
    assert adapter_of(tmp_path)["adapter"].dtype == torch.float32


def test_a_folding_run_in_bfloat16_leaves_a_float32_model(tiny: Tiny) -> None:
    """Its other weights are those it was built from, unrounded; the two ways to keep tokens give the same bits."""
    options = ("fabric.precision=bf16-true", "method.name=fedex_lora", "model.prefix_cache=always", "fabric.threads=1")
    rows = []
    for kept in ("bfloat16", "float32"):
        config = tiny(*options, f"model.prefix_cache_dtype={kept}", "resume=never")
        result = lorafair.run(config)
        rows.append(adapter_of(result.run_dir))
    assert_same_bits(rows[0], rows[1])
    model, before = result.load_model(), create_backbone(config.model, 4, config.seed).state_dict()
    adapted = [path for path in rows[0] if path.startswith(BASE)]
    assert len(adapted) == 4
    assert all(rows[0][path].dtype == torch.float32 for path in adapted)
    weights = model.state_dict()
    same = {name for name, weight in weights.items() if torch.equal(weight, before[name])}
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert len(weights) - len(same) == 4 + 2  # adapted layers and the head


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_fair", "fedex_lora"])
def test_weights_held_in_half_precision_give_the_bits_of_weights_cast_at_every_step(
    method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layers that are not adapted; a method may add to the others, which needs their float32."""
    common = ("fabric.precision=bf16-mixed", f"method.name={method}", "rounds=2", "model.prefix_cache=never")
    held: list[torch.dtype] = []
    hold = AdaptedModel.hold_frozen_in

    def hold_and_look(model: AdaptedModel, dtype: torch.dtype) -> None:
        hold(model, dtype)
        held.extend(parameter.dtype for parameter in model.parameters() if parameter.dtype == dtype)
        assert all(weight.dtype == torch.float32 for weight in model.adapters.base_weights().values())

    rows = []
    for name, holding in (("held", hold_and_look), ("cast", lambda model, dtype: None)):
        monkeypatch.setattr(AdaptedModel, "hold_frozen_in", holding)
        config = tiny(*common, f"run_dir={tmp_path / name}")
        fabric = make_fabric(config.fabric)
        fabric.launch()
        run_federation(fabric, config)
        rows.append(adapter_of(tmp_path / name)["adapter"])
    assert len(held) > 4
    assert torch.equal(rows[0], rows[1])


def test_a_device_without_room_says_what_to_change_and_keeps_the_finished_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, "client.cohort=2", "rounds=1", f"run_dir={tmp_path / 'run'}"]
    train, cohorts = LocalTraining.train, []

    def train_the_first(self: LocalTraining, cohort: Any, inputs: Any) -> Any:
        cohorts.append(cohort)
        if len(cohorts) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
        return train(self, cohort, inputs)

    monkeypatch.setattr(LocalTraining, "train", train_the_first)
    with pytest.raises(LorafairError) as raised:
        run(launched(1), options)
    message = str(raised.value)
    assert message.startswith("round 1: client ")
    assert (
        "Tried to allocate 2.00 GiB.); set client.cohort=1 (it is 2), or model.gradient_checkpointing=true, or "
        "fabric.precision=bf16-true, or" in message
    )
    assert message.endswith("or a smaller client.batch_size (it is 16)")
    assert len(list((tmp_path / "run" / "checkpoints").glob("unfinished_*"))) == 1
    run(launched(1), options)
    assert len(cohorts) == 3  # the first one was not trained again
    run(launched(1), [*TINY, "client.cohort=2", "rounds=1", f"run_dir={tmp_path / 'whole'}"])
    assert torch.equal(adapter_of(tmp_path / "run")["adapter"], adapter_of(tmp_path / "whole")["adapter"])


def test_a_seed_of_its_own_changes_one_part_of_a_run(tmp_path: Path) -> None:
    common = [*TINY, "seed=3", "rounds=2", "partition.scheme=dirichlet", "partition.clients_per_domain=2"]
    common += ["federation.clients_per_round=4", "model.lora.dropout=0.1"]

    def adapter_and_start(name: str, *seeds: str) -> tuple[torch.Tensor, dict[str, str]]:
        run(launched(1), [*common, *seeds, f"run_dir={tmp_path / name}"])
        start = json.loads((tmp_path / name / "result.json").read_text())["start"]
        return adapter_of(tmp_path / name)["adapter"], start

    groups = {"partition": "clients", "model": "initial_adapter", "federation": None, "client": None}
    adapter, start = adapter_and_start("one seed")
    same, _ = adapter_and_start("the same for all", *(f"{group}.seed=3" for group in groups))
    assert torch.equal(same, adapter)
    for group, changed in groups.items():
        other, begun = adapter_and_start(group, f"{group}.seed=4")
        assert not torch.equal(other, adapter), group
        assert [name for name in start if begun[name] != start[name]] == ([changed] if changed else []), group


def outcome(fabric: Any, arguments: list[str]) -> str:
    try:
        run(fabric, arguments)
    except LorafairError as error:
        return str(error)
    except SystemExit as leaving:
        return f"left with {leaving.code}"
    return "went on"


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "never"])
def test_an_image_that_breaks_on_one_rank_ends_all_of_them_with_its_name(cache: str, tmp_path: Path) -> None:
    root = damaged_folder(tmp_path / "pictures")
    arguments = [*TINY, "data.source=folder", f"data.root={root}", f"model.prefix_cache={cache}"]
    ended = run_ranks(2, outcome, [*arguments, f"run_dir={tmp_path / 'run'}"])
    assert "photo/cat" in ended[0]
    assert "cannot be decoded" in ended[0]
    assert ended[1] == "left with 2"


def test_a_round_too_short_for_what_takes_turns_is_refused_before_the_model_is_built(tiny: Tiny) -> None:
    for option, key in (("client.steps=1", "client.steps=1"), ("client.batch_size=64", "client.batch_size=64")):
        with pytest.raises(
            LorafairError, match=rf"^{key}: no client would train A in 1 step a round, .* client\.epochs"
        ):
            build_experiment(launched(1), tiny("method.name=la_lora", option))


BYTES_OF = {  # in units of A, B and head of one client: what the papers charge, K clients
    "fedit": ("A+B+head", "A+B+head"),
    "lora_fair": ("A+B+head", "A+B+head"),
    "flex_lora": ("A+B+head", "A+B+head"),
    "ffa_lora": ("B+head", "B+head"),
    "ro_lora": ("B+head", "B+head"),  # in the first round
    "fedsvd": ("B+head", "A+B+head"),
    "fedsa_lora": ("A", "A"),
    "flora": ("A+B+head", "K*(A+B)+head"),
    "fedex_lora": ("A+B+head", "K*(A+B)+head"),  # mean, and a residual of rank (K − 1)·R
    "local_only": ("0", "0"),
    "centralized": ("0", "0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", BYTES_OF)
def test_bytes_are_those_that_the_papers_charge(method: str, tiny: Tiny) -> None:
    config = tiny(f"method.name={method}", "rounds=1")
    run_federation(launched(1), config)
    layout = build_model(config.model, 4, 0).attach().adapters.layout
    sizes: dict[str, int] = {part: span.stop - span.start for part, span in layout.slices.items()}
    values = {
        name: float(value)
        for _, name, value in (line.split(",") for line in (config.folder / "metrics.csv").read_text().splitlines()[1:])
    }
    for name, formula in zip(("up", "down"), BYTES_OF[method], strict=True):
        assert values[f"comm/{name}_bytes"] == 3 * 4 * eval(formula, {**sizes, "K": 3}), name


def moved(fabric: Any, arguments: Sequence[str]) -> tuple[int, int]:
    """Run a federation on a rank; returns the numbers that it received of rows, and the bytes its broadcasts carried.

    Of tensors, not of objects.
    """
    gathered, broadcast = [], []
    real_send, real_broadcast = collectives._send, torch.distributed.broadcast

    def send(fabric: Any, sent: Any, received: dict[int, torch.Tensor]) -> None:
        gathered.extend(tensor.numel() for tensor in received.values())  # with those of this rank's own clients
        real_send(fabric, sent, received)

    def broadcast_(tensor: torch.Tensor, src: int) -> None:
        if tensor.is_floating_point() or tensor.dtype == torch.uint8:  # not the ranks that go ahead of a folded part
            broadcast.append(tensor.numel() * tensor.itemsize)
        real_broadcast(tensor, src=src)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_send", send)
        patch.setattr("lorafair.communication.collectives.dist.broadcast", broadcast_)
        run(fabric, arguments)
    return sum(gathered), sum(broadcast)


def all_moved(fabric: Any, methods: Sequence[str], folder: Path) -> dict[str, tuple[int, int]]:
    common = (*TINY, "rounds=2", "partition.scheme=iid", "partition.clients=4")
    options = {
        m: ["method.name=fedex_lora", "method.fold_bits=5"] if m == CODED else [f"method.name={m}"] for m in methods
    }
    return {m: moved(fabric, [*common, *options[m], f"run_dir={folder / m}"]) for m in methods}


CODED = "a coded fold"
# Numbers of one client that are moved and not charged, in two rounds of 4 layers with 3,072 numbers in A and B. What
# FRLoRA folds has A0 and B0 beside what is charged, and clients have had these since the start. The bases of RAVAN and
# Fed-SB are sent once, before round 1, with cores of 4 x (4 + 4) and 4 x 16 numbers. RAVAN's 4 x 4 scales are 1 at the
# start of a round, and clients send s_i H_i as one matrix, where here both are gathered. FedASK is charged for sketches
# of 6 columns that are not moved, 4 x 64 rows down and 4 x 64 + 2 x (64 + 192) up; B is gathered, 4 x 4 x 64 numbers.
NOT_CHARGED_DOWN = {
    "frlora": 2 * 3072, "ravan": 3072 + 32 + 2 * 16, "fed_sb": 3072 + 64, "fedask": -2 * 6 * 4 * 64,
}  # fmt: skip
NOT_CHARGED_UP = {"ravan": 2 * 16, "fedask": 2 * (4 * 4 * 64 - 6 * (4 * 64 + 2 * (64 + 192)))}


@pytest.mark.slow
def test_the_collectives_carry_the_bytes_that_are_reported(tmp_path: Path) -> None:
    """Four clients, two ranks, two rounds. What clients keep is not charged, and yet moved by the simulation."""
    methods = [name for name in METHODS.names if not (METHODS[name].personal_parts or METHODS[name].pools_data)]
    methods.append(CODED)
    ranks = run_ranks(2, all_moved, methods, tmp_path)
    for method in methods:
        rows = [line.split(",") for line in (tmp_path / method / "metrics.csv").read_text().splitlines()]
        up, down = (sum(float(row[2]) for row in rows if row[1] == f"comm/{way}_bytes") for way in ("up", "down"))
        gathered, broadcast = ranks[0][method]
        assert up + 4 * 4 * NOT_CHARGED_UP.get(method, 0) == 4 * gathered, method
        assert ranks[1][method][0] == 0, "only the server needs the clients' rows"
        received = 4 * broadcast  # by four clients, though it is broadcast once
        # FLoRIST charges the ranks it chooses; the broadcast has room for all of them.
        down += 4 * 4 * NOT_CHARGED_DOWN.get(method, 0)
        assert down < received if method == "florist" else down == received, method


def test_control_variates_are_charged_both_ways(tiny: Tiny) -> None:
    config = tiny("client.scaffold=true", "client.optimizer=sgd", "rounds=1")
    run_federation(launched(1), config)
    numbers = adapter_of(config.folder)["adapter"].numel()
    text = (config.folder / "metrics.csv").read_text()
    assert f"comm/up_bytes,{4.0 * 3 * 2 * numbers}" in text
    assert f"comm/down_bytes,{4.0 * 3 * 2 * numbers}" in text


@pytest.mark.slow
def test_control_variates_change_nothing_in_the_first_round_and_something_later(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for rounds in (1, 2):
        for used in (True, False):
            config = tiny(
                f"client.scaffold={used}", "client.optimizer=sgd", f"rounds={rounds}", f"run_dir={tmp_path / str(used)}"
            )
            run_federation(launched(1), config)
            found[rounds, used] = adapter_of(config.folder)["adapter"]
    assert torch.equal(found[1, True], found[1, False])
    # The corrections of all clients cancel in the mean to first order, so that they change it by little.
    assert not torch.equal(found[2, True], found[2, False])


def test_class_counts_are_charged_where_they_weigh_the_head(tiny: Tiny) -> None:
    config = tiny("method.name=fedit", "federation.head_weighting=class", "rounds=1")
    run_federation(launched(1), config)
    numbers = adapter_of(config.folder)["adapter"].numel()
    text = (config.folder / "metrics.csv").read_text()
    assert f"comm/up_bytes,{4.0 * 3 * (numbers + 4)}" in text, "four classes"
    assert f"comm/down_bytes,{4.0 * 3 * numbers}" in text


@pytest.mark.slow
def test_a_coded_round_is_that_of_dense_matrices(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen weights and the start after a round: from what the clients returned, in float64."""
    seen: dict[str, Any] = {}
    gather = federation_module.gather

    def gather_and_look(experiment: Any, state: Any, *others: Any) -> Any:
        weights = {path: w.clone() for path, w in experiment.model.adapters.base_weights().items()}
        seen.update(experiment=experiment, results=gather(experiment, state, *others), weights=weights)
        return seen["results"]

    monkeypatch.setattr(federation_module, "gather", gather_and_look)
    config = tiny("method.name=fedex_lora", "method.fold_bits=4", "method.fold_rank=6", "rounds=1")
    run_federation(launched(1), config)
    layout, results = seen["experiment"].layout, seen["results"]
    clients, tensors, scaling = layout.unpack(results.rows.double()).factors, adapter_of(config.folder), 16 / 4

    def q(matrix: torch.Tensor, axis: int) -> torch.Tensor:
        scale = matrix.abs().amax(axis, keepdim=True) / 7
        return scale * (matrix / scale).round()

    for path, start in layout.unpack(tensors["adapter"]).factors.items():
        of_clients = list(zip(results.weights, clients[path].A, clients[path].B, strict=True))
        A, B = (
            sum(p * f for p, f in zip(results.weights, of, strict=True)) for of in (clients[path].A, clients[path].B)
        )
        assert torch.equal(start.A, A.half().float())
        assert torch.equal(start.B, B.half().float())
        left = sum(p * B @ A for p, A, B in of_clients) - start.B.double() @ start.A.double()
        U, S, Vt = torch.linalg.svd(left)
        root = S[:6].sqrt()
        folded = q(U[:, :6] * root, 0) @ q(root.unsqueeze(1) * Vt[:6], 1)
        change = tensors[f"base.{path}"].double() - seen["weights"][path].double()
        torch.testing.assert_close(change, scaling * folded, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_class_wise_head_of_a_run_is_that_of_its_clients(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only some clients take part and one of them returns NaN: by loops, from what they returned."""
    seen: dict[str, Any] = {}
    gather = federation_module.gather

    def gather_and_look(experiment: Any, state: Any, *others: Any) -> Any:
        results = gather(experiment, state, *others)
        seen.update(experiment=experiment, start=state.adapter.clone(), results=results)
        return results

    monkeypatch.setattr(federation_module, "gather", gather_and_look)
    with_nan_from(monkeypatch, *range(0, 6, 2))
    config = tiny(
        "method.name=lora_fair", "federation.head_weighting=class", "rounds=1", "partition.scheme=dirichlet",
        "partition.alpha=0.05", "partition.clients_per_domain=2", "partition.min_images=5",
        "federation.clients_per_round=4",
    )  # fmt: skip
    run_federation(launched(1), config)
    built, results = seen["experiment"], seen["results"]
    assert results.dropped
    trained, start = built.layout.unpack(results.rows).head, built.layout.unpack(seen["start"]).head
    final = built.layout.unpack(adapter_of(config.folder)["adapter"]).head
    kept = 0
    for c in range(4):
        images = [int((built.data.train.labels[built.clients[k].indices] == c).sum()) for k in results.clients]
        for name, rows in final.items():
            expected = start[name][c].double()
            if sum(images):
                expected = sum(n * trained[name][i, c].double() for i, n in enumerate(images)) / sum(images)
            torch.testing.assert_close(rows[c], expected.float(), rtol=1e-6, atol=1e-8)
        kept += not sum(images)
    assert kept < 4


def test_bytes_of_mixed_ranks(tiny: Tiny) -> None:
    config = tiny("method.name=flex_lora", "rounds=1", "model.lora.client_ranks=[4,2,1]")
    run_federation(launched(1), config)
    layout = build_model(config.model, 4, 0).attach().adapters.layout
    head = layout.length - layout.adapter_length
    text = (config.folder / "metrics.csv").read_text()
    assert f"comm/up_bytes,{4.0 * (layout.adapter_length * 7 // 4 + 3 * head)}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["method.name=fedrpca", "model.lora.client_ranks=[4,2,1]"],
            r"needs the same LoRA rank everywhere; methods .*flora",
        ),
        (["model.lora.client_ranks=[4,2]"], r"lists 2 ranks for 3 clients"),
        (["method.name=ffa_lora", "federation.initialization=fresh"], r"does not fit .*ffa_lora; possible: average"),
        (["client.scaffold=true"], r"needs client.optimizer=sgd, not adamw"),
        (
            ["client.scaffold=true", "client.optimizer=sgd", "method.name=fedsa_lora"],
            r"client.scaffold=true does not fit method.name=fedsa_lora; possible: fedit, lora_fair",
        ),
        (["server.optimizer=fedadam", "method.name=flex_lora"], r"fedadam does not fit .*flex_lora; possible: fedit"),
        (["fabric.server=sharded", "method.name=fedsa_lora"], r"does not fit method\.name=fedsa_lora, .*server=rank0"),
        (
            ["fabric.server=sharded", "federation.initialization=local"],
            r"does not fit federation\.initialization=local",
        ),
        (["server.optimizer=fedadam", "federation.initialization=local"], r"needs federation.initialization=average"),
    ],
)
def test_what_does_not_fit_the_method_is_refused(tiny: Tiny, changes: list[str], message: str) -> None:
    with pytest.raises(LorafairError, match=message):
        run_federation(launched(1), tiny(*changes))


def test_the_log_says_what_lora_fair_does_where_ranks_differ(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    run_federation(launched(1), tiny("rounds=1", "method.name=lora_fair", "model.lora.client_ranks=[4,2,1]"))
    assert "method.rescale is on in rounds whose clients differ in LoRA rank" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ffa_lora", "ro_lora"])
def test_the_error_of_exact_methods_is_none_with_mixed_ranks(method: str, tiny: Tiny) -> None:
    config = tiny(f"method.name={method}", "model.lora.client_ranks=[4,2,1]")
    run_federation(launched(1), config)
    rows = [line.split(",") for line in (config.folder / "metrics.csv").read_text().splitlines()[1:]]
    after, before = ([float(v) for _, n, v in rows if n == f"server/error_{when}"] for when in ("after", "before"))
    assert len(after) == 2
    assert max(after) < 1e-3 < 0.05 < min(before)

"""Compression in a run: what the server goes on with is what the messages say, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorafair.aggregation.registry import method_of
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.client.uploads import CodedUploads
from lorafair.communication.compression.base import RowCoding
from lorafair.communication.compression.message import MessageFormat
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.experiment import build_experiment
from lorafair.federation import run_federation
from lorafair.seeding import seeded
from lorafair.server.state import start_or_resume
from tests.conftest import launched

Tiny = Callable[..., Config]


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All that is encoded."""
    found: list[torch.Tensor] = []
    encode = MessageFormat.encode

    def recorded(self: MessageFormat, *arguments: Any) -> torch.Tensor:
        found.append(encode(self, *arguments))
        return found[-1]

    monkeypatch.setattr(MessageFormat, "encode", recorded)
    return found


def metrics_of(config: Config) -> dict[tuple[int, str], float]:
    lines = (config.folder / "metrics.csv").read_text().splitlines()[1:]
    return {(int(r), name): float(value) for r, name, value in (line.split(",") for line in lines)}


@pytest.mark.parametrize("method", ["lora_fair", "ffa_lora", "flex_lora", "ravan", "fedsa_lora"])
def test_bytes_of_a_run_are_those_of_its_messages(method: str, tiny: Tiny, messages: list[torch.Tensor]) -> None:
    config = tiny(
        "rounds=1", f"method.name={method}", "compression.up=topk", "compression.down=randomk", "compression.bits=4"
    )
    run_federation(launched(1), config)
    *up, down = messages
    found, flags = metrics_of(config), 0
    if method == "flex_lora":  # a bit for each factor of four layers and both parts of the head
        flags = 2
    assert found[1, "comm/up_bytes"] == sum(message.numel() for message in up)
    assert found[1, "comm/down_bytes"] == 3 * (down.numel() + flags)
    assert sum(len(message) for message in up) == 3


def test_the_server_goes_on_with_what_it_decodes_and_the_client_keeps_the_rest(tiny: Tiny) -> None:
    experiment, _ = build_experiment(launched(1), tiny("method.name=fedit", "compression.up=int4"))
    state, layout = start_or_resume(experiment, None), experiment.layout
    assert state.client_residuals is not None
    assert state.client_residuals.shape == (3, layout.length)
    state.client_residuals.copy_(0.01 * torch.randn(3, layout.length, generator=seeded(1)))
    before = state.client_residuals.clone()
    start, rule = state.adapter.expand(2, -1), CodedUploads(experiment, state)
    rows = start + 0.1 * torch.randn(2, layout.length, generator=seeded(2))
    rows[1, 5] = float("nan")
    sent = rule(0, (2, 0), start, rows)
    wanted = (rows[0] - start[0]) + before[2]
    coding = experiment.codings.up
    assert isinstance(coding, RowCoding)
    A = layout.unpack(wanted).factors[next(iter(layout.factors))].A
    keys = torch.zeros(len(A), dtype=torch.int64)
    decoded = coding.decode(coding.encode(A, keys), A.shape[1], keys)
    where = slice(0, A.numel())
    assert torch.equal(sent[0, where], start[0, where] + decoded.flatten())
    lost = rule.take_lost((2, 0))
    assert lost is not None
    assert torch.equal(lost[0, where], wanted[where] - decoded.flatten())
    assert torch.equal(sent[1].isnan(), rows[1].isnan()), "it is left out later, and not hidden"
    assert rule.take_lost((2, 0)) is None


def test_zero_directions_of_smaller_ranks_stay_zero_and_are_not_charged(
    tiny: Tiny, messages: list[torch.Tensor]
) -> None:
    config = tiny("rounds=1", "method.name=flex_lora", "model.lora.client_ranks=[4,2,1]", "compression.up=int8")
    experiment, _ = build_experiment(launched(1), config)
    state, layout = start_or_resume(experiment, None), experiment.layout
    ranks = torch.tensor([4, 2, 1])
    start = layout.truncated(state.adapter.expand(3, -1), ranks)
    rows = layout.truncated(start + 0.1 * torch.randn(3, layout.length, generator=seeded(2)), ranks)
    sent = CodedUploads(experiment, state)(0, (0, 1, 2), start, rows)
    assert torch.equal(layout.truncated(sent, ranks), sent)
    assert (sent - rows).abs().max() < 0.01
    factors = sum(a[1] + b[0] + 8 for a, b in layout.factors.values())  # a scale a row
    assert experiment.aggregator.sends(0) == ("A", "B", "core", "head")
    head = sum(4 * (1 if len(shape) == 1 else shape[0]) for shape in layout.head.values()) + layout.length_of(("head",))
    assert sorted(message.numel() for message in messages) == [rank * factors + head for rank in (1, 2, 4)]


def test_without_compression_nothing_changes(tiny: Tiny) -> None:
    experiment, _ = build_experiment(launched(1), tiny())
    state = start_or_resume(experiment, None)
    assert set(state.tensors()) == {"adapter"}
    assert experiment.codings.up is experiment.codings.down is experiment.codings.folded is None


def test_a_run_of_an_older_version_is_continued_without_what_clients_have_missed(tiny: Tiny) -> None:
    options = ("method.name=fedex_lora", "federation.clients_per_round=2")
    run_federation(launched(1), tiny(*options, "rounds=1"))
    folder = list_checkpoints(tiny().folder)[-1]
    checkpoint = load_checkpoint(folder)
    assert "missed" in checkpoint.tensors
    assert checkpoint.tensors["missed"].sum(1).count_nonzero() == 1, "one of three has missed the round"
    del checkpoint.tensors["missed"]
    from lorafair.checkpointing.checkpoint import save_checkpoint

    save_checkpoint(tiny().folder, checkpoint, keep=2)
    run_federation(launched(1), tiny(*options, "rounds=2"))
    assert len(list_checkpoints(tiny().folder)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["compression.up=int5"], r"^compression\.up=int5 is unknown; .*codings: float16, bfloat16, int8, int4"),
        (["compression.down=fp16"], r"did you mean float16\?"),
        (["compression.bits=4"], r"^compression\.bits=4 has no effect: it needs compression\.up=topk or randomk,"),
        (["compression.up=int8", "compression.fraction=0.5"], r"^compression\.fraction=0\.5 has no effect"),
        (["compression.up=int4", "compression.rate=2"], r"^compression\.rate=2\.0 has no effect: .*unary"),
        (["compression.up=unary", "compression.rate=1"], r"^compression\.rate=1\.0 is out of range"),
        (["compression.up=unary", "compression.rounding=stochastic"], r"^compression\.rounding=stochastic has no"),
        (["compression.up=topk", "compression.fraction=0"], r"^compression\.fraction=0\.0 is out of range"),
        (["compression.down=int8", "compression.client_error_feedback=true"], r"it needs compression\.up$"),
        (["compression.up=int8", "method.name=local_only"], r"has no effect with method\.name=local_only"),
        (["compression.down=int8", "method.name=centralized"], r"has no effect with method\.name=centralized"),
        (["compression.folded=int8"], r"^compression\.folded=int8 has no effect: method\.name=lora_fair"),
        (["compression.folded=topk", "method.name=fedex_lora"], r"would lose for good .*; possible: float16, bfloat16"),
        (["compression.head=int8"], r"compression.head=int8 has no effect: it needs compression.up or"),
        (["compression.up=int4", "compression.head=topk"], r"compression.head=topk would lose for good"),
        (
            ["compression.up=int4", "compression.head=int8", "method.name=fed_alora"],
            r"compression.head=int8 has no effect: .* heads stay at the clients",
        ),
        (["compression.folded=int8", "method.name=fedex_lora", "method.fold_bits=4"], r"fit method\.fold_bits"),
        (
            ["compression.up=int8", "client.scaffold=true", "client.optimizer=sgd"],
            r"^compression\.up=int8 does not fit client\.scaffold=true, whose control variates travel in float32",
        ),
        (["compression.up=int8", "method.name=het_lora", "method.pruning=0.5"], r"does not fit method\.pruning"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(changes: list[str], message: str, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        method_of(tiny(*changes))
    assert "\n" not in str(raised.value)

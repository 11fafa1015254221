"""Adapters: the formula of LoRA, C clients side by side, and where adapters go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafair.errors import ConfigError
from lorafair.model.adapter import LoRAFactors
from lorafair.model.lora import ClientHead, DropoutStreams, LoRALinear, add_lora
from lorafair.model.parameters import AdapterParameters
from lorafair.seeding import seeded


def network() -> nn.Sequential:
    """Two blocks of a linear layer each and a head, with random weights."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))])
    model.head = ClientHead(6, 3)
    return model


def forward(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return model.head(model.blocks[1](torch.relu(model.blocks[0](x))))


def adapted(max_cohort: int = 1, dropout: float = 0.0) -> tuple[nn.Sequential, AdapterParameters]:
    model = network()
    add_lora(model, ["blocks.*.0"], lora_rank=2, alpha=3.0, dropout=dropout, last_blocks=None)
    return model, AdapterParameters(model, max_cohort)


def test_forward_is_the_formula_of_lora() -> None:
    torch.manual_seed(1)
    layer = LoRALinear(nn.Linear(5, 7), lora_rank=2, alpha=3.0)
    layer.A.data.normal_()
    layer.B.data.normal_()
    x = torch.randn(4, 6, 5)
    expected = x @ (layer.base.weight + 3.0 / 2 * layer.B[0] @ layer.A[0]).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)


def test_a_layer_made_where_memory_holds_nan_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, x = nn.Linear(5, 7), torch.ones(4, 5)
    monkeypatch.setattr(torch, "empty", lambda *shape, **rest: torch.full(shape, torch.nan, **rest))
    layer = LoRALinear(base, lora_rank=2, alpha=3.0)
    assert torch.equal(layer(x), layer.base(x))


def test_a_fresh_adapter_changes_nothing() -> None:
    model, adapters = adapted()
    adapters.write(adapters.draw(seed=0, round_index=0))
    layer = model.blocks[0][0]
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), layer.base(x))
    assert layer.A.abs().max() <= 1 / 6**0.5
    assert layer.A.abs().min() > 0


def test_clients_side_by_side_equal_clients_one_by_one() -> None:
    model, adapters = adapted(max_cohort=3)
    rows, x = torch.randn(3, adapters.layout.length), torch.randn(3, 4, 6)
    adapters.resize(3)
    adapters.write(rows)
    side_by_side = forward(model, x.flatten(0, 1)).view(3, 4, 3)
    adapters.resize(1)
    for client in range(3):
        adapters.write(rows[client])
        torch.testing.assert_close(forward(model, x[client]), side_by_side[client])


def test_gradients_land_in_the_packed_rows_of_their_clients() -> None:
    model, adapters = adapted(max_cohort=2)
    adapters.resize(2)
    adapters.write(torch.randn(2, adapters.layout.length))
    forward(model, torch.randn(8, 6))[:4].square().sum().backward()  # only the first client has a loss
    gradient = adapters.flat.grad
    assert gradient is not None
    assert (gradient[0] != 0).all()
    assert (gradient[1] == 0).all()
    state = adapters.layout.unpack(gradient)
    assert torch.equal(state.factors["blocks.1.0"].B[0], model.blocks[1][0].B.grad[0])
    assert all(not layer[0].base.weight.requires_grad for layer in model.blocks)


def test_a_head_may_be_given_several_vectors_an_image() -> None:
    """As by timm's AttentionPool2d, which projects all tokens and takes the first one."""
    head, x = ClientHead(5, 3), torch.randn(2 * 4, 6, 5)
    head.weight.data, head.bias.data = torch.randn(2, 3, 5), torch.randn(2, 3)
    expected = torch.cat([x[4 * i : 4 * i + 4] @ head.weight[i].T + head.bias[i] for i in (0, 1)])
    torch.testing.assert_close(head(x), expected)


def test_dropout_masks_do_not_depend_on_the_neighbours() -> None:
    x = torch.ones(2 * 3, 5)

    def streams(*clients: int, counts: tuple[int, ...]) -> DropoutStreams:
        return DropoutStreams([seeded(0, client) for client in clients], counts)

    together = streams(7, 8, counts=(3, 2)).drop(x, p=0.5)
    alone = streams(7, counts=(3,)).drop(x[:3], p=0.5), streams(8, counts=(2,)).drop(x[:2], p=0.5)
    assert torch.equal(together[:3], alone[0])
    assert torch.equal(together[3:5], alone[1])
    assert (together[5] == 0).all()  # padding
    assert set(alone[0].unique().tolist()) == {0.0, 2.0}


def test_dropout_is_off_outside_training() -> None:
    model, adapters = adapted(dropout=0.9)
    adapters.write(torch.randn(adapters.layout.length))
    x = torch.randn(4, 6)
    evaluated = forward(model, x)
    adapters.use_dropout(DropoutStreams([seeded(0)], (4,)))
    assert not torch.equal(forward(model, x), evaluated)
    adapters.use_dropout(None)
    assert torch.equal(forward(model, x), evaluated)


def test_folding_moves_the_update_into_the_frozen_weights() -> None:
    model, adapters = adapted()
    adapters.write(torch.randn(adapters.layout.length))
    x = torch.randn(4, 6)
    before = forward(model, x)
    state = adapters.layout.unpack(adapters.flat.detach()[0].clone())
    # As factors of higher rank too: [B/2, B/2] times [A; A] is the same update.
    doubled = {
        path: LoRAFactors(A=torch.cat([f.A, f.A]), B=torch.cat([f.B, f.B], dim=1) / 2)
        for path, f in state.factors.items()
    }
    adapters.fold_into_base(doubled)
    for layer in model.blocks:
        layer[0].B.data.zero_()
    torch.testing.assert_close(forward(model, x), before)


def test_targets_are_ends_of_paths_or_patterns_and_keep_the_order_of_the_model() -> None:
    def paths(*targets: str, last_blocks: int | None = None) -> list[str]:
        return add_lora(network(), targets, lora_rank=2, alpha=2, dropout=0, last_blocks=last_blocks)

    assert paths("0") == ["blocks.0.0", "blocks.1.0"]
    assert paths("blocks.1.0", "blocks.0.*") == ["blocks.0.0", "blocks.1.0"]
    assert paths("0", last_blocks=1) == ["blocks.1.0"]
    assert paths("-blocks.0.*", "0") == ["blocks.1.0"]
    assert paths("0", "-blocks.0.0", last_blocks=1) == ["blocks.1.0"]


@pytest.mark.parametrize(
    ("targets", "last_blocks", "message"),
    [
        (
            ["qkv"],
            None,
            r"model\.lora\.targets: qkv matches no linear layer of this backbone; there are blocks\.\*\.\*",
        ),
        (["0", "-qkv"], None, r"model\.lora\.targets: -qkv matches no linear layer"),
        (["0", "-blocks.*"], None, r"model\.lora\.targets=\[0,-blocks\.\*\] leaves no layer to adapt"),
        (["0"], 3, r"model\.lora\.last_blocks=3: this backbone has 2 blocks"),
        (["blocks.0.0"], 1, r"model\.lora\.last_blocks=1 leaves no layer"),
    ],
)
def test_a_target_that_adapts_nothing_is_an_error(targets: list[str], last_blocks: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(network(), targets, lora_rank=2, alpha=2, dropout=0, last_blocks=last_blocks)


def test_a_rank_that_a_layer_cannot_have_is_an_error() -> None:
    assert add_lora(network(), ["0"], lora_rank=6, alpha=2, dropout=0, last_blocks=None)
    with pytest.raises(
        ConfigError, match=r"model\.lora\.rank=7 is larger than layer blocks\.0\.0 allows: .* at most 6"
    ):
        add_lora(network(), ["0"], lora_rank=7, alpha=2, dropout=0, last_blocks=None)


def test_what_is_drawn_follows_from_seed_round_and_name() -> None:
    _, adapters = adapted()
    torch.manual_seed(1)
    first = adapters.draw(seed=0, round_index=0)
    torch.manual_seed(2)
    assert torch.equal(adapters.draw(seed=0, round_index=0), first)
    assert not torch.equal(adapters.draw(seed=1, round_index=0), first)
    assert not torch.equal(adapters.draw(seed=0, round_index=1), first)

"""A square matrix between the factors: the formula, its place in a packed row, and what is left of it without it.

Letters: C clients, R LoRA rank, h heads.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafair.model.adapter import AdapterLayout, AdapterState, Core, CoreShape, put_columns, take_columns
from lorafair.model.lora import ClientHead, LoRALinear, add_lora
from lorafair.model.parameters import AdapterParameters

SHAPES = [CoreShape(), CoreShape(heads=2), CoreShape(heads=2, scaled=True), CoreShape(heads=4, scaled=True)]


def dense(layer: LoRALinear, client: int) -> Tensor:
    """W0 + s·Σ_i s_i B_i H_i A_i of one client, head by head."""
    heads, size, _ = layer.H.shape[1:]
    total = layer.base.weight.clone()
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        scale = layer.scales[client, i] if layer.scales.shape[1] else 1.0
        total += layer.scaling * scale * layer.B[client][:, part] @ layer.H[client, i] @ layer.A[client][part]
    return total


def adapted(core: CoreShape, cohort: int = 3) -> tuple[nn.Sequential, AdapterParameters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), ClientHead(6, 4))
    add_lora(model, ["0", "2"], lora_rank=4, alpha=6.0, dropout=0.0, last_blocks=None, core=core)
    adapters = AdapterParameters(model, cohort)
    adapters.resize(cohort)
    adapters.write(torch.randn(cohort, adapters.layout.length))
    return model, adapters


@pytest.mark.parametrize("core", SHAPES)
def test_each_client_of_a_cohort_has_the_formula_and_its_gradient(core: CoreShape) -> None:
    model, _ = adapted(core)
    layer, x = model[0], torch.randn(3, 5, 7)
    assert isinstance(layer, LoRALinear)
    out = layer(x.flatten(0, 1)).view(3, 5, 9)
    for client in range(3):
        expected = x[client] @ dense(layer, client).T + layer.base.bias
        torch.testing.assert_close(out[client], expected)
        trained = [layer.H, layer.scales]
        mine = torch.autograd.grad(out[client].square().sum(), trained, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(expected.square().sum(), trained, allow_unused=True)
        for found, wanted in zip(mine, theirs, strict=True):
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("core", SHAPES)
def test_only_what_is_to_be_trained_has_gradients(core: CoreShape) -> None:
    model, adapters = adapted(core)
    trained = adapters.train_only(("core", "head"))
    assert [t.span for t in trained] == adapters.layout.spans(("core", "head"))
    model(torch.randn(15, 7)).square().sum().backward()
    gradient = adapters.flat.grad
    assert gradient is not None
    assert not gradient[:, : adapters.layout.slices["B"].stop].any()
    assert gradient[:, adapters.layout.slices["core"]].ne(0).float().mean() > 0.9
    assert adapters.train_only(("A", "core"), separately=True)[1].parts == ("core",)


@pytest.mark.parametrize("core", SHAPES)
def test_cores_can_be_part_of_b(core: CoreShape) -> None:
    model, adapters = adapted(core, cohort=1)
    images = torch.randn(5, 7)
    before = model(images)
    state = adapters.layout.unpack(adapters.flat.detach()[0].clone())
    adapters.fold_into_base(state.with_cores_in_b().factors)
    cores = {path: Core(H=torch.zeros_like(c.H), scales=c.scales) for path, c in state.cores.items()}
    adapters.write(adapters.layout.pack(AdapterState(state.factors, state.head, cores)))
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("core", [None, *SHAPES])
def test_a_packed_row_and_its_shards_hold_every_number_once(core: CoreShape | None) -> None:
    layout = AdapterLayout.of({"a": ((4, 5), (6, 4)), "b": ((4, 3), (2, 4))}, {"head": (3, 2)}, core)
    row = torch.arange(float(layout.length)).expand(2, -1).clone()
    assert torch.equal(layout.pack(layout.unpack(row)), row)
    assert sum(layout.length_of((part,)) for part in ("A", "B", "core", "head")) == layout.length
    gathered = torch.zeros_like(row)
    for shard in layout.split(3):
        columns = layout.columns_of(shard, ("A", "B", "core", "head"))
        mine = take_columns(row, columns)
        assert torch.equal(shard.pack(shard.unpack(mine)), mine)
        if shard.length:
            put_columns(gathered, columns, mine)
    assert torch.equal(gathered, row)
    if core is not None:
        found = layout.unpack(row).cores["a"]
        assert found.H.shape == (2, core.heads, 4 // core.heads, 4 // core.heads)
        begin = layout.slices["core"].start
        assert torch.equal(found.H[0].flatten(), row[0, begin : begin + found.H[0].numel()])
        assert found.scales.shape == (2, core.heads if core.scaled else 0)


def test_fresh_cores_change_nothing() -> None:
    model, adapters = adapted(CoreShape(heads=2, scaled=True), cohort=1)
    adapters.write(adapters.draw(seed=0, round_index=0))
    drawn = adapters.layout.unpack(adapters.flat.detach()[0])
    assert not drawn.cores["0"].H.any()
    assert drawn.cores["0"].scales.eq(1).all()
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    assert torch.equal(layer(torch.ones(2, 7)), layer.base(torch.ones(2, 7)))
    assert torch.equal(drawn.cores["0"].after(torch.ones(9, 4)), torch.zeros(9, 4))


def test_gradients_of_frozen_weights_are_those_of_autograd_added_up() -> None:
    model, adapters = adapted(CoreShape(), cohort=1)
    batches = [torch.randn(5, 2, 7), torch.randn(3, 2, 7)]
    with adapters.base_gradients() as gradients:
        for batch in batches:
            model(batch).square().sum().backward()
    assert not adapters.flat.grad.any()  # type: ignore[union-attr]
    layers = {path: model.get_submodule(path) for path in ("0", "2")}
    weights = [layer.base.weight.requires_grad_(True) for layer in layers.values()]
    expected = torch.autograd.grad(sum(model(batch).square().sum() for batch in batches), weights)  # type: ignore[arg-type]
    for path, wanted in zip(layers, expected, strict=True):
        torch.testing.assert_close(gradients[path], wanted, rtol=1e-4, atol=1e-3)
    before = {path: gradient.clone() for path, gradient in gradients.items()}
    model(batches[0]).sum().backward()
    assert all(torch.equal(gradients[path], before[path]) for path in layers), "after the block nothing is added"

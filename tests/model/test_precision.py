"""fabric.precision=bf16-true: what is held and computed in bfloat16, and what stays float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafair.config.schema import FabricConfig, LoRAConfig, ModelConfig
from lorafair.errors import ConfigError
from lorafair.launch import in_place, make_fabric
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import LoRAFactors
from lorafair.model.backbone import build_model
from lorafair.model.lora import ClientHead, LoRALinear, add_lora

HALF = torch.bfloat16
MODELS = {
    "test_vit": (32, ()), "mixer_s32_224": (64, ()),
    "swin_tiny_patch4_window7_224": (32, ("attn.proj", "mlp.fc2")),
    "swinv2_tiny_window16_256": (32, ("attn.qkv", "mlp.fc1")),  # the layer's weight is read, the layer not called
}  # fmt: skip


class Small(nn.Module):
    """A layer below the adapted one, a norm, and a head; `mixes` types of its own."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        self.mixes = mixes
        self.below, self.norm, self.hidden = nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Linear(10, 8)
        self.head = ClientHead(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.below(images.flatten(1)))
        return self.head(torch.relu(self.hidden(x.float() if self.mixes else x)))


def small(*, cohort: int = 1, mixes: bool = False) -> AdaptedModel:
    torch.manual_seed(0)
    backbone = Small(mixes=mixes).requires_grad_(False).eval()
    add_lora(backbone, ["hidden"], lora_rank=2, alpha=3.0, dropout=0.0, last_blocks=None)
    model = AdaptedModel(backbone, 2, 0, [0.5] * 3, [0.5] * 3).attach(max_cohort=cohort)
    model.adapters.resize(cohort)
    return with_adapters(model)


def with_adapters(model: AdaptedModel) -> AdaptedModel:
    shape = model.adapters.flat.shape
    model.adapters.write(torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 20)
    return model


def images_for(model: AdaptedModel, count: int = 4) -> Tensor:
    shape = (count, 3, model.image_size, model.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def computed(model: AdaptedModel, *, by: Any = None) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the adapters."""
    gradient = model.adapters.flat.grad
    assert gradient is not None
    gradient.zero_()
    logits = (model if by is None else by)(images_for(model))
    logits.square().sum().backward()
    return logits.detach(), gradient.clone()


@pytest.mark.parametrize("name", MODELS)
def test_what_flows_is_bfloat16_and_what_is_trained_or_added_to_is_float32(name: str) -> None:
    pixels, targets = MODELS[name]
    lora = LoRAConfig(rank=4, alpha=4, targets=targets or None)
    model = with_adapters(
        build_model(ModelConfig(name=name, weights="random", image_size=pixels, lora=lora), 5, seed=0).attach()
    )
    expected = computed(model)
    before = {path: weight.clone() for path, weight in model.adapters.base_weights().items()}
    model.set_precision("bf16-true")
    in_float32 = {
        tensor for module in model.backbone.modules() if isinstance(module, LoRALinear | ClientHead)
        for tensor in module.parameters()
    }  # fmt: skip
    for tensor in [*model.backbone.parameters(), *model.backbone.buffers()]:
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if tensor in in_float32 else HALF)
    assert all(torch.equal(weight, before[path]) for path, weight in model.adapters.base_weights().items())
    entering: list[torch.dtype] = []
    for module in model.backbone.modules():
        if isinstance(module, LoRALinear | nn.LayerNorm):
            module.register_forward_hook(lambda module, given, out: entering.extend([given[0].dtype, out.dtype]))
    found = computed(model)
    assert set(entering) == {HALF}
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert 1e-5 < (mine - theirs).norm() / theirs.norm() < 0.05


def test_an_update_below_the_steps_of_bfloat16_reaches_the_weights() -> None:
    model = small()
    model.set_precision("bf16-true")
    (weight,) = (w.clone() for w in model.adapters.base_weights().values())
    update = LoRAFactors(A=torch.full((1, 10), 1e-3), B=torch.full((8, 1), 1e-3))
    model.adapters.fold_into_base({"hidden": update})
    (changed,) = model.adapters.base_weights().values()
    torch.testing.assert_close(changed - weight, torch.full((8, 10), 1.5e-6), rtol=0.1, atol=0)
    assert not torch.equal(changed, weight)


def test_clients_side_by_side_equal_clients_one_by_one() -> None:
    model = small(cohort=3)
    model.set_precision("bf16-true")
    rows = model.adapters.flat.detach().clone()
    images = images_for(model, 6)
    logits = model(images).view(3, 2, 3)
    model.adapters.resize(1)
    for client in range(3):
        model.adapters.write(rows[client])
        torch.testing.assert_close(model(images[2 * client : 2 * client + 2]), logits[client], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["test_vit", "mixer_s32_224"])
def test_tokens_have_the_bits_that_flow_between_the_blocks(name: str) -> None:
    """So they may be kept in bfloat16 without loss, and in float32."""
    lora = LoRAConfig(rank=4, alpha=4, last_blocks=2)
    config = ModelConfig(name=name, weights="random", image_size=MODELS[name][0], lora=lora)
    model = with_adapters(build_model(config, 5, seed=0).attach())
    model.set_precision("bf16-true")
    images = images_for(model)
    tokens = model.embed(images)
    assert tokens.dtype == HALF
    assert tokens.shape[1:] == model.shape_of_tokens()
    logits = model(images)
    assert torch.equal(model(tokens), logits)
    assert torch.equal(model(tokens.float()), logits)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_a_compiled_model_has_the_same_gradients(precision: str) -> None:
    torch.compiler.reset()
    model = small(cohort=2)
    model.set_precision(precision)
    expected = computed(model)
    found = computed(model, by=torch.compile(model, backend="aot_eager", fullgraph=True))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if precision == "bf16-true" else 1e-5, atol=1e-3)


def test_a_backbone_that_mixes_types_is_refused_with_what_works() -> None:
    model = small(mixes=True)
    model.set_precision("32-true")
    message = (
        r"^fabric\.precision=bf16-true: Small does not compute in it \(.*type.*\); set fabric\.precision=bf16-mixed"
    )
    with pytest.raises(ConfigError, match=message):
        small(mixes=True).set_precision("bf16-true")


def test_a_run_in_bfloat16_has_no_autocast_and_leaves_the_default_type_alone() -> None:
    with in_place(FabricConfig(accelerator="cpu", precision="bf16-true")) as fabric:
        assert fabric.strategy.precision.precision == "bf16-true"
        with fabric.autocast():
            assert not torch.is_autocast_enabled("cpu")
            assert torch.ones(1).dtype == torch.float32
    with in_place(FabricConfig(accelerator="cpu")) as fabric:
        assert fabric.strategy.precision.precision == "32-true"


def test_a_gpu_without_bfloat16_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("is_bf16_supported", False), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for precision in ("bf16-true", "bf16-mixed"):
        message = rf"^fabric\.precision={precision}: this GPU has no bfloat16; use fabric\.precision=32-true"
        with pytest.raises(ConfigError, match=message):
            make_fabric(FabricConfig(accelerator="cuda", devices=1, precision=precision))  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "as_products"), [("bf16-true", True), ("bf16-mixed", True), ("32-true", False)])
def test_attention_is_a_series_of_products_on_a_cpu_in_bfloat16(precision: str, as_products: bool) -> None:
    lora = LoRAConfig(rank=4, alpha=4)
    config = ModelConfig(name="test_vit", weights="random", image_size=MODELS["test_vit"][0], lora=lora)
    model = with_adapters(build_model(config, 5, seed=0).attach())
    expected = computed(model)
    model.set_precision(precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = computed(model)
    fused = any("scaled_dot_product" in event.key for event in profile.key_averages())
    assert fused is not as_products
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 0.05

"""Layers that read like Linear layers and are none that can be adapted, and those whose weight is read: tiny models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lorafair import third_party
from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.errors import ConfigError
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import build_model, check_model, register_backbone
from lorafair.model.lora import LoRALinear
from lorafair.registry import BACKBONES
from lorafair.seeding import seeded

third_party.make_torchvision_importable()

from timm.models.beit import Beit  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from timm.models.vision_transformer_relpos import VisionTransformerRelPos  # noqa: E402

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "images"))


def beit() -> nn.Module:
    return Beit(img_size=32, patch_size=16, num_classes=2, embed_dim=16, depth=2, num_heads=2, init_values=0.1)


def eva() -> nn.Module:
    return Eva(img_size=32, patch_size=16, num_classes=2, embed_dim=16, depth=2, num_heads=2, qkv_fused=True)


def swin() -> nn.Module:
    model = SwinTransformerV2(
        img_size=32, num_classes=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, qkv_bias=True
    )
    for block in (module for module in model.modules() if type(module).__name__ == "SwinTransformerV2Block"):
        block.norm1.weight.data.fill_(1)  # they are zero at the start
        block.norm2.weight.data.fill_(1)
    return model


def relpos() -> nn.Module:
    return VisionTransformerRelPos(
        img_size=32, patch_size=8, num_classes=2, embed_dim=16, depth=2, num_heads=2, rel_pos_type="mlp", rel_pos_dim=9
    )


class Tokens(nn.Module):
    """Linear layers in many places: one sees tokens (T, N, D), as nn.MultiheadAttention does, one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.norm = nn.BatchNorm2d(8)
        self.first, self.over_time, self.second, self.idle, self.product = (nn.Linear(8, 8) for _ in range(5))
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.patches(images)).flatten(2).transpose(1, 2)  # (N, T, D)
        x = self.first(x).relu().transpose(0, 1)
        x = self.second(self.over_time(x).relu().transpose(0, 1).contiguous())
        x = x @ self.product.weight.t()
        logits: Tensor = self.head(x.mean(1))
        return logits


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tiny_beit": (beit, "head"),
    "tiny_eva": (eva, "head"),
    "tiny_swin": (swin, "head.fc"),
    "tiny_relpos": (relpos, "head"),
    "tiny_tokens": (Tokens, "head"),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for name, (build, head) in MODELS.items():
        register_backbone(name, head=head, image_size=32)(lambda config, build=build: build())
    yield
    for name in MODELS:
        BACKBONES.remove(name)


def config(name: str, *targets: str) -> ModelConfig:
    return ModelConfig(name=name, weights="random", lora=LoRAConfig(rank=2, alpha=3, targets=targets))


def model(name: str, *targets: str) -> AdaptedModel:
    return build_model(config(name, *targets), classes=2, seed=0)


def results(m: AdaptedModel, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and gradients of clients side by side."""
    m.adapters.resize(len(rows))
    m.adapters.write(rows)
    assert m.adapters.flat.grad is not None
    m.adapters.flat.grad.zero_()
    logits = m(images)
    logits.square().sum().backward()
    return logits.detach(), m.adapters.flat.grad.clone()


def random_rows(m: AdaptedModel, clients: int) -> Tensor:
    return torch.randn(clients, m.adapters.layout.length, generator=seeded(0, "rows")) * 0.3


@pytest.mark.parametrize("name", ["tiny_beit", "tiny_eva", "tiny_swin"])
def test_an_update_counts_where_a_backbone_reads_the_weight_of_a_layer(name: str) -> None:
    """Against the same backbone with dense weights W0 + s·B·A, in logits and in the gradients of A and B."""
    check_model(config(name, "attn.qkv"))
    m = model(name, "attn.qkv").attach()
    layers = {path: module for path, module in m.backbone.named_modules() if isinstance(module, LoRALinear)}
    logits, gradient = results(m, random_rows(m, 1), IMAGES)
    factors = [factor.detach().clone().requires_grad_() for layer in layers.values() for factor in (layer.A, layer.B)]
    weights = {
        f"{path}.weight": layer.base.weight + 3 / 2 * factors[2 * i + 1][0] @ factors[2 * i][0]
        for i, (path, layer) in enumerate(layers.items())
    }
    for path, layer in layers.items():
        m.backbone.set_submodule(path, layer.base)
    expected = torch.func.functional_call(m.backbone, weights, m.normalize(IMAGES))
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    got = m.adapters.layout.unpack(gradient).factors
    for i, path in enumerate(layers):
        for mine, factor in ((got[path].A, factors[2 * i]), (got[path].B, factors[2 * i + 1])):
            torch.testing.assert_close(mine, factor.grad, rtol=1e-3, atol=1e-5)
            assert mine.abs().max() > 1e-6


@pytest.mark.parametrize("name", ["tiny_beit", "tiny_eva", "tiny_swin", "tiny_relpos"])
def test_clients_side_by_side_equal_clients_one_by_one(name: str) -> None:
    m = model(name, "attn.qkv", "attn.proj", "mlp.fc2", *(["-rel_pos.*"] if name == "tiny_relpos" else [])).attach(
        max_cohort=2
    )
    assert not m.adapters.flat.any()
    rows = random_rows(m, 2)
    logits, gradients = results(m, rows, IMAGES)
    for client in range(2):
        alone = slice(client, client + 1)
        expected, gradient = results(m, rows[alone], IMAGES[alone])
        torch.testing.assert_close(logits[alone], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients[alone], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cohort", [2, 3])
@pytest.mark.parametrize(
    ("name", "targets", "culprit"),
    [
        ("tiny_relpos", ("attn.proj", "mlp.fc2"), "blocks.*.attn.rel_pos.mlp.fc2"),
        ("tiny_swin", ("attn.proj", "cpb_mlp.*"), "layers.*.blocks.*.attn.cpb_mlp.*"),
        ("tiny_tokens", ("first", "over_time"), "over_time"),
    ],
)
def test_a_layer_in_which_clients_would_mix_is_refused_by_name(
    name: str, targets: tuple[str, ...], culprit: str, cohort: int
) -> None:
    """With 3 clients the rows of the relative positions (49 x 9, 81 x 9) can be dealt out, and were: to the wrong."""
    lora = LoRAConfig(rank=1, targets=targets)
    with pytest.raises(ConfigError, match=re.escape(f"{culprit} cannot be adapted with client.cohort={cohort} (")):
        build_model(ModelConfig(name=name, weights="random", lora=lora), 2, 0).attach(max_cohort=cohort)
    build_model(ModelConfig(name=name, weights="random", lora=lora), 2, 0).attach()  # alone a client is right


def test_the_targets_that_a_refusal_advises_can_be_taken() -> None:
    with pytest.raises(ConfigError, match=r"or client\.cohort=1") as caught:
        model("tiny_relpos", "attn.proj", "mlp.fc2").attach(max_cohort=2)
    [advised] = re.findall(r"take model\.lora\.targets=\[(.*?)\]", str(caught.value))
    layers = model("tiny_relpos", *advised.split(",")).attach(max_cohort=2).adapters.layout.factors
    assert list(layers) == [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.proj", "mlp.fc2")]
    with pytest.raises(ConfigError, match=r"take model\.lora\.targets=\[first,second\], or"):  # nothing else was named
        model("tiny_tokens", "over_time").attach(max_cohort=2)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("idle", r"idle of tiny_tokens cannot be adapted \(no output depends on it\); "),
        ("product", r"product of tiny_tokens cannot be adapted \(AttributeError: .*'t'\); "),
    ],
)
def test_a_layer_that_has_no_effect_or_fails_is_refused_by_name(target: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.lora\.targets: {reason}take model\.lora\.targets=\[first\]"):
        check_model(config("tiny_tokens", "first", target))


def test_the_proof_leaves_nothing_behind() -> None:
    """Neither in the weights and statistics, nor in the generator, nor in the adapters."""
    m = model("tiny_tokens", "first", "second")
    before = {name: tensor.clone() for name, tensor in m.state_dict().items() if "base" in name or "norm" in name}
    generator = torch.random.get_rng_state()
    m.attach(max_cohort=3)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(tensor, m.state_dict()[name]) for name, tensor in before.items())
    assert m.adapters.flat.shape == (1, m.adapters.layout.length)
    assert not m.adapters.flat.any()
    assert not m.adapters.flat.grad.any()
    assert m.mean.isfinite().all()


def test_weights_that_are_not_finite_are_not_blamed_on_the_adapters() -> None:
    m = model("tiny_tokens", "first")
    m.backbone.second.weight.data.fill_(torch.nan)
    m.attach(max_cohort=2)


def test_what_enters_a_layer_whose_weight_is_read_is_counted() -> None:
    assert model("tiny_beit", "attn.qkv").numbers_per_image() == (1 + 2 * 2) * 16


def test_only_a_linear_product_can_be_given_the_weight_of_an_adapted_layer() -> None:
    layer, x = LoRALinear(nn.Linear(3, 4), lora_rank=2, alpha=1.0), torch.randn(5, 3)
    layer.A.data.normal_()
    layer.B.data.normal_()
    assert torch.equal(nn.functional.linear(x, layer.weight, layer.base.bias), layer(x))
    assert torch.equal(nn.functional.linear(x, weight=layer.weight), layer(x, None))
    with pytest.raises(TypeError, match="bilinear reads the weight of an adapted layer"):
        nn.functional.bilinear(x, x, layer.weight)

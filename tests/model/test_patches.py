"""Convolutions of patches as products: the same numbers, names and weights, and which convolutions are left alone."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.model.backbone import build_model
from lorafair.model.patches import PatchEmbedding, embed_patches_by_products


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def patches_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PatchEmbedding)]


@pytest.mark.parametrize(
    ("name", "pixels", "count"),
    [("test_vit", 32, 1), ("mixer_s32_224", 64, 1), ("convnext_atto", 32, 4), ("convnext_atto", 75, 4)],
)
def test_a_backbone_computes_the_same_with_the_same_weights(name: str, pixels: int, count: int) -> None:
    size = {} if "convnext" in name else {"img_size": pixels}
    model = timm.create_model(name, pretrained=False, num_classes=5, **size).eval()
    images = drawn(2, 3, pixels, pixels).requires_grad_()

    def computed() -> list[Tensor]:
        logits = model(images)
        return [logits, *torch.autograd.grad(logits.square().sum(), images)]

    expected, weights, state = computed(), dict(model.named_parameters()), torch.get_rng_state()
    embed_patches_by_products(model)
    assert len(patches_in(model)) == count
    for mine, theirs in zip(computed(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert [(name, id(tensor)) for name, tensor in model.named_parameters()] == [
        (name, id(tensor)) for name, tensor in weights.items()
    ]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(12, 15), (14, 19), (4, 5)])
@pytest.mark.parametrize("padding", [0, "valid"])
def test_what_does_not_fill_a_patch_is_not_used(height: int, width: int, bias: bool, padding: int | str) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, (4, 5), (4, 5), padding=padding, bias=bias)
    model = nn.Sequential(convolution)
    images = drawn(2, 3, height, width)
    for given in (images, images.contiguous(memory_format=torch.channels_last), drawn(2, 3, width, height).mT):
        expected = nn.Conv2d.forward(convolution, given)
        embed_patches_by_products(model)
        assert patches_in(model) == ["0"]
        torch.testing.assert_close(model(given), expected)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 8, 4, 4, padding=2), nn.Conv2d(4, 8, 4, 4, groups=2), nn.Conv2d(4, 8, 4, 4, dilation=2),
        nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 4, 2), nn.Conv2d(4, 8, (4, 2), 4), nn.Conv2d(4, 8, 3, padding="same"),
        nn.Conv1d(4, 8, 4, 4), nn.Conv3d(4, 8, 4, 4), nn.ConvTranspose2d(4, 8, 4, 4),
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 4, 4)),
    ],
)  # fmt: skip
def test_other_convolutions_are_left_alone(convolution: nn.Module) -> None:
    model = nn.Sequential(convolution)
    embed_patches_by_products(model)
    assert not patches_in(model)


def test_a_subclass_is_left_alone_and_hooks_stay() -> None:
    class Standardized(nn.Conv2d):
        """With a forward of its own, as timm's StdConv2d."""

    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), Standardized(4, 4, 2, 2))
    seen = []
    model[0].register_forward_hook(lambda module, given, output: seen.append(output.shape))
    embed_patches_by_products(model)
    assert patches_in(model) == ["0"]
    model(drawn(1, 3, 8, 8))
    assert seen == [(1, 4, 4, 4)]


def test_on_a_cpu_convolutions_stay_as_they_were() -> None:
    """Where the bits of finished runs are promised."""
    lora = LoRAConfig(rank=2, alpha=2)
    model = build_model(ModelConfig(name="test_vit", weights="random", image_size=32, lora=lora), 3, seed=0)
    assert not patches_in(model.attach("cpu").backbone)

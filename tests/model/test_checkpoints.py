"""Checkpoints as training programs and libraries leave them: what is taken of them, and what is refused."""

from __future__ import annotations

import argparse
import datetime
import decimal
import json
import os
import pathlib
import pickle
import re
import uuid
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafair import third_party
from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.console import printing
from lorafair.errors import ConfigError
from lorafair.model.backbone import build_model, check_model, create_backbone, register_backbone, weights_text
from lorafair.registry import BACKBONES

third_party.make_torchvision_importable()

import timm  # noqa: E402

VIT = ModelConfig(name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=2))


def state_of(name: str = "test_vit", seed: int = 0, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = timm.create_model(name, **({"img_size": 32, "num_classes": 7} | options))
    return {name: nn.init.normal_(tensor, std=0.1) for name, tensor in model.state_dict().items()}


STATE, OTHER = state_of(), state_of(seed=1)
BODY = {name: tensor for name, tensor in STATE.items() if not name.startswith("head.")}


def renamed(state: Mapping[str, Tensor], pattern: str, replacement: str) -> dict[str, Tensor]:
    return {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}


def prefixed(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def optimizer_state() -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def saved(folder: Path, content: object, name: str = "weights.pth") -> Path:
    file = folder / name
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)  # type: ignore[arg-type]
    return file


def taken(file: Path, capsys: pytest.CaptureFixture[str], config: ModelConfig = VIT, **changes: Any) -> tuple[Any, str]:
    """The backbone with the file's weights, and the line that says what was taken."""
    config = replace(config, weights=str(file), **changes)
    check_model(config)
    with printing():
        backbone = create_backbone(config, 5, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("weights: ")
    return backbone, line.removeprefix("weights: ")


def assert_holds(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    mine = backbone.state_dict()
    for name, tensor in state.items():
        if not name.startswith("head."):
            assert torch.equal(mine[name], tensor), name


def complaint(file: Path, config: ModelConfig = VIT, **changes: Any) -> str:
    """The one line by which a file is refused before anything is computed."""
    with pytest.raises(ConfigError) as caught:
        check_model(replace(config, weights=str(file), **changes))
    text = str(caught.value)
    assert str(file) in text
    assert "\n" not in text
    assert not re.search("weights_only|add_safe_globals|if you trust|torch.load", text)
    return text


# What is taken


CHECKPOINTS: list[Any] = [
    pytest.param(
        {"epoch": 1, "arch": "x", "state_dict": STATE, "optimizer": optimizer_state(), "metric": np.float64(77.0),
         "args": argparse.Namespace(lr=1, folder=pathlib.Path("/a"), seeds=np.arange(3))},
        "78 tensors of weights.pth; section state_dict; left out: 3 of optimizer, 2 of head",
        id="timm's train.py",
    ),
    pytest.param(
        {"state_dict": OTHER, "state_dict_ema": STATE},
        "section state_dict_ema and not state_dict (model.weights_section chooses); left out: 80 of state_dict",
        id="timm's train.py with averaged weights",
    ),
    pytest.param({"model": OTHER, "model_ema": STATE}, "section model_ema and not model (", id="model_ema"),
    pytest.param(prefixed("_orig_mod."), "; _orig_mod. removed from the names; ", id="compiled"),
    pytest.param({"model": prefixed("module._orig_mod.")}, "section model, module._orig_mod. removed", id="nested"),
    pytest.param(
        {"state_dict": {**prefixed("model.backbone."), "criterion.weight": torch.ones(3)}, "global_step": 3,
         "pytorch-lightning_version": "2.0", "optimizer_states": [optimizer_state()]},
        "section state_dict, model.backbone. removed from the names; left out: 2 of head, 1 of state_dict.criterion",
        id="Lightning",
    ),
    pytest.param(
        {"student": {**prefixed("module.backbone.", OTHER), "module.head.mlp.weight": torch.ones(3)},
         "teacher": {**prefixed("backbone."), "head.mlp.weight": torch.ones(3)}, "loss": {"center": torch.ones(1)}},
        "section teacher and not student.module.backbone (model.weights_section chooses), backbone. removed",
        id="DINO",
    ),
    pytest.param(
        {"state_dict": {**prefixed("module.momentum_encoder.", OTHER), **prefixed("module.base_encoder.")}},
        "section state_dict and not state_dict.module.momentum_encoder",
        id="MoCo v3",
    ),
    pytest.param({"net": prefixed("encoder.")}, "section net, encoder. removed from the names", id="any name"),
    pytest.param(
        {"teacher": prefixed("backbone.", renamed(STATE, r"^blocks\.(\d)", r"blocks.0.\1"))},
        "section teacher, backbone. removed from the names, names of DINOv2 converted",
        id="DINOv2 in chunks",
    ),
    pytest.param(
        renamed(STATE, r"blocks\.1\.", "blocks.1._orig_mod._checkpoint_wrapped_module."),
        "_orig_mod and _checkpoint_wrapped_module removed within the names",
        id="blocks that are compiled alone",
    ),
    pytest.param(
        prefixed("_fsdp_wrapped_module.", renamed(STATE, r"\.attn\.", "._fsdp_wrapped_module.attn.")),
        "_fsdp_wrapped_module. removed from the names, _fsdp_wrapped_module removed within the names",
        id="FSDP",
    ),
    pytest.param(
        {"state_dict": STATE, "day": datetime.date(2026, 1, 1), "id": uuid.UUID(int=3), "rate": decimal.Decimal(1)},
        "section state_dict",
        id="dates and numbers of other kinds",
    ),
    pytest.param(
        {"model": {**BODY, "mask_token": torch.ones(1, 1, 64), "decoder_pos_embed": torch.ones(1, 5, 8),
                   "decoder_blocks.0.norm1.weight": torch.ones(8)}},
        "section model; left out: 2 of decoder, 1 of mask_token",
        id="MAE",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "line"), CHECKPOINTS)
def test_the_models_tensors_are_found_and_what_was_taken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, line: str
) -> None:
    backbone, said = taken(saved(tmp_path, content, "weights.pth"), capsys)
    assert_holds(backbone, STATE)
    assert line in said


def test_another_section_is_taken_where_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, {"state_dict": STATE, "state_dict_ema": OTHER})
    backbone, line = taken(file, capsys, weights_section="state_dict")
    assert_holds(backbone, STATE)
    assert "section state_dict and not state_dict_ema" in line
    file = saved(tmp_path, {"a": STATE, "b": OTHER})
    assert "holds 2 models; choose one: model.weights_section=a or model.weights_section=b" in complaint(file)
    assert_holds(taken(file, capsys, weights_section="b")[0], OTHER)
    assert "has no such section with tensors; there are: a, b" in complaint(file, weights_section="teacher")
    with pytest.raises(ConfigError, match=r"weights_section=a has no effect: it needs a file in model\.weights"):
        check_model(replace(VIT, weights_section="a"))


@pytest.mark.parametrize("name", ["weights.pth.tar", "weights.bin", "weights.safetensors", "weights"])
def test_what_a_file_is_follows_from_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    torch.save(STATE, tmp_path / name)
    assert_holds(taken(tmp_path / name, capsys)[0], STATE)
    save_file(OTHER, tmp_path / name)
    assert_holds(taken(tmp_path / name, capsys)[0], OTHER)
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_holds(taken(tmp_path / name, capsys)[0], STATE)


def test_weights_in_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"a.safetensors": dict(list(STATE.items())[:20]), "b.safetensors": dict(list(STATE.items())[20:])}
    for name, tensors in parts.items():
        saved(tmp_path, tensors, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, tensors in parts.items() for n in tensors}}))
    assert_holds(taken(index, capsys)[0], STATE)
    (tmp_path / "b.safetensors").unlink()
    assert "names 2 files, and b.safetensors is not beside it" in complaint(index)


def test_a_fine_tuned_mae_averages_its_tokens_in_the_model_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    source = timm.create_model("test_vit", img_size=32, num_classes=5, global_pool="avg").eval()
    file = saved(tmp_path, {"model": source.state_dict()})
    assert {"fc_norm.weight"} <= source.state_dict().keys()
    backbone, line = taken(file, capsys)
    assert line.endswith("the model averages its tokens, as these weights do (fc_norm)")
    images = torch.randn(2, 3, 32, 32)
    pooled = [
        model.eval().forward_head(model.forward_features(images), pre_logits=True) for model in (source, backbone)
    ]
    assert torch.equal(*pooled)
    model = build_model(replace(VIT, weights=str(file), lora=LoRAConfig(rank=2, last_blocks=2)), 5, 0).attach("cpu")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model(model.embed(pixels)), model(pixels))  # with cached tokens, too


def test_what_timm_resamples_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, state_of(img_size=64), "weights.safetensors")
    assert "made to fit: pos_embed from (1, 17, 64) to (1, 5, 64)" in taken(file, capsys)[1]


# Names of others


def hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As transformers wrote a ViT before it renamed layers in memory; checked against the library below."""
    found = {"vit.pooler.dense.weight": torch.ones(3)}
    for name, tensor in state.items():
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = re.sub("^(cls_token|pos_embed)$", r"embeddings.\1", name).replace("pos_embed", "position_embeddings")
        name = re.sub("^norm", "layernorm", name).replace("blocks.", "encoder.layer.").replace("head.", "classifier.")
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        name = name.replace("attn.proj", "attention.output.dense")
        if "attn.qkv" in name:
            for part, of_part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"vit.{name.replace('attn.qkv', f'attention.attention.{part}')}"] = of_part
        else:
            found[name if name.startswith("classifier") else f"vit.{name}"] = tensor
    return found


def torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rules = {
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
        "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3", "head.": "heads.head.",
    }  # fmt: skip
    found = {}
    for name, tensor in state.items():
        name = re.sub("^norm", "encoder.ln", name)
        for mine, theirs in rules.items():
            name = name.replace(mine, theirs)
        found[name] = tensor
    return found


@pytest.mark.parametrize(
    ("convert", "line"),
    [
        (
            hugging_face,
            "vit. removed from the names, names of Hugging Face converted; left out: 2 of classifier, 1 of vit",
        ),
        (torchvision, "names of torchvision converted; left out: 2 of heads"),
    ],
)
def test_names_of_other_libraries_are_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], convert: Callable[..., dict[str, Tensor]], line: str
) -> None:
    backbone, said = taken(saved(tmp_path, {"state_dict": prefixed("module.", convert(STATE))}), capsys)
    assert_holds(backbone, STATE)
    assert "names of" in said
    backbone, said = taken(saved(tmp_path, convert(STATE)), capsys)
    assert_holds(backbone, STATE)
    assert line.partition(";")[0] in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_models_of_transformers_compute_the_same_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config, images = VIT, torch.randn(2, 3, 32, 32)
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=192, layer_norm_eps=1e-6))
    elif kind == "dinov2":
        sizes |= {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 28}
        sizes |= {"patch_size": 14, "num_register_tokens": 4}
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes))
        config, images = replace(VIT, name="vit_small_patch14_reg4_dinov2", image_size=28), images[..., :28, :28]
    else:
        sizes |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32}
        sizes |= {"intermediate_size": 3072}
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
        config = replace(VIT, name="vit_base_patch32_clip_quickgelu_224")
    for parameter in model.eval().parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    backbone, line = taken(tmp_path / "model.safetensors", capsys, config)
    assert "names of Hugging Face converted" in line
    with torch.no_grad():
        expected = model(images).last_hidden_state
        if kind == "clip":
            expected = getattr(model, "vision_model", model).post_layernorm(expected)
        found = backbone.eval().forward_features(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_files_of_deit_3_and_of_openclip_are_converted_by_timm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "deit3_small_patch16_224"
    state = state_of(name)
    official = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): tensor for n, tensor in state.items()}
    assert any(".gamma_1" in n for n in official)
    backbone, _ = taken(saved(tmp_path, {"model": official}), capsys, replace(VIT, name=name))
    assert_holds(backbone, state)
    clip = {**prefixed("visual.trunk."), "text.transformer.weight": torch.ones(3), "logit_scale": torch.ones(1)}
    backbone, line = taken(saved(tmp_path, clip), capsys)
    assert_holds(backbone, STATE)
    assert "left out: 2 of head, 1 of text, 1 of logit_scale" in line


def jax_arrays(state: Mapping[str, Tensor], heads: int = 2) -> dict[str, np.ndarray]:
    """As Google's ViTs are published; the layout that timm's loader reads."""
    a = {name: tensor.numpy() for name, tensor in state.items()}
    width = a["cls_token"].shape[-1]
    found = {
        "embedding/kernel": a["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": a["patch_embed.proj.bias"],
        "cls": a["cls_token"], "Transformer/posembed_input/pos_embedding": a["pos_embed"],
        "Transformer/encoder_norm/scale": a["norm.weight"], "Transformer/encoder_norm/bias": a["norm.bias"],
    }  # fmt: skip
    for block in range(6):
        mine, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for i, part in enumerate(("query", "key", "value")):
            rows = slice(i * width, (i + 1) * width)
            found[f"{attention}{part}/kernel"] = a[f"{mine}attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            found[f"{attention}{part}/bias"] = a[f"{mine}attn.qkv.bias"][rows].reshape(heads, -1)
        found[f"{attention}out/kernel"] = a[f"{mine}attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attention}out/bias"] = a[f"{mine}attn.proj.bias"]
        for norm, number in (("norm1", 0), ("norm2", 2)):
            found[f"{theirs}LayerNorm_{number}/scale"] = a[f"{mine}{norm}.weight"]
            found[f"{theirs}LayerNorm_{number}/bias"] = a[f"{mine}{norm}.bias"]
        for layer in (0, 1):
            found[f"{theirs}MlpBlock_3/Dense_{layer}/kernel"] = a[f"{mine}mlp.fc{layer + 1}.weight"].T
            found[f"{theirs}MlpBlock_3/Dense_{layer}/bias"] = a[f"{mine}mlp.fc{layer + 1}.bias"]
    return found


def test_npz_is_loaded_by_timm_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, arrays = tmp_path / "vit.npz", jax_arrays(STATE)
    np.savez(file, **arrays)  # type: ignore[arg-type]
    backbone, line = taken(file, capsys)
    assert_holds(backbone, STATE)
    assert line == "78 tensors of vit.npz; by timm's loader of .npz files"
    more = {name.replace("block_5", "block_6"): array for name, array in arrays.items()} | arrays
    np.savez(file, **more)  # type: ignore[arg-type]
    assert "does not fit test_vit: it has 7 blocks, the model 6" in complaint(file)
    np.savez(file, **{name: array for name, array in arrays.items() if "block_5" not in name})  # type: ignore[arg-type]
    assert "does not fit test_vit: it has 5 blocks, the model 6" in complaint(file)
    assert "timm has no loader of .npz files for mixer_s16_224" in complaint(file, replace(VIT, name="mixer_s16_224"))
    np.savez(file, **arrays | {"cls": np.full((1, 1, 64), np.nan)})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="holds NaN or infinity in 1 tensor: cls_token"):
        create_backbone(replace(VIT, weights=str(file)), 5, 0)


def test_an_address_and_the_directory_of_a_run_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is an address; fetch the file"):
        check_model(replace(VIT, weights="https:/example.org/vit.pth"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    assert "is the directory of a run; lorafair export" in complaint(tmp_path)


def test_a_plug_ins_backbone_takes_its_own_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.model(images))  # type: ignore[no-any-return]

    register_backbone("weights_test", head="head", image_size=8, targets=("model.1",))(lambda config: Module())
    try:
        state, config = Module().state_dict(), replace(VIT, name="weights_test", image_size=None)
        assert weights_text(replace(config, weights="pretrained")) == "of a plug-in, asked for pretrained weights"
        for content in (state, {"model": prefixed("module.", state), "step": 3}):
            backbone, _ = taken(saved(tmp_path, content), capsys, config)
            assert_holds(backbone, state)
        assert "1 tensors missing ['model.1.bias']" in complaint(
            saved(tmp_path, {"model.1.weight": state["model.1.weight"]}), config
        )
    finally:
        BACKBONES.remove("weights_test")


# What is refused


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo this code ran",)


def half_of(folder: Path, name: str, content: object) -> Path:
    file = saved(folder, content, name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def damaged_npz(folder: Path, damage: Callable[[bytes], bytes], *, compressed: bool = False) -> Path:
    file = folder / "vit.npz"
    (np.savez_compressed if compressed else np.savez)(file, **jax_arrays(STATE))  # type: ignore[arg-type]
    file.write_bytes(damage(file.read_bytes()))
    return file


def overwritten(content: bytes) -> bytes:
    """In the data of an array; the names of the archive, at its end, stay."""
    return content[:2000] + b"\xff" * 200 + content[2200:]


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("weights.pth", b"...")
    return folder / "all.zip"


def pickled(folder: Path) -> Path:
    (folder / "weights.pkl").write_bytes(pickle.dumps(STATE))
    return folder / "weights.pkl"


def scripted(folder: Path) -> Path:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(folder / "w.pt"))  # type: ignore[no-untyped-call]
    return folder / "w.pt"


def written(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "weights.pth").write_bytes(content)
        return folder / "weights.pth"

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: saved(folder, {"state_dict": STATE, "x": RunsCode()}),
         "tensors: posix.system, whose code would run; nothing was run; save the state dict alone where it was made"),
        (lambda folder: saved(folder, nn.Linear(2, 2)), "tensors: torch.nn.modules.linear.Linear, whose"),
        (scripted, "is a TorchScript program"),
        (pickled, "is damaged, or pickled in another way than torch.save does"),
        (lambda folder: half_of(folder, "w.pth", STATE), "is damaged or cut short ("),
        (lambda folder: half_of(folder, "w.safetensors", STATE), "is damaged or cut short ("),
        (lambda folder: saved(folder, [1, 2]), "holds no state dict (names and tensors), but one list"),
        (lambda folder: saved(folder, {"accuracy": 0.9}), "holds no state dict"),
        (lambda folder: folder, "is a folder; name a file"),
        (lambda folder: damaged_npz(folder, lambda content: content[: len(content) // 2]), "is damaged or cut short ("),
        (lambda folder: damaged_npz(folder, lambda all: all[:-40] + all[-22:]), "is damaged or cut short ("),
        (lambda folder: damaged_npz(folder, overwritten), "is damaged or cut short ("),
        (lambda folder: damaged_npz(folder, overwritten, compressed=True), "is damaged or cut short ("),
        (zipped, "is a zip archive of weights.pth"),
        (written(b""), "is empty"),
        (written(b"\n<!DOCTYPE html><html>"), "is a web page instead of weights"),
        (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "`git lfs pull` fetches them"),
        (written(b"\x1f\x8b\x08\x00"), "is compressed by gzip; unpack it"),
        (written(b"\x89HDF\r\n"), "is an HDF5 file"),
        (written(b'{"hidden_size": 768}'), "is JSON and no index of weights"),
        (written(b"\xff\xd8\xff\xe0" + bytes(20)), "is none of the formats that can be read"),
    ],
)  # fmt: skip
def test_what_holds_no_weights_is_named_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], Path], message: str
) -> None:
    assert message in complaint(make(tmp_path))
    assert "this code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("has_sums", [True, False])
def test_a_changed_bit_in_a_file_of_pytorchs_is_found_by_its_sums(tmp_path: Path, has_sums: bool) -> None:
    """PyTorch reads such a file without a word."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(has_sums)
    try:
        file = saved(tmp_path, STATE)
    finally:
        torch.serialization.set_crc32_options(before)
    content = bytearray(file.read_bytes())
    values = bytes(STATE["patch_embed.proj.weight"].numpy().tobytes())
    content[content.index(values) + 101] ^= 1
    file.write_bytes(content)
    if has_sums:
        assert "is damaged: its part weights/data/" in complaint(file)
    else:
        create_backbone(replace(VIT, weights=str(file)), 5, 0)


WEIGHT = "blocks.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: t.to(torch.int8), "int8"),
        (lambda t: t.long(), "int64"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda t: t.to_sparse(), "sparse_coo"),
        (lambda t: t.to("meta"), "meta, without values"),
    ],
)
def test_tensors_that_a_copy_would_change_are_named(
    tmp_path: Path, change: Callable[[Tensor], Tensor], kind: str
) -> None:
    content = {"model": prefixed("module.", STATE | {WEIGHT: change(STATE[WEIGHT])})}
    file = saved(tmp_path, content)
    text = complaint(file)
    assert f"holds 1 tensor of another kind of numbers: {WEIGHT} ({kind}); save" in text
    with pytest.raises(ConfigError, match=re.escape(text)):  # with memory, too
        create_backbone(replace(VIT, weights=str(file)), 5, 0)


def test_names_that_timm_converts_are_looked_at_as_well(tmp_path: Path) -> None:
    official = {n.replace("ls1.gamma", "gamma_1"): t for n, t in state_of("deit3_small_patch16_224").items()}
    official |= {n: t.to(torch.int8) for n, t in official.items() if n.endswith("gamma_1")}
    text = complaint(saved(tmp_path, official), replace(VIT, name="deit3_small_patch16_224"))
    assert "holds 12 tensors of another kind of numbers: blocks.0.ls1.gamma (int8), " in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_are_taken_and_counts_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    state = timm.create_model("test_efficientnet").state_dict()
    state = {name: t.to(dtype) if t.is_floating_point() else t + 5 for name, t in state.items()}
    assert state["bn1.num_batches_tracked"].dtype == torch.int64
    file, same = saved(tmp_path, state), timm.create_model("test_efficientnet", num_classes=5)
    backbone = create_backbone(replace(VIT, name="test_efficientnet", image_size=None, weights=str(file)), 5, 0)
    same.load_state_dict({n: t for n, t in state.items() if not n.startswith("classifier.")}, strict=False)
    assert_holds(backbone, {n: t for n, t in same.state_dict().items() if not n.startswith("classifier.")})


def test_nan_is_named_at_load(tmp_path: Path) -> None:
    broken = torch.full_like(STATE["blocks.1.mlp.fc1.weight"], float("nan"))
    file = saved(tmp_path, {"state_dict": prefixed("module.", STATE | {"blocks.1.mlp.fc1.weight": broken})})
    with pytest.raises(ConfigError, match=r"holds NaN or infinity in 1 tensor: blocks\.1\.mlp\.fc1\.weight; take"):
        create_backbone(replace(VIT, weights=str(file)), 5, 0)
    head = STATE | {"head.weight": torch.full_like(STATE["head.weight"], float("inf"))}
    create_backbone(replace(VIT, weights=str(saved(tmp_path, head))), 5, 0)  # the head is not taken


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: STATE | {"blocks.6.norm1.weight": torch.ones(64)}, "['blocks.6.norm1.weight']; the file has 7"),
        (lambda: {n: t for n, t in STATE.items() if "blocks.5" not in n}, "; the file has 5 blocks, the model 6"),
        (lambda: state_of("test_vit2"), "['cls_token'], 41 unknown ['reg_token', 'blocks.6.norm1.weight'"),
        (lambda: state_of("vit_tiny_patch16_224"), "shape (cls_token (1, 1, 192) instead of (1, 1, 64), pos"),
        (lambda: STATE | {"dist_token": torch.ones(1, 1, 64), "pos_embed": torch.ones(1, 6, 64)},
         "before the patches the file has cls_token and dist_token, the model cls_token; set model.name"),
        (lambda: state_of(img_size=(64, 32)), "embedding has 9 tokens, the model's 5, and timm resamples"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_never_loaded_in_part(
    tmp_path: Path, state: Callable[[], dict[str, Tensor]], message: str
) -> None:
    assert message in complaint(saved(tmp_path, state()))

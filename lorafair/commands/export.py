"""Take a trained model out of a run: as plain weights with the adapters merged in, or as a PEFT adapter."""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafair.aggregation.registry import build_aggregator
from lorafair.checkpointing.checkpoint import BASE, check_tensors, list_checkpoints, load_checkpoint
from lorafair.checkpointing.folder import CheckpointError
from lorafair.config.loading import load_config_of_run
from lorafair.config.schema import Config, ModelConfig
from lorafair.errors import ConfigError, LorafairError, one_line
from lorafair.files.writing import naming, open_to_others
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import LoRAFactors
from lorafair.model.backbone import build_model, create_backbone, has_second_head, plain_head, size_option
from lorafair.model.lora import ClientHead, LoRALinear
from lorafair.registry import BACKBONES
from lorafair.reporting.run_dir import CONFIG_FILE
from lorafair.server.recent import RECENT, RecentAdapters, evaluated_adapter
from lorafair.server.state import base_weights_in


def export_run(run_dir: Path, out: Path, *, peft: bool) -> str:
    """Write the global model of a run's last checkpoint into the folder `out`; returns how to load it.

    Without `peft`: model.safetensors for timm's create_model, with W0 + s·B·A in place of the adapted weights. With it:
    adapter and head in PEFT's format, to be put on the same frozen weights. Raises LorafairError for a run without a
    global model, and for PEFT if the federation has changed the frozen weights or the package is missing.
    """
    if peft and importlib.util.find_spec("peft") is None:
        raise ConfigError("export to PEFT needs its package: pip install peft")
    trained = _load_run(run_dir)
    if peft and trained.folded:
        raise ConfigError(
            f"{run_dir} merged updates into the frozen weights, which an adapter cannot hold; leave out --peft"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorafairError(f"{out} cannot be made a folder ({error.strerror}); name another one") from error
    with naming(out):
        try:
            return _write(trained, out, peft=peft)
        except SafetensorError as error:
            raise LorafairError(f"{out} cannot be written: {one_line(error)}") from error


def _write(trained: TrainedModel, out: Path, *, peft: bool) -> str:
    """The files, and how to load them."""
    mean, std = ((tensor / 255).flatten().tolist() for tensor in (trained.model.mean, trained.model.std))
    code = write_peft(trained, out) if peft else write_merged(trained, out)
    return f"{code}\ninput: RGB in 0 to 1, normalised with mean {_short(mean)} and standard deviation {_short(std)}"


def merged_model(run_dir: Path) -> nn.Module:
    """The global model of a run's last checkpoint as the backbone's own module, adapters merged into its weights."""
    return _merged(_load_run(run_dir))


@dataclass(frozen=True)
class TrainedModel:
    """The model after the last round of a run."""

    config: Config
    model: AdaptedModel
    classes: int
    folded: bool  # updates were merged into the frozen weights

    @property
    def factors(self) -> dict[str, LoRAFactors]:
        """Of the global adapter, by layer."""
        adapter = self.model.adapters.layout.unpack(self.model.adapters.flat.detach().squeeze(0))
        return adapter.with_cores_in_b().factors

    @property
    def head(self) -> dict[str, Tensor]:
        """Of the global adapter, by parameter."""
        return self.model.adapters.layout.unpack(self.model.adapters.flat.detach().squeeze(0)).head


def _load_run(run_dir: Path) -> TrainedModel:
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise CheckpointError(f"{run_dir} is no run directory with a checkpoint")
    if not (run_dir / CONFIG_FILE).is_file():
        raise CheckpointError(f"{run_dir / CONFIG_FILE} is missing, and tells which model it is; put the file back")
    config, checkpoint = load_config_of_run(run_dir), load_checkpoint(checkpoints[-1])
    method = build_aggregator(config.method)
    if method.personal_parts:
        name = config.method["name"]
        raise ConfigError(f"{run_dir} has no global model: with method.name={name} every client has its own")
    classes = len(checkpoint.identity["classes"])
    model = build_model(config.model, classes, config.seed, method.core).attach()
    needed = {f"{BASE}{path}": weight for path, weight in model.adapters.base_weights().items()}
    layout = model.adapters.layout
    needed["adapter"] = torch.empty(layout.length, device="meta")
    recent = RecentAdapters.at_start(config.evaluation, layout, torch.device("meta"))
    if recent is not None:
        needed[RECENT], recent.rows = recent.rows, checkpoint.tensors.get(RECENT, recent.rows)
    found = {n: tensor for n, tensor in checkpoint.tensors.items() if n in needed or n.startswith(BASE)}
    check_tensors(found, needed, str(checkpoints[-1]))
    of_last, rounds = checkpoint.tensors["adapter"], checkpoint.completed_rounds
    model.adapters.write(evaluated_adapter(config.evaluation, layout, of_last, recent, rounds))
    folded = base_weights_in(checkpoint)
    model.adapters.load_base_weights(folded)
    return TrainedModel(config, model, classes, bool(folded))


def _merged(trained: TrainedModel) -> nn.Module:
    """The backbone without our modules in it."""
    model, backbone = trained.model, trained.model.backbone
    head = plain_head(model, trained.config.model.name)
    model.adapters.fold_into_base(trained.factors)
    for path, module in list(backbone.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, LoRALinear):
            setattr(backbone.get_submodule(parent), name, module.base)
        elif isinstance(module, ClientHead):
            setattr(backbone.get_submodule(parent), name, head)
    return backbone.requires_grad_(False).eval()


def write_merged(trained: TrainedModel, out: Path) -> str:
    """Write model.safetensors into the folder `out`; returns the line that loads it. Merges `trained` in place."""
    name, config = trained.config.model.name, trained.config.model
    backbone = _merged(trained)
    file = out / "model.safetensors"
    # A copy of each: safetensors takes no two that share their memory, as the position encodings of CoaT do.
    tensors = {key: t.clone(memory_format=torch.contiguous_format) for key, t in backbone.state_dict().items()}
    save_file(tensors, file)
    open_to_others(file)
    if BACKBONES.is_from_plugin(name):
        code = f"model.load_state_dict(safetensors.torch.load_file({_quoted(file)}))"
        return f"{code}  # a {name} of {trained.classes} classes"
    return f"timm.create_model({_arguments(config, backbone, trained.classes)}, checkpoint_path={_quoted(file)})"


def write_peft(trained: TrainedModel, out: Path) -> str:
    """Write PEFT's files into the folder `out`; returns the line that loads them."""
    from peft import LoraConfig, get_peft_model

    config, factors, head = trained.config, trained.factors, trained.head
    head_path = next(iter(head)).rpartition(".")[0]
    lora: Any = config.model.lora  # PEFT declares alpha an int and takes any number
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(factors),
        modules_to_save=[head_path],
    )
    backbone = create_backbone(config.model, trained.classes, config.seed)
    classifier = backbone.get_submodule(head_path)
    if classifier.out_features != trained.classes:  # of a plug-in's backbone, which does not know the data
        parent, _, attribute = head_path.rpartition(".")
        new = nn.Linear(classifier.in_features, trained.classes)
        setattr(backbone.get_submodule(parent), attribute, new)
    wrapped: Any = get_peft_model(backbone, settings)
    with torch.no_grad():
        for path, of_layer in factors.items():
            layer = wrapped.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(of_layer.A)
            layer.lora_B["default"].weight.copy_(of_layer.B)
        for name, tensor in head.items():
            module = wrapped.base_model.model.get_submodule(head_path).modules_to_save["default"]
            getattr(module, name.rpartition(".")[2]).copy_(tensor)
    _check_same_logits(trained.model, wrapped)
    wrapped.save_pretrained(out)
    open_to_others(out / "adapter_model.safetensors")
    what = config.model.name
    if not BACKBONES.is_from_plugin(what):
        what = f"timm.create_model({_arguments(config.model, backbone, trained.classes)})"
    return f"PeftModel.from_pretrained(<{what} with its frozen weights>, {_quoted(out)})"


@torch.inference_mode()
def _check_same_logits(model: AdaptedModel, wrapped: nn.Module) -> None:
    """Raise ConfigError where PEFT's layers do something else than ours, which also work where a weight is read."""
    images = torch.arange(3 * model.image_size**2).view(1, 3, model.image_size, model.image_size).to(torch.uint8)
    expected, given = model(images), wrapped.eval()(model.normalize(images))
    if not torch.allclose(given, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ConfigError(
            "as a PEFT adapter this model would give other logits: PEFT has no effect on layers whose weight the "
            "backbone reads instead of calling them (attn.qkv of BEiT, EVA-02 and Swin V2); leave out --peft"
        )


def _arguments(config: ModelConfig, backbone: nn.Module, classes: int) -> str:
    """What timm.create_model needs to make this backbone again, as code."""
    options = {"num_classes": classes, **size_option(config)}
    if has_second_head(backbone):
        options["use_aux_head"] = False
    return ", ".join([_quoted(config.name), *(f"{key}={value}" for key, value in options.items())]) + _pooling(backbone)


def _quoted(text: object) -> str:
    """As a string in Python, which may have quotes and backslashes in it."""
    return json.dumps(str(text), ensure_ascii=False)


def _pooling(backbone: nn.Module) -> str:
    """How tokens are pooled, where it is not the default of the class: weights of a file may ask for that (fc_norm)."""
    pooling = inspect.signature(type(backbone).__init__).parameters.get("global_pool")
    mine = getattr(backbone, "global_pool", None)
    given = pooling is not None and isinstance(mine, str) and mine != pooling.default  # a module is the class's own
    return f', global_pool="{mine}"' if given else ""


def _short(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"

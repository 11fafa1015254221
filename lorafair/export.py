"""Take a trained model out of a run: as plain timm weights with the adapter merged in, or as a PEFT adapter."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafair.adapter import LoRAFactors
from lorafair.aggregation import build_aggregator
from lorafair.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from lorafair.config import Config, ConfigError, load_config
from lorafair.errors import LorafairError
from lorafair.models import AdaptedModel, build_model, create_backbone


def export_run(run_dir: Path, out: Path, *, peft: bool) -> str:
    """Write the global model of a run's last checkpoint into the folder `out`; returns how to load it.

    Without `peft`: model.safetensors for timm's create_model, with W0 + s·B·A in place of the adapted weights. With it:
    adapter and head in PEFT's format, to be put on the same frozen weights. Raises LorafairError for a run without a
    global model, and for PEFT if the federation has changed the frozen weights or the package is missing.
    """
    if peft and importlib.util.find_spec("peft") is None:
        raise ConfigError("export to PEFT needs its package: pip install 'lorafair[export]'")
    config, model, classes, folded = _load_run(run_dir)
    if peft and folded:
        raise ConfigError(
            f"{run_dir} merged updates into the frozen weights, which an adapter cannot hold; leave --peft"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorafairError(f"{out} cannot be made a folder ({error.strerror}); name another one") from error
    options = f"num_classes={classes}" + (f", img_size={config.model.image_size}" if config.model.image_size else "")
    mean, std = ((tensor / 255).flatten().tolist() for tensor in (model.mean, model.std))
    if peft:
        _write_peft(config, model, classes, out)
        code = f'PeftModel.from_pretrained(<{config.model.name} with its frozen weights, {options}>, "{out}")'
    else:
        save_file(_merged_weights(model), out / "model.safetensors")
        code = f'timm.create_model("{config.model.name}", {options}, checkpoint_path="{out}/model.safetensors")'
    return f"{code}\ninput: RGB in 0 to 1, normalised with mean {_short(mean)} and standard deviation {_short(std)}"


def _load_run(run_dir: Path) -> tuple[Config, AdaptedModel, int, bool]:
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints or not (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{run_dir} is no run directory with a checkpoint")
    config, checkpoint = load_config([str(run_dir / "config.yaml")]), load_checkpoint(checkpoints[-1])
    if build_aggregator(config.method).keeps:
        name = config.method["name"]
        raise ConfigError(f"{run_dir} has no global model: with method.name={name} every client has its own")
    classes = len(checkpoint.identity["classes"])
    model = build_model(config.model, classes, config.seed).attach()
    model.adapters.write(checkpoint.tensors["adapter"])
    folded = {k.removeprefix("base."): t for k, t in checkpoint.tensors.items() if k.startswith("base.")}
    model.adapters.load_base_weights(folded)
    return config, model, classes, bool(folded)


def _global_adapter(model: AdaptedModel) -> tuple[dict[str, LoRAFactors], dict[str, Tensor]]:
    state = model.adapters.layout.unpack(model.adapters.flat.detach().squeeze(0))
    return state.factors, state.head


def _merged_weights(model: AdaptedModel) -> dict[str, Tensor]:
    factors, head = _global_adapter(model)
    model.adapters.fold_into_base(factors)
    trained = {f"{path}.{factor}" for path in factors for factor in "AB"}
    weights = {k.replace(".base.", "."): t for k, t in model.backbone.state_dict().items() if k not in trained}
    return {name: tensor.contiguous() for name, tensor in (weights | head).items()}


def _write_peft(config: Config, model: AdaptedModel, classes: int, out: Path) -> None:
    from peft import LoraConfig, get_peft_model

    factors, head = _global_adapter(model)
    head_path = next(iter(head)).rpartition(".")[0]
    lora: Any = config.model.lora  # PEFT declares alpha an int and takes any number
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(factors),
        modules_to_save=[head_path],
    )
    wrapped: Any = get_peft_model(create_backbone(config.model, classes, config.seed), settings)
    with torch.no_grad():
        for path, of_layer in factors.items():
            layer = wrapped.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(of_layer.A)
            layer.lora_B["default"].weight.copy_(of_layer.B)
        for name, tensor in head.items():
            module = wrapped.base_model.model.get_submodule(head_path).modules_to_save["default"]
            getattr(module, name.rpartition(".")[2]).copy_(tensor)
    wrapped.save_pretrained(out)


def _short(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"

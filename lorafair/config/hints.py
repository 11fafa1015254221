"""Suggestions for unknown option names."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorafair.config.options import all_options, former_keys, group_of
from lorafair.config.schema import Config
from lorafair.errors import ConfigError, did_you_mean

# What other programs call them.
_NAMES_IN_OTHER_PROGRAMS = {
    "lr": "client.learning_rate",
    "wd": "client.weight_decay",
    "bs": "client.batch_size",
    "optim": "client.optimizer",
    "local_epochs": "client.epochs",
    "local_steps": "client.steps",
    "num_rounds": "rounds",
    "n_rounds": "rounds",
    "global_rounds": "rounds",
    "num_clients": "partition.clients",
    "n_clients": "partition.clients",
    "num_users": "partition.clients",
    "dataset": "data.source",
    "data_dir": "data.root",
    "backbone": "model.name",
    "pretrained": "model.weights",
    "img_size": "model.image_size",
    "r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "target_modules": "model.lora.targets",
    "dirichlet_alpha": "partition.alpha",
    "gpus": "fabric.devices",
    "nodes": "fabric.num_nodes",
    "device": "fabric.accelerator",
    "output_dir": "run_dir",
    "log_dir": "run_dir",
    "out": "run_dir",
    "algorithm": "method.name",
    "aggregator": "method.name",
    "strategy": "method.name",
    "lambda": "method.regularization",
    "mu": "client.proximal",
}


def unknown_option(key: str, value: Any, origin: str) -> ConfigError:
    """The error for a key that is no option: what it could have been, and what there is in its group."""
    if key in (renamed := former_keys(Config)):
        return ConfigError(f"{origin}{key} is now {renamed[key]}")
    owner: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = {f.name: group_of(f) for f in dataclasses.fields(owner)} if owner is not None else {}
        where = ".".join(parts[:depth])
        if not known:
            return ConfigError(f"{origin}there is no option {key}: {where} is a value, not a group of options")
        if not part:
            return ConfigError(f"{origin}{key}={value} has no name before the = or between two dots")
        if part == "compare" and not depth:
            return ConfigError(f"{origin}a compare: section is for lorafair compare; type: lorafair compare FILE.yaml")
        if part not in known:
            near = did_you_mean(part, known, f"{where}." if where else "")
            elsewhere = _name_in_another_program(parts[-1], value, within="fabric" if where == "fabric" else "")
            hint = near or elsewhere if isinstance(value, dict) else elsewhere or near
            options = f"options{f' of {where}' if where else ''}: {', '.join(known)}"
            return ConfigError(f"{origin}there is no option {key}; {hint}{options}")
        owner = known[part]
    raise AssertionError(f"{key} is an option")


def options_called(name: str) -> list[str]:
    """The option of this name; else those of groups with it as their last name, or that other programs call so."""
    found = [key for key, _ in all_options(Config) if key.rpartition(".")[2] == name]
    return (
        [name]
        if name in found
        else found or [meant for called, meant in _NAMES_IN_OTHER_PROGRAMS.items() if called == name.lower()]
    )


def _name_in_another_program(name: str, value: Any, *, within: str) -> str:
    keys = [key for key in options_called(name) if key.startswith(within)]  # of fabric, Lightning's names may be meant
    shown = [f"{key}={value}" if not isinstance(value, dict | list) else key for key in keys]
    return f"did you mean {' or '.join(shown)}? " if shown else ""

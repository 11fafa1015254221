"""Fetch and build what runs need, where there is network: afterwards compute nodes find it in the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorafair.config.schema import Config, DataConfig, ModelConfig
from lorafair.console import log
from lorafair.data.sources import load_images
from lorafair.files.cache import cache_dir
from lorafair.model.backbone import build_model, check_model, weights_text


def prepare(configs: Sequence[Config]) -> None:
    """Load the images and build the model of each of these runs once, without training, and say what lies where.

    Raises LorafairError as the run would.
    """
    seen: list[DataConfig | ModelConfig] = []
    for config in configs:
        if config.model not in seen:
            seen.append(config.model)
            check_model(config.model)
            build_model(config.model, classes=2, seed=config.seed)
            log.info(f"weights:  {config.model.name} ({weights_text(config.model)})")
        if config.data not in seen:
            seen.append(config.data)
            data = load_images(config.data, config.seed)
            log.info(f"images:   {data.description}: {len(data.train):,} for training, {len(data.test):,} for the test")
    for what, folder in (("cache", cache_dir()), ("timm", _hub_cache())):
        if folder.is_dir():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
            log.info(f"{what}:    {folder}, {size / 1e6:,.0f} MB; it has to be where the compute nodes see it")


def _hub_cache() -> Path:
    """Where Hugging Face's client keeps timm's weights."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")

"""Where the batches of a run come from: image files, decoded images, cached tokens, or the memory of the device."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafair.caching.images import cached_images
from lorafair.caching.staging import staging_folder
from lorafair.caching.tokens import cached_tokens, reason_against_cache, token_file
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.collectives import on_all_ranks
from lorafair.config.schema import Config
from lorafair.console import log
from lorafair.data.images import ImageData, Split
from lorafair.data.loading import BatchSource, ImageSource, ResidentSource
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import image_size_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Inputs:
    """What the model is fed with."""

    train: BatchSource
    test: BatchSource
    of_tokens: bool = False  # not images


def open_inputs(fabric: Fabric, config: Config, model: AdaptedModel, data: ImageData) -> Inputs:
    """Find, or decode and compute, what the model is fed with. Call on every rank.

    Raises LorafairError on all ranks where a cache is demanded and not possible, or an image cannot be decoded.
    """
    size = image_size_of(config.model)
    reason = ""
    with same_error_on_all_ranks(fabric):
        reason = reason_against_cache(config.model, model, len(data.train) + len(data.test), changes_of_images(config))
    reason = fabric.broadcast(reason)
    stage = config.data.stage
    if stage is not None and staging_folder(stage, os.environ) is None:
        log.info("nothing is staged: data.stage=auto, and neither SLURM_TMPDIR nor TMPDIR is set")
    inputs = _images(fabric, config, data, size, reason) if reason else _tokens(fabric, config, model, data)
    if not config.data.resident:
        return inputs
    train = inputs.train
    with same_error_on_all_ranks(fabric):
        train = ResidentSource(inputs.train, len(data.train), fabric.device)
    return replace(inputs, train=train)


def changes_of_images(config: Config) -> str:
    """Which option changes images before the model sees them; empty where none does."""
    if config.attack.name == "backdoor":
        return "attack.name=backdoor changes the images of some clients"
    augmentation = config.data.augmentation
    return "" if augmentation == "none" else f"data.augmentation={augmentation} changes the images in every pass"


def _images(fabric: Fabric, config: Config, data: ImageData, size: int, reason: str) -> Inputs:
    """Images, since tokens are not cached for this reason."""
    if config.model.prefix_cache != "never":
        log.info(f"tokens of the frozen blocks are not cached: {reason}")
    kept = cached_images(fabric, config.data, data, size, read_once=False)
    if config.data.stage is not None and kept is data:
        log.info("nothing is staged: neither decoded images nor tokens are kept in a file; see data.cache")
    train, test = (_source(fabric, config, split, size) for split in (kept.train, kept.test))
    return Inputs(train, test)


def _tokens(fabric: Fabric, config: Config, model: AdaptedModel, data: ImageData) -> Inputs:
    """Tokens of the frozen blocks, from an earlier run or computed now."""
    size, count = image_size_of(config.model), len(data.train) + len(data.test)
    weights = model.fingerprint(of_embed=True)
    files = [
        token_file(fabric, model, config.model, len(split), f"{data.fingerprint} {name}", weights)
        for name, split in (("train", data.train), ("test", data.test))
    ]
    there = on_all_ranks(fabric, all(file.file.exists() for file in files))
    done = "kept from an earlier run" if there else f"computed once for {count:,} images"
    log.info(f"tokens of the {model.prefix_blocks} frozen blocks below the adapters: {done}")
    if not there:
        data = cached_images(fabric, config.data, data, size, read_once=True)
    train, test = (
        cached_tokens(fabric, model, _source(fabric, config, split, size), file, config.data.stage)
        for split, file in zip((data.train, data.test), files, strict=True)
    )
    return Inputs(train, test, of_tokens=True)


def _source(fabric: Fabric, config: Config, split: Split, size: int) -> ImageSource:
    return ImageSource(split.images, size, config.data.workers, pin_memory=fabric.device.type == "cuda")

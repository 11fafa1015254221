"""The arithmetic of local training: floating-point operations for each image, counted without computing anything."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lorafair.config.schema import ModelConfig
from lorafair.model.adapter import CoreShape
from lorafair.model.backbone import build_model


def flop_per_image(config: ModelConfig, classes: int, core: CoreShape | None = None) -> int:
    """Of a training step with one image: a forward pass through the whole model, and the backward pass.

    Frozen weights have no gradients, so the backward pass computes gradients of activations, down to the first adapted
    layer, and those of factors and head. Matrix products and convolutions are counted, with two operations for each
    multiplication. The model is made on PyTorch's meta device. The number is therefore the same on every machine, and
    does not depend on how the run saves work or memory (cached tokens, gradient checkpointing).
    """
    plain = dataclasses.replace(
        config,
        weights="random",
        weights_section=None,
        gradient_checkpointing=False,
        lora=dataclasses.replace(config.lora, dropout=0.0),
    )
    with torch.device("meta"):
        model = build_model(plain, classes, seed=0, core=core).attach("meta")
        # The counter does not know every fused attention; this one consists of products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(model.empty_images(1)).float().sum().backward()
    return int(counter.get_total_flops())

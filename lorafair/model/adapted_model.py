"""A frozen backbone with LoRA adapters and a trainable head.

Letters: C clients in the cohort, N images of one client, S side of the image, T tokens, D features.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafair import third_party
from lorafair.errors import ConfigError, first_line
from lorafair.model.attention import attend_by_products
from lorafair.model.lora import ClientHead, LoRALinear, block_of
from lorafair.model.parameters import AdapterParameters
from lorafair.model.patches import embed_patches_by_products
from lorafair.model.proof import prove_apart

_HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what linear layers compute in under autocast


class AdaptedModel(nn.Module):
    """The backbone of all clients and the adapters of one cohort.

    `forward` takes uint8 images (C*N, 3, S, S) or the cached output of `embed` (C*N, T, D) and returns logits
    (C*N, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, image_size: int, prefix_blocks: int, mean: Any, std: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size = image_size  # S
        self.prefix_blocks = prefix_blocks  # blocks below the first adapter; 0 where the split is not supported
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        self.gradient_checkpointing = False
        self._adapters: AdapterParameters | None = None
        self._held_in: torch.dtype | None = None
        self._computes_in = torch.float32  # what flows between the layers, where autocast does not say otherwise

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
        """Move to the device (None: stay) and make room there for the adapters of a cohort.

        Raises ConfigError for adapted layers in which several clients side by side would mix.
        """
        if max_cohort > 1:  # before the move: kernels of GPUs may multiply what is not finite by zero
            prove_apart(self, max_cohort)
        if device is not None:
            self.to(device)
        if self.mean.device.type == "cuda":
            embed_patches_by_products(self.backbone)
        self._adapters = AdapterParameters(self.backbone, max_cohort)
        return self

    def set_precision(self, precision: str) -> None:
        """Hold the weights as a run with this fabric.precision computes with them; once, after `attach`.

        Raises ConfigError for a backbone that cannot: a plug-in's may mix types of its own.
        """
        if precision in ("bf16-true", "bf16-mixed") and self.mean.device.type == "cpu":
            attend_by_products(self.backbone)
        if precision == "bf16-true":
            self.compute_in(torch.bfloat16)
            self._prove_computes(precision)
        elif precision in _HALVES:
            self.hold_frozen_in(_HALVES[precision])

    def hold_frozen_in(self, dtype: torch.dtype) -> None:
        """Keep the weights of linear layers that nothing trains in what autocast casts them to at every step.

        The numbers are those of casting each time. Adapted layers stay as they are: methods may add to their weights.
        From then on the model runs under autocast alone.
        """
        self._held_in = dtype
        adapted = {layer.base for layer in self.backbone.modules() if isinstance(layer, LoRALinear)}
        for layer in self.backbone.modules():
            if type(layer) is nn.Linear and layer not in adapted:
                layer.to(dtype)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Keep all that nothing trains in this type, and compute in it, without autocast; logits are float32.

        The weights of adapted layers stay float32 and are cast at every step: methods may add to them what is smaller
        than the steps of half precision. The factors and the head stay float32, too.
        """
        self._computes_in = dtype
        kept: set[Tensor] = set()
        for module in self.backbone.modules():
            if isinstance(module, LoRALinear):
                module.computes_in = dtype
                kept |= {*module.parameters()}
            elif isinstance(module, ClientHead):
                module.in_float32 = True
                kept |= {*module.parameters()}
        for tensor in {*self.backbone.parameters(), *self.backbone.buffers()} - kept:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    @torch.no_grad()
    def _prove_computes(self, precision: str) -> None:
        try:
            self(self.empty_images(len(self.adapters.flat)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the backbone's own code, which may do anything
            raise ConfigError(
                f"fabric.precision={precision}: {type(self.backbone).__name__} does not compute in it "
                f"({first_line(error)}); set fabric.precision=bf16-mixed or 32-true"
            ) from error

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (..., 3, S, S) -> float32 with the checkpoint's mean and standard deviation."""
        return images.float().sub_(self.mean).div_(self.std)  # in place: fresh memory costs more than the arithmetic

    def _entering(self, images: Tensor) -> Tensor:
        """uint8 images (..., 3, S, S) as the first layer takes them."""
        return self.normalize(images).to(self._computes_in)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (C*N, 3, S, S) uint8, or tokens (C*N, T, D) from `embed`, to logits (C*N, classes)."""
        if inputs.dtype == torch.uint8:
            return cast(Tensor, self.backbone(self._entering(inputs)))
        backbone: Any = self.backbone
        tokens = inputs.to(self._computes_in)  # they may be kept in half the bits
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in backbone.blocks[self.prefix_blocks :]:
            tokens = checkpoint(block, tokens, use_reentrant=False) if again else block(tokens)
        return cast(Tensor, backbone.forward_head(backbone.norm(tokens)))

    def embed(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, S, S) to the tokens (N, T, D) that enter the first adapted block."""
        backbone: Any = self.backbone
        x = self._entering(images)
        x = backbone.stem(x) if type(backbone).__name__ == "MlpMixer" else third_party.vit_tokens(backbone, x)
        for block in backbone.blocks[: self.prefix_blocks]:
            x = block(x)
        return x

    @torch.inference_mode()
    def shape_of_tokens(self) -> torch.Size:
        """(T, D) of the tokens that `embed` makes of an image."""
        kind = self.mean.device.type
        with torch.autocast(kind, self._held_in or torch.bfloat16, enabled=self._held_in is not None):
            return self.embed(self.empty_images(1)).shape[1:]

    @torch.inference_mode()
    def numbers_per_image(self) -> float:
        """How many numbers of an image enter an adapted layer, on average over these layers."""
        entering: list[int] = []
        layers = [module for module in self.backbone.modules() if isinstance(module, LoRALinear)]
        hooks = [m.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0].numel())) for m in layers]
        self(self.empty_images(1))
        for hook in hooks:
            hook.remove()
        return sum(entering) / len(entering)

    def empty_images(self, count: int) -> Tensor:
        """Black images (count, 3, S, S), uint8, on the model's device."""
        return torch.zeros(count, 3, self.image_size, self.image_size, dtype=torch.uint8, device=self.mean.device)

    def fingerprint(self, *, of_embed: bool = False) -> str:
        """Names the frozen weights and the normalisation; `of_embed`: only those that `embed` uses."""
        digest = hashlib.sha256(f"{type(self.backbone).__name__} {self.prefix_blocks}".encode())
        frozen = {name: p for name, p in self.backbone.named_parameters() if not p.requires_grad}
        for name, tensor in {**frozen, **dict(self.named_buffers())}.items():
            if not of_embed or not name.startswith("blocks.") or block_of(name) < self.prefix_blocks:
                values = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy does not have it
                digest.update(name.encode() + values.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

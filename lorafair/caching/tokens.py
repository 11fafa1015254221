"""The tokens below the first adapted block, computed once per image and reused in every round and by every client.

They are the same for all clients and rounds because nothing below the first adapter is trained and images are not
augmented. The file is memory-mapped, so the ranks of a node share one copy of it.

Letters: N images of a split, T tokens, D features, S side of the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafair.caching.shared_array import SharedArray, build_together, cache_folder, lack_of_room
from lorafair.caching.staging import staged
from lorafair.config.schema import ModelConfig
from lorafair.data.loading import BatchSource, Indices
from lorafair.errors import ConfigError
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import image_size_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Fixed, because the last bits of a token can depend on the size of the batch it is computed in.
EMBED_BATCH = 64


class TokenSource:
    """Tokens (N, T, D) of one split in a memory-mapped file."""

    def __init__(self, file: Path) -> None:
        self._tokens = np.load(file, mmap_mode="r").view(np.ndarray)

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (len(i), T, D), float32 or bfloat16, for each index array i, in order."""
        for batch in indices:
            tokens = torch.from_numpy(self._tokens[batch])
            yield tokens.view(torch.bfloat16) if tokens.dtype == torch.int16 else tokens


def reason_against_cache(config: ModelConfig, model: AdaptedModel, images: int, changed_by: str = "") -> str:
    """Why the tokens of this many images are not cached; empty if they are. ConfigError where the cache is demanded.

    `changed_by`: which option changes images in training, if there is one.
    """
    if config.prefix_cache == "never":
        return "model.prefix_cache=never"
    if changed_by:
        reason = changed_by
    elif model.prefix_blocks == 0:
        reason = "no block lies below the first adapter, or the backbone is neither a plain ViT nor an MLP-Mixer"
    else:
        array = _array("", model, config, images)
        reason = lack_of_room(array, config.prefix_cache_gb, "model.prefix_cache_gb")
    if reason and config.prefix_cache == "always":
        raise ConfigError(f"model.prefix_cache=always is not possible: {reason}")
    return reason


def token_file(
    fabric: Fabric, model: AdaptedModel, config: ModelConfig, count: int, key: str, weights: str | None = None
) -> SharedArray:
    """The file of the tokens of a split of `count` images, there or not.

    `key` names the images; the model, the arithmetic and the device are added to it. `weights` is the model's
    fingerprint, where it is known.
    """
    weights = weights or model.fingerprint(of_embed=True)
    size, precision = str(image_size_of(config)), str(fabric.strategy.precision.precision)
    parts = ("3", key, weights, size, config.prefix_cache_dtype, fabric.device.type, precision, torch.__version__)
    return _array(hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32], model, config, count)


def cached_tokens(
    fabric: Fabric, model: AdaptedModel, images: BatchSource, tokens: SharedArray, stage: str | None = None
) -> TokenSource:
    """The tokens of a split, found in the cache or computed by the ranks of each node together. Call on every rank.

    `stage` is where nodes get their own copies of the file, as data.stage says.
    """

    @torch.inference_mode()
    def embed(parts: Sequence[Indices]) -> Iterator[NDArray[Any]]:
        for pixels in images.batches(parts):
            with fabric.autocast():
                embedded = model.embed(pixels.to(fabric.device)).float()
            # NumPy has no bfloat16: its bits are kept as integers.
            rounded = embedded.bfloat16().view(torch.int16) if tokens.dtype is np.int16 else embedded
            yield rounded.cpu().numpy()

    return TokenSource(staged(fabric, build_together(fabric, tokens, embed, "computing tokens"), stage))


def _array(name: str, model: AdaptedModel, config: ModelConfig, count: int) -> SharedArray:
    shape = (count, *model.shape_of_tokens())
    kept = np.int16 if config.prefix_cache_dtype == "bfloat16" else np.float32
    return SharedArray(cache_folder("tokens", "model.prefix_cache=never") / f"{name}.npy", shape, kept, EMBED_BATCH)

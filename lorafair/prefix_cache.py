"""The tokens below the first adapted block, computed once per image and reused in every round and by every client.

They are the same for all clients and rounds because nothing below the first adapter is trained and images are not
augmented. The file is memory-mapped, so the ranks of a node share one copy of it.

Letters: N images of a split, T tokens, D features, S side of the image.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lorafair.config import ConfigError, ModelConfig
from lorafair.data.loading import BatchSource, Indices
from lorafair.exchange import same_error_on_all_ranks
from lorafair.models import AdaptedModel
from lorafair.offline import cache_dir

# Fixed, because the last bits of a token can depend on the size of the batch it is computed in.
EMBED_BATCH = 64
GIGABYTE = 1e9
UNUSED_DAYS = 30


class TokenSource:
    """Tokens (N, T, D) float32 of one split in a memory-mapped file."""

    def __init__(self, file: Path) -> None:
        os.utime(file)  # in use: not to be removed
        self._tokens = np.load(file, mmap_mode="r")

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (len(i), T, D) for each index array i, in order."""
        return (torch.from_numpy(self._tokens[batch]) for batch in indices)


def reason_against_cache(config: ModelConfig, model: AdaptedModel, images: int, image_size: int) -> str:
    """Why the tokens of this many images are not cached; empty if they are. ConfigError where the cache is demanded."""
    if config.prefix_cache == "never":
        return "model.prefix_cache=never"
    if model.prefix_blocks == 0:
        reason = "no block lies below the first adapter, or the backbone is neither a plain ViT nor an MLP-Mixer"
    else:
        size = 4 * images * _token_shape(model, image_size).numel() / GIGABYTE
        free = shutil.disk_usage(_folder()).free / GIGABYTE
        if size > config.prefix_cache_gb:
            reason = f"it needs {size:.1f} GB and model.prefix_cache_gb={config.prefix_cache_gb:g}"
        elif size > 0.9 * free:
            reason = f"it needs {size:.1f} GB and {_folder()} has {free:.1f} GB free"
        else:
            return ""
    if config.prefix_cache == "always":
        raise ConfigError(f"model.prefix_cache=always is not possible: {reason}")
    return reason


def cached_tokens(
    fabric: Fabric, model: AdaptedModel, images: BatchSource, count: int, key: str, image_size: int
) -> TokenSource:
    """The tokens of a split of `count` images, found in the cache or computed by the ranks of each node together.

    `key` names the images; the model, the arithmetic and the device are added to it. Call on every rank.
    """
    weights = model.fingerprint(of_embed=True)
    parts = (key, weights, str(image_size), fabric.device.type, _precision(fabric), torch.__version__)
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    file = _folder() / f"{name}.npy"
    found = torch.tensor(int(file.exists()), device=fabric.device)
    if not bool(fabric.all_reduce(found, reduce_op="min")):  # all ranks act alike: the computation has barriers
        unique = fabric.broadcast(uuid.uuid4().hex)  # another run may compute the same tokens on this node
        partial = _folder() / f"{name}.{socket.gethostname()}.{unique}.partial"
        try:
            _compute(fabric, model, images, count, partial, image_size)
            with same_error_on_all_ranks(fabric):
                if fabric.local_rank == 0:
                    _keep(partial, file)
        finally:
            if fabric.local_rank == 0:
                partial.unlink(missing_ok=True)
    return TokenSource(file)


@torch.inference_mode()
def _compute(
    fabric: Fabric, model: AdaptedModel, images: BatchSource, count: int, partial: Path, image_size: int
) -> None:
    strategy: Any = fabric.strategy
    batches = [np.arange(i, min(i + EMBED_BATCH, count)) for i in range(0, count, EMBED_BATCH)]
    mine = batches[fabric.local_rank :: strategy.num_processes]
    with same_error_on_all_ranks(fabric):
        if fabric.local_rank == 0:
            _remove_unused()
            shape = (count, *_token_shape(model, image_size)[1:])
            np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape).flush()
    with same_error_on_all_ranks(fabric):
        tokens = np.load(partial, mmap_mode="r+")
        for batch, pixels in zip(mine, images.batches(mine), strict=True):
            with fabric.autocast():
                tokens[batch] = model.embed(pixels.to(fabric.device)).float().cpu().numpy()
        tokens.flush()


@torch.inference_mode()
def _token_shape(model: AdaptedModel, image_size: int) -> torch.Size:
    """(1, T, D)."""
    return model.embed(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=model.mean.device)).shape


def _keep(partial: Path, file: Path) -> None:
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    if not file.exists():  # another run may read it already; on a network file system a replaced file is lost to it
        os.replace(partial, file)


def _remove_unused() -> None:
    """Late enough for no running job to lose its tokens: being open protects no file on a network file system."""
    for file in _folder().iterdir():
        days = 1 if file.suffix == ".partial" else UNUSED_DAYS
        with contextlib.suppress(FileNotFoundError):  # another run removes it too
            if time.time() - file.stat().st_mtime > days * 86400:
                file.unlink()


def _folder() -> Path:
    folder = cache_dir() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written, or "
            "model.prefix_cache=never"
        ) from error
    return folder


def _precision(fabric: Fabric) -> str:
    return str(fabric.strategy.precision.precision)

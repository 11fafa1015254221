"""What is needed beside a run's model to use it: the names of its classes, and images as it takes them.

Letters: S side of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.checkpointing.folder import CheckpointError
from lorafair.config.loading import load_config
from lorafair.data.images import DataError, resize
from lorafair.data.pixels import to_rgb
from lorafair.data.resizing import resize_without_antialias
from lorafair.errors import first_line
from lorafair.model.backbone import image_size_of, normalization_of
from lorafair.reporting.run_dir import CONFIG_FILE


def classes_of(run_dir: Path) -> tuple[str, ...]:
    """The names of a run's classes in the order of its logits. Raises CheckpointError where there is no checkpoint."""
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise CheckpointError(f"{run_dir} is no run directory with a checkpoint")
    return tuple(load_checkpoint(checkpoints[-1]).identity["classes"])


def transform_of(run_dir: Path) -> ImageTransform:
    """What a run does with every test image before its model sees it. Raises ConfigError for no run directory."""
    config = load_config(str(run_dir / CONFIG_FILE))
    mean, std = normalization_of(config.model)
    return ImageTransform(image_size_of(config.model), tuple(mean), tuple(std), config.data.antialias)


@dataclass(frozen=True)
class ImageTransform:
    """An image, or the file of one, to the input of a model: RGB, resized to its square, normalised."""

    image_size: int  # S
    mean: tuple[float, ...]  # of each channel, for pixels from 0 to 1
    std: tuple[float, ...]
    antialias: bool

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """float32 (3, S, S). Raises DataError that names a file that cannot be read."""
        shrink = resize if self.antialias else resize_without_antialias
        pixels = torch.from_numpy(shrink(_as_rgb(image), self.image_size)).permute(2, 0, 1).float()
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self.mean, self.std))
        return (pixels - mean) / std


def _as_rgb(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    try:
        with Image.open(image) as opened:
            return to_rgb(opened)
    except (OSError, ValueError) as error:
        raise DataError(f"{image} is no image that can be read: {first_line(error)}") from error

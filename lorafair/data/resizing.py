"""Images made smaller without a filter, as tensors often are: bicubic from the 4 x 4 pixels around every point.

Letters: S side in pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from lorafair.data.images import CheckedReader, PictureReader
from lorafair.errors import ConfigError


def resize_without_antialias(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image as a square, uint8 (S, S, 3): torch's bicubic, clamped and rounded.

    The numbers of torchvision's `resize` of a uint8 tensor with antialias=False.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float()
    resized = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=False)
    return resized.clamp(0, 255).round().to(torch.uint8).squeeze(0).permute(1, 2, 0).contiguous().numpy()


@dataclass(frozen=True, eq=False)
class WithoutAntialias:
    """The images of another reader, resized without a filter."""

    images: PictureReader

    @staticmethod
    def of(images: CheckedReader, source: str) -> WithoutAntialias:
        """Raises ConfigError for a reader of a plug-in that resizes by itself."""
        if not isinstance(images, PictureReader):
            raise ConfigError(
                f"data.antialias=false needs images as they are, and those of data.source={source} come resized: give "
                f"{type(images).__name__} a method picture(index), or leave data.antialias out"
            )
        return WithoutAntialias(images)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, size: int) -> np.ndarray:
        """As `ImageReader.read`."""
        return resize_without_antialias(self.images.picture(index), size)

    def read_many(self, indices: np.ndarray, size: int) -> np.ndarray:
        """As `ImageReader.read_many`."""
        return np.stack([self.read(int(index), size) for index in indices])

    def digest(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.digest`."""
        return _other(self.images.digest(indices))

    def version(self, indices: np.ndarray) -> bytes:
        """As `CheckedReader.version`."""
        return _other(self.images.version(indices))


def _other(digest: bytes) -> bytes:
    return hashlib.sha256(b"without antialias" + digest).digest()

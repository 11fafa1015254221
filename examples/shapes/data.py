"""A data set: shapes drawn by Pillow in two styles, as torch data sets; and a partition of its images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import lorafair
from lorafair.seeding import seeded_numpy

SHAPES = ("circle", "square", "triangle")
SIDE = 32


class Shapes(Dataset[tuple[Image.Image, int]]):
    """Shapes of random size and place, filled or as lines; the same for the same seed and name."""

    classes = SHAPES

    def __init__(self, images: int, seed: int, name: str, *, filled: bool) -> None:
        self._filled = filled
        self._places = seeded_numpy(seed, "shapes", name).integers(6, 12, (images, 3))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        x, y, radius = (int(number) for number in self._places[index])
        box = (x - 4, y - 4, x + 2 * radius - 4, y + 2 * radius - 4)
        label = index % len(SHAPES)
        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        style = {"fill": "navy"} if self._filled else {"outline": "black"}
        if SHAPES[label] == "circle":
            draw.ellipse(box, **style)
        elif SHAPES[label] == "square":
            draw.rectangle(box, **style)
        else:
            draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], **style)
        return image, label


@lorafair.register_source("shapes", domains=("filled", "lines"))
def shapes(config: lorafair.DataConfig, seed: int) -> dict[str, tuple[Shapes, Shapes]]:
    """Training and test images of both styles; `data.options.images` a style are for training."""
    images = int(config.options.get("images", 300))
    return {
        name: (
            Shapes(images, seed, f"{name} train", filled=name == "filled"),
            Shapes(60, seed, f"{name} test", filled=name == "filled"),
        )
        for name in ("filled", "lines")
    }


@lorafair.register_partition("by_class")
def by_class(
    config: lorafair.PartitionConfig,
    labels: np.ndarray,
    domains: np.ndarray,
    domain_names: Sequence[str],
    seed: int,
) -> list[lorafair.Client]:
    """Clients with two classes each, as far as that goes: the images sorted by class and cut into equal parts."""
    order = np.argsort(labels, kind="stable")
    parts = np.array_split(order, int(config.options.get("clients", 4)))
    return [lorafair.Client(f"part-{k}", None, np.sort(part)) for k, part in enumerate(parts)]

"""Random flips and crops of training batches, on the device that trains.

What happens to an image follows from the seed, the round, the client, the image and the client's step alone, so neither
ranks nor the clients beside it nor the device change it.

Letters: C clients in the cohort, N images of the largest batch, B = C*N, S side of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lorafair.data.loading import CohortStep
from lorafair.seeding import below, hashed, seeded_key

PADDING = 8  # a crop moves the image by up to an eighth of its side


def augmented(
    inputs: Iterable[Tensor],
    steps: Sequence[CohortStep],
    clients: Sequence[int],
    *,
    seed: int,
    round_index: int,
    crop: bool,
) -> Iterator[Tensor]:
    """The images (C*N, 3, S, S) uint8 of every step, flipped and, if wanted, cropped at random.

    `clients` are those of the cohort, in the order of the steps' rows.
    """
    keys = torch.tensor([seeded_key(seed, round_index, client, "augmentation") for client in clients]).unsqueeze(1)
    for number, (step, images) in enumerate(zip(steps, inputs, strict=True)):
        of_images = hashed(keys[: len(step.counts)], torch.from_numpy(step.indices))  # (C, N)
        yield flip_and_crop(images, hashed(of_images, number).flatten().to(images.device), crop=crop)


def flip_and_crop(images: Tensor, keys: Tensor, *, crop: bool) -> Tensor:
    """Flip each of the images (B, 3, S, S) with probability 1/2, by its key (B,).

    `crop`: then pad by S/8 on each side, by reflection, and cut a square of side S out at a random place.
    """
    side = images.shape[-1]
    place = torch.arange(side, device=images.device).expand(len(images), side)  # (B, S)
    flip = below(hashed(keys, 0), 2).unsqueeze(1) == 1
    rows, columns = place, place
    if crop:
        rows, columns = (_moved(place, hashed(keys, axis)) for axis in (1, 2))
    columns = torch.where(flip, side - 1 - columns, columns)
    if crop:
        images = images.gather(2, rows.view(-1, 1, side, 1).expand_as(images))
    return images.gather(3, columns.view(-1, 1, 1, side).expand_as(images))


def _moved(place: Tensor, bits: Tensor) -> Tensor:
    """Where the pixels at `place` (B, S) come from, moved by up to S/8 either way and reflected at the borders."""
    side = place.shape[1]
    padding = side // PADDING
    there = (place + (below(bits, 2 * padding + 1) - padding).unsqueeze(1)).abs()
    return torch.where(there < side, there, 2 * (side - 1) - there)

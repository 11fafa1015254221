"""Clients that lie: what a share of them does to its labels, its images or its update.

Who lies follows from the seed of the federation alone.

Letters: N clients of the run, C clients of a cohort, P packed length, B images of a batch, S side of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.config.schema import AttackConfig
from lorafair.data.loading import BatchSource, CohortStep, Indices
from lorafair.data.partition import Client
from lorafair.errors import ConfigError
from lorafair.seeding import below, hashed, seeded, seeded_key

_SQUARE = 6  # the square's side is this part of the image's
_PARTS = 10_000  # in which the share of poisoned images is counted


@dataclass(frozen=True)
class Attack:
    """What the attackers of a run do."""

    options: AttackConfig
    attackers: frozenset[int]
    of_attackers: Tensor  # (images,) bool: training images of clients that lie, on the CPU
    poisoned: Tensor  # (images,) bool: those that get the square and the label of the target

    @property
    def factor(self) -> float | None:
        """By which attackers multiply their update; None where it is as they trained it."""
        strength = self.options.strength or 1.0
        return {"sign_flip": -strength, "scaled_update": strength}.get(str(self.options.name))

    @property
    def on_images(self) -> bool:
        """Whether images change, so that tokens computed once are of no use."""
        return self.options.name == "backdoor"

    def labels(self, labels: Tensor, classes: int) -> Tensor:
        """The labels that clients train with (images,), on the device of `labels`.

        label_flip: class c is called Q − 1 − c (Fang et al., arXiv 1911.11815). backdoor: poisoned images are the
        target. All others stay.
        """
        if self.options.name == "label_flip":
            return torch.where(self.of_attackers.to(labels.device), classes - 1 - labels, labels)
        return torch.where(self.poisoned.to(labels.device), self.target, labels)

    @property
    def target(self) -> int:
        """The class that images with the square shall be taken for."""
        return self.options.target or 0

    def update(self, round_index: int, clients: Sequence[int], start: Tensor, rows: Tensor) -> Tensor:
        """What clients send, (C, P): attackers start + factor·(rows − start); honest clients keep their bits."""
        if self.factor is None:
            return rows
        lying = torch.tensor([client in self.attackers for client in clients], device=rows.device)
        return torch.where(lying.unsqueeze(1), start + self.factor * (rows - start), rows)

    def stamped(self, inputs: Iterable[Tensor], steps: Sequence[CohortStep]) -> Iterator[Tensor]:
        """The images (B, 3, S, S) of every step, with the square where they are poisoned."""
        for step, images in zip(steps, inputs, strict=True):
            chosen = self.poisoned[torch.from_numpy(step.indices).flatten()].to(images.device, non_blocking=True)
            yield torch.where(chosen.view(-1, 1, 1, 1), with_square(images), images)


def make_attack(
    options: AttackConfig, clients: Sequence[Client], images: int, classes: int, seed: int
) -> Attack | None:
    """The attack of a run on so many training images; None where nobody lies.

    Raises ConfigError where the share is no client or all of them, or the target is no class.
    """
    if options.name is None:
        return None
    count = round((options.share or 0.0) * len(clients))
    if not 0 < count < len(clients):
        raise ConfigError(
            f"attack.share={options.share:g} of {len(clients)} clients is {count}; at least one has to lie and one "
            "not: choose another share, or attack.name=null"
        )
    if (options.target or 0) >= classes:
        raise ConfigError(f"attack.target={options.target} is no class; there are 0 to {classes - 1}")
    order = torch.randperm(len(clients), generator=seeded(seed, "attackers"))
    attackers = frozenset(order[:count].tolist())
    of_attackers = torch.zeros(images, dtype=torch.bool)
    poisoned = torch.zeros(images, dtype=torch.bool)
    for client in sorted(attackers):
        own = torch.from_numpy(clients[client].indices).to(torch.int64)
        of_attackers[own] = True
        if options.name == "backdoor":
            drawn = below(hashed(seeded_key(seed, "backdoor", client), own), _PARTS)
            poisoned[own] = drawn < round(_PARTS * (options.poisoned_images or 0.0))
    return Attack(options, attackers, of_attackers, poisoned)


def with_square(images: Tensor) -> Tensor:
    """A copy of images (B, 3, S, S), uint8, with a white square of side S/6 in the lower right corner.

    As Gu et al. mark images (BadNets, arXiv 1708.06733); in federated learning Sun et al. (arXiv 1911.07963).
    """
    stamped = images.clone()
    side = max(2, images.shape[-1] // _SQUARE)
    stamped[..., -side:, -side:] = 255
    return stamped


class StampedSource(BatchSource):
    """Batches of images that all have the square."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """As those of the source, with the square."""
        return map(with_square, self._source.batches(indices))


def backdoor_success(confusion: Tensor, target: int) -> float:
    """Fraction of stamped test images of other classes that are taken for the target, from counts (D, Q, Q)."""
    others = confusion.sum(0).to(torch.float64)
    others[target] = 0
    return float(others[:, target].sum() / others.sum().clamp_min(1))

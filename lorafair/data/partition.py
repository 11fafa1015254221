"""Which client has which training images: index arithmetic only.

Letters: N training images, C classes, K clients of a domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorafair.config import PartitionConfig
from lorafair.errors import LorafairError
from lorafair.seeding import seeded_numpy

_DRAWS = 1000


class PartitionError(LorafairError):
    """The images cannot be dealt out as the configuration says."""


@dataclass(frozen=True, eq=False)
class Client:
    """One client's images."""

    name: str  # "serif" (a domain), "serif-0" (one of several in it), "client-3" (across domains)
    domain: int | None  # index of its domain; None: images of all domains
    indices: np.ndarray  # int64, ascending, into the training images


def partition(
    config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
) -> tuple[Client, ...]:
    """Deal the N training images out; each belongs to exactly one client, and every client has some.

    `labels` and `domains` (N,) are the class and the domain of every image. The clients of a domain depend on the seed
    and that domain's name and labels alone. `config` as `load_config` returns it, its conditional options filled in.
    Raises PartitionError.
    """
    if config.scheme == "iid":
        return _iid(config, len(labels), seed)
    clients: list[Client] = []
    for domain, name in enumerate(domain_names):
        members = np.flatnonzero(domains == domain)
        if config.scheme == "domain":
            clients.append(Client(name, domain, members))
        else:
            clients += _dirichlet(config, members, labels[members], domain, name, seed)
    return tuple(clients)


def pooled(labels: np.ndarray) -> tuple[Client, ...]:
    """The centralised reference: one client with all N training images."""
    return (Client("all", None, np.arange(len(labels))),)


def _iid(config: PartitionConfig, images: int, seed: int) -> tuple[Client, ...]:
    assert config.clients is not None
    if config.clients > images:
        raise PartitionError(f"partition.clients={config.clients} is more than the {images} training images there are")
    parts = np.array_split(seeded_numpy(seed, "iid").permutation(images), config.clients)
    return tuple(Client(f"client-{k}", None, np.sort(part)) for k, part in enumerate(parts))


def _dirichlet(
    config: PartitionConfig, members: np.ndarray, labels: np.ndarray, domain: int, name: str, seed: int
) -> list[Client]:
    """The share of each client in each class ~ Dirichlet(alpha, ..., alpha); `members` and `labels` of the domain."""
    rng = seeded_numpy(seed, "dirichlet", name)
    classes, counts = np.unique(labels, return_counts=True)
    cuts = _draw_cuts(config, counts, name, rng)  # (C, K - 1)
    pieces = [np.split(rng.permutation(members[labels == c]), cut) for c, cut in zip(classes, cuts, strict=True)]
    return [
        Client(f"{name}-{k}", domain, np.sort(np.concatenate(parts)))
        for k, parts in enumerate(zip(*pieces, strict=True))
    ]


def _draw_cuts(config: PartitionConfig, counts: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """Where to cut each class of `counts` (C,) images into K pieces (C, K - 1), so that every client has enough."""
    clients, alpha, least = config.clients_per_domain, config.alpha, config.min_images
    assert clients is not None
    assert alpha is not None
    assert least is not None
    images = int(counts.sum())
    if images < clients * least:
        raise PartitionError(
            f"domain {name} has {images} training images, too few for partition.clients_per_domain={clients} with "
            f"partition.min_images={least} each"
        )
    best = 0
    for _ in range(_DRAWS):
        shares = rng.dirichlet(np.full(clients, alpha), size=len(counts))  # (C, K)
        cuts: np.ndarray = np.rint(np.cumsum(shares, axis=1)[:, :-1] * counts[:, None]).astype(np.int64)
        smallest = int(np.diff(cuts, axis=1, prepend=0, append=counts[:, None]).sum(axis=0).min())
        if smallest >= least:
            return cuts
        best = max(best, smallest)
    raise PartitionError(
        f"domain {name}: in {_DRAWS} draws the smallest of {clients} clients had at most {best} of {images} images, "
        f"not partition.min_images={least}; lower it or partition.clients_per_domain, or raise partition.alpha={alpha}"
    )

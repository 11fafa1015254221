"""Which client has which training images: index arithmetic only.

Letters: N training images, C classes, K clients of a domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorafair.config.schema import PartitionConfig
from lorafair.console import log
from lorafair.errors import LorafairError, of_plugin
from lorafair.registry import PARTITIONS
from lorafair.seeding import seeded_numpy

_DRAWS = 1000


class PartitionError(LorafairError):
    """The images cannot be dealt out as the configuration says."""


@dataclass(frozen=True, eq=False)
class Client:
    """One client's images.

    Example:
        >>> lorafair.Client("client-0", None, np.array([0, 3, 4]))
    """

    name: str  # "serif" (a domain), "serif-0" (one of several in it), "client-3" (across domains)
    domain: int | None  # index of its domain; None: images of all domains
    indices: np.ndarray  # int64, ascending, into the training images


# Deals the training images out: from the group `partition` of the configuration, the class and the domain of every
# image (N,), the names of the domains and the seed.
Scheme = Callable[[PartitionConfig, np.ndarray, np.ndarray, Sequence[str], int], Sequence[Client]]


def register_partition(name: str) -> Callable[[Scheme], Scheme]:
    """Make a function a value of partition.scheme.

    Args:
        name: The value to use for partition.scheme.

    Returns:
        A decorator for a function of the group `partition` of the configuration, labels (N,), domains (N,), the names
        of the domains and the seed, that returns the clients: every image belongs to exactly one of them. It may read
        `config.options` and the shipped options. Random draws come from
        `lorafair.seeding.seeded_numpy(seed, purpose)`, so that all processes draw the same numbers.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @lorafair.register_partition("one_class_each")
        ... def one_class_each(config, labels, domains, domain_names, seed):
        ...     return [lorafair.Client(f"class-{c}", None, np.flatnonzero(labels == c)) for c in np.unique(labels)]
    """

    def register(scheme: Scheme) -> Scheme:
        PARTITIONS.add(name, scheme)
        return scheme

    return register


def partition(
    config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
) -> tuple[Client, ...]:
    """Deal the N training images out; each belongs to exactly one client, and every client has some.

    `labels` and `domains` (N,) are the class and the domain of every image. `config` as `load_config` returns it, its
    conditional options filled in. Raises PartitionError.
    """
    scheme = PARTITIONS[config.scheme]
    if not PARTITIONS.is_from_plugin(config.scheme):
        return tuple(scheme(config, labels, domains, domain_names, seed))
    with of_plugin(f"partition.scheme={config.scheme}"):
        clients = tuple(scheme(config, labels, domains, domain_names, seed))
    _check_clients(config.scheme, clients, len(labels))
    return clients


def by_domain(
    config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
) -> list[Client]:
    """One client a domain (feature non-IID)."""
    return [Client(name, domain, np.flatnonzero(domains == domain)) for domain, name in enumerate(domain_names)]


def dirichlet(
    config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
) -> list[Client]:
    """Several clients a domain with skewed labels (feature + label non-IID).

    The clients of a domain depend on the seed and that domain's name and labels alone.
    """
    clients: list[Client] = []
    for domain, name in enumerate(domain_names):
        members = np.flatnonzero(domains == domain)
        clients += _dirichlet_in_domain(config, members, labels[members], domain, name, seed)
    return clients


def iid(
    config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
) -> list[Client]:
    """All images shuffled and dealt out evenly."""
    assert config.clients is not None
    images = len(labels)
    if config.clients > images:
        raise PartitionError(f"partition.clients={config.clients} is more than the {images} training images there are")
    parts = np.array_split(seeded_numpy(seed, "iid").permutation(images), config.clients)
    return [Client(f"client-{k}", None, np.sort(part)) for k, part in enumerate(parts)]


def clients_known_before(config: PartitionConfig, domains: int | None) -> int | None:
    """How many clients there will be, as far as it follows from the configuration and the number of domains alone."""
    if config.scheme == "iid":
        return config.clients
    if domains is None or PARTITIONS.is_from_plugin(config.scheme):
        return None
    return domains * (config.clients_per_domain or 1) if config.scheme == "dirichlet" else domains


def pooled(labels: np.ndarray) -> tuple[Client, ...]:
    """The centralised reference: one client with all N training images."""
    return (Client("all", None, np.arange(len(labels))),)


def _dirichlet_in_domain(
    config: PartitionConfig, members: np.ndarray, labels: np.ndarray, domain: int, name: str, seed: int
) -> list[Client]:
    """The fraction of each class at each client ~ Dirichlet(alpha, ..., alpha); `members`, `labels` of the domain."""
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
        fractions = rng.dirichlet(np.full(clients, alpha), size=len(counts))  # (C, K)
        if config.balance:
            cuts = balanced_cuts(fractions, counts)
        else:
            cuts = np.rint(np.cumsum(fractions, axis=1)[:, :-1] * counts[:, None]).astype(np.int64)
        smallest = int(np.diff(cuts, axis=1, prepend=0, append=counts[:, None]).sum(axis=0).min())
        if smallest >= least:
            return cuts
        best = max(best, smallest)
    raise PartitionError(
        f"domain {name}: in {_DRAWS} draws the smallest of {clients} clients had at most {best} of {images} images, "
        f"not partition.min_images={least}; lower it or partition.clients_per_domain, or raise partition.alpha={alpha}"
    )


def balanced_cuts(fractions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where to cut each class into K pieces (C, K - 1), where a client with its equal part of all images gets no more.

    `fractions` (C, K) as drawn, `counts` (C,) images of each class; classes one after the other, in their order. As in
    NIID-Bench (arXiv 2102.02079), which cuts at whole images from below. Where the draw leaves those who still get some
    no part of a class, they share it equally.
    """
    clients = fractions.shape[1]
    sizes, cuts = np.zeros(clients, np.int64), np.empty((len(counts), clients - 1), np.int64)
    for index, (drawn, count) in enumerate(zip(fractions, counts, strict=True)):
        wanting = sizes < counts.sum() / clients
        part = drawn * wanting if (drawn * wanting).sum() > 0 else wanting.astype(float)
        cuts[index] = (np.cumsum(part / part.sum())[:-1] * count).astype(np.int64)
        sizes += np.diff(cuts[index], prepend=0, append=count)
    return cuts


def class_counts(clients: Sequence[Client], labels: np.ndarray, classes: int) -> np.ndarray:
    """Images of each class at each client (N, C)."""
    return np.stack([np.bincount(labels[client.indices], minlength=classes) for client in clients])


def _check_clients(scheme: str, clients: Sequence[Client], images: int) -> None:
    """Raise PartitionError for a plug-in's clients without images, with shared or unknown ones; log unused images.

    Names tell clients apart, so they must differ.
    """
    names = [client.name for client in clients]
    if not clients or len(set(names)) < len(names):
        raise PartitionError(f"partition.scheme={scheme} must return at least one client, each with a name of its own")
    owners = np.zeros(images, np.int64)
    for client in clients:
        if not len(client.indices):
            raise PartitionError(f"partition.scheme={scheme}: client {client.name} has no images")
        if min(client.indices) < 0 or max(client.indices) >= images:
            raise PartitionError(
                f"partition.scheme={scheme}: client {client.name} has images {min(client.indices)} to "
                f"{max(client.indices)}; there are images 0 to {images - 1} for training"
            )
        np.add.at(owners, client.indices, 1)
    shared = np.flatnonzero(owners > 1)
    if len(shared):
        raise PartitionError(
            f"partition.scheme={scheme}: {len(shared)} of {images} training images belong to several clients, image "
            f"{shared[0]} to {owners[shared[0]]} of them"
        )
    if unused := int((owners == 0).sum()):
        log.info(f"partition.scheme={scheme} leaves {unused:,} of {images:,} training images to no client")

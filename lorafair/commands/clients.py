"""Which client would have which images: a look at data and partition before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorafair.config.loading import load_config
from lorafair.console import format_count, log, printing
from lorafair.data.sources import load_images
from lorafair.experiment import clients_of


def count_labels(*arguments: str | Path | Sequence[str], **options: Any) -> dict[str, dict[str, int]]:
    """Read the images of a configuration, split them into its clients, and count them by class.

    Nothing is trained. Warnings about the images are printed as in a run.

    Args:
        arguments: YAML files and `key=value` pairs, as for `lorafair.run`.
        options: Further values by key.

    Returns:
        client -> class -> training images; every client lists every class, if necessary with 0.

    Raises:
        ConfigError: One line that names the key, what was given and what is possible.
        LorafairError: The images cannot be used, or cannot be split in this way.

    Example:
        >>> lorafair.count_labels("synthetic.yaml", "data.classes=2")["noisy"]
        {'grating-0deg': 60, 'grating-90deg': 60}
    """
    config = load_config(*arguments, **options)
    with printing():
        data = load_images(config.data, config.seed)
        clients = clients_of(config, data)
        log.info(
            f"{format_count(len(data.domains), 'domain')}, {format_count(len(data.classes), 'class', 'classes')}, "
            f"{len(data.train):,} images for training, {len(data.test):,} for the test; "
            f"{format_count(len(clients), 'client')}"
        )
    counts = {c.name: np.bincount(data.train.labels[c.indices], minlength=len(data.classes)) for c in clients}
    return {name: dict(zip(data.classes, of.tolist(), strict=True)) for name, of in counts.items()}

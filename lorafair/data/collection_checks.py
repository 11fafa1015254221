"""What is wrong, or strange, with the images of a source before any is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorafair.console import format_count, log, some
from lorafair.data.images import DataError, ImageCollection


def check_collection(collection: ImageCollection, source: str) -> None:
    """Raise DataError where the arrays of a collection do not belong together."""
    count = len(collection.images)
    for name in ("labels", "domain_of", "held_out"):
        array = np.asarray(getattr(collection, name))
        if array.shape != (count,):
            raise DataError(f"data.source={source}: {name} has shape {array.shape} for {count} images")
    for name, names in (("labels", collection.classes), ("domain_of", collection.domains)):
        values = np.asarray(getattr(collection, name))
        if count and not (np.issubdtype(values.dtype, np.integer) and 0 <= values.min() <= values.max() < len(names)):
            raise DataError(
                f"data.source={source}: {name} holds {values.min()} to {values.max()} of {values.dtype}; whole numbers "
                f"from 0 to {len(names) - 1} are needed"
            )


def warn_of_uneven_classes(collection: ImageCollection, domains: Sequence[str], classes: Sequence[str]) -> None:
    """Warn of classes that one domain alone has, that are never trained, and that have no image at all."""
    chosen = [collection.domains.index(name) for name in domains]
    used = np.isin(collection.domain_of, chosen) & (collection.labels < len(classes))
    pairs = np.unique(np.stack([collection.labels[used], collection.domain_of[used]]), axis=1)
    domains_with = np.bincount(pairs[0].astype(np.int64), minlength=len(classes))
    trained = np.bincount(collection.labels[used & ~collection.held_out], minlength=len(classes))
    alone = {int(label): collection.domains[domain] for label, domain in pairs.T if domains_with[label] == 1}
    if alone and len(domains) > 1:
        _warn([f"{classes[label]} ({domain})" for label, domain in alone.items()], "in one domain alone")
    names = np.array(classes, object)
    _warn(names[(domains_with > 0) & (trained == 0)].tolist(), "with test images alone")
    _warn(names[domains_with == 0].tolist(), "without images in the domains of this run")


def _warn(classes: Sequence[str], what: str) -> None:
    if classes:
        log.warning(f"{format_count(len(classes), 'class', 'classes')} {what}: {some(classes)}")

"""Image sets that were built once, as files: the pixels in one memory-mapped array, the rest beside it.

Letters: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorafair.data.images import DataError, ImageCollection, StoredImages

_IMAGES, _INDEX, _NAMES = "images.npy", "index.npz", "names.json"


def store(
    folder: Path,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    domain_of: np.ndarray,
    held_out: np.ndarray,
    domains: Sequence[str],
    classes: Sequence[str],
    description: str,
) -> None:
    """Write images (N, S, S, 3) uint8 and what belongs to them (see ImageCollection) into `folder`."""
    digests = [np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8) for image in images]
    np.save(folder / _IMAGES, images)
    np.savez(
        folder / _INDEX,
        labels=labels.astype(np.int64),
        domain_of=domain_of.astype(np.int64),
        held_out=held_out.astype(np.bool_),
        digests=np.stack(digests),
    )
    names = {"domains": list(domains), "classes": list(classes), "description": description}
    (folder / _NAMES).write_text(json.dumps(names, indent=1), encoding="utf-8")


def load_stored(folder: Path) -> ImageCollection:
    """Read what `store` wrote; the images stay on the disk until they are used. DataError if files are missing."""
    missing = [name for name in (_IMAGES, _INDEX, _NAMES) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} has lost {', '.join(missing)}; delete that folder and it is built again")
    names = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
    with np.load(folder / _INDEX) as index:
        return ImageCollection(
            domains=tuple(names["domains"]),
            classes=tuple(names["classes"]),
            images=StoredImages(folder / _IMAGES, index["digests"]),
            labels=index["labels"],
            domain_of=index["domain_of"],
            held_out=index["held_out"],
            description=names["description"],
        )

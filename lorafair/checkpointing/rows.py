"""Files of clients' rows that describe themselves and hold the checksum of their content.

Letters: n clients, p numbers a client returns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorafair.files.writing import fsync, write_atomically


def write_rows(file: Path, rows: Tensor, described: Mapping[str, str]) -> None:
    """Write rows (n, p), on the CPU, with texts that describe them. Raises OSError."""
    content = save({"rows": rows}, {**described, "checksum": _checksum(described, rows)})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    fsync(file.parent)


def read_description(file: Path) -> dict[str, str]:
    """The texts alone. Raises OSError, SafetensorError."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def read_rows(file: Path) -> tuple[Tensor, dict[str, str]]:
    """Rows (n, p) and the texts. Raises OSError; ValueError, KeyError or SafetensorError of a damaged file."""
    with safe_open(file, framework="pt") as opened:
        described = dict(opened.metadata() or {})
        # Copied, because the file is mapped into memory and will be removed.
        rows: Tensor = opened.get_tensor("rows").clone()
    if described.pop("checksum", None) != _checksum(described, rows):
        raise ValueError("it does not match its checksum")
    return rows, described


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor on any device."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # NumPy does not have it
        plain = plain.view(torch.int16)
    return plain.numpy().tobytes()


def _checksum(described: Mapping[str, str], rows: Tensor) -> str:
    text = json.dumps([dict(described), list(rows.shape)], sort_keys=True)
    return hashlib.sha256(text.encode() + bytes_of(rows)).hexdigest()

"""The plain backbone of one run, for the next runs of the same process that need the same one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Kept:
    is_on: bool = False
    key: str = ""
    backbone: nn.Module | None = None  # as it was made; runs get copies, which they adapt, move and fold into


_kept = _Kept()


@contextmanager
def keeping_backbone() -> Iterator[None]:
    """In the block, the backbone that was made last is kept; it takes the memory of a second one."""
    _kept.is_on = True
    try:
        yield
    finally:
        _kept.is_on, _kept.key, _kept.backbone = False, "", None


def kept_or_made(key: str, make: Callable[[], M]) -> M:
    """What `make` gives; a copy of it where it was made before with this key, which names all that it depends on."""
    if not _kept.is_on or torch.get_default_device().type == "meta":
        return make()
    if _kept.key != key:
        _kept.key, _kept.backbone = "", None  # before the next one is made: there is room for two
        made = make()
        _kept.key, _kept.backbone = key, copy.deepcopy(made)
        return made
    backbone: M = copy.deepcopy(_kept.backbone)  # type: ignore[assignment]
    return backbone

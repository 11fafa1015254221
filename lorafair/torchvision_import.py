"""Lets torchvision be imported next to a torch build that it was not compiled for.

Package indexes without a CPU build of torchvision combine a CPU build of torch with a CUDA build of torchvision. Its
compiled operators cannot be loaded then, which would not matter here: timm, lightning and torchmetrics import it for
other things. But it registers stand-ins for some operators without looking whether they exist, and fails. Declaring
those operators first is all that is missing.
"""

from __future__ import annotations

import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class TorchvisionFinder(MetaPathFinder):
    """Runs once, when torchvision is about to be imported; costs nothing before."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Never finds anything itself: it only prepares the ground for the finders after it."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(name)
            if spec is not None and spec.origin is not None:
                _declare_missing_operators(Path(spec.origin).parent)
        return None


def _declare_missing_operators(torchvision: Path) -> None:
    import torch
    from torch import library

    try:
        for compiled in torchvision.glob("_C*.so"):
            torch.ops.load_library(compiled)
    except OSError:
        source = (torchvision / "_meta_registrations.py").read_text()
        for operator in re.findall(r'register_fake\("torchvision::(\w+)"', source):
            library.define(f"torchvision::{operator}", "(Tensor unused) -> Tensor")

"""The parts of benchmarks/gpu.py, a file each."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environ_of_child() -> dict[str, str]:
    """The environment of a process that imports this checkout, and what the user's PYTHONPATH names."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}

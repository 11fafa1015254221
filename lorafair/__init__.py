"""Federated LoRA fine-tuning of vision backbones at scale; see README.md. Importing it imports nothing heavy."""

import sys

from lorafair.torchvision_import import TorchvisionFinder

__version__ = "0.1.0"

if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, TorchvisionFinder())

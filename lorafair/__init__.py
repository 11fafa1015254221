"""Federated LoRA fine-tuning of vision backbones at scale. Importing the package does nothing; see README.md."""

__version__ = "0.1.0"

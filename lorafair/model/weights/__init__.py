"""Frozen weights from files: read safely, the model's tensors found among the others, names converted, loaded whole."""

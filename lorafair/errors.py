"""The error a user can mend: one line that says what was given, what is possible and the key to change."""

from __future__ import annotations


class LorafairError(Exception):
    """Bad input (configuration, data, weights, checkpoint, cluster); the command prints it as one line and exits 2."""

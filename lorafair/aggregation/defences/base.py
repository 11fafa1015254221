"""The contract of a defence: what a server does about updates that do not look like the others.

A defence sees the clients' updates as changes of the model's weights, ΔP_k = s·(B_k A_k − B_0 A_0) and the change of
the head together as one vector, by their inner products alone: factors A and B of one product can be chosen in many
ways, and distances between factors change with that choice. What it decides concerns whole clients, so that any method
can follow.

Letters: K clients of the round, P packed length of the layers that a rank aggregates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorafair.config.schema import DefenceConfig
from lorafair.errors import ConfigError
from lorafair.registry import DEFENCES


@dataclass(frozen=True)
class Defence(ABC):
    """A way to limit what clients that lie can do."""

    options: DefenceConfig

    fewest: ClassVar[int] = 2
    """Clients that a round must have beside the suspects: with two in all nobody can tell who lies."""

    def suspects(self, clients: int) -> int:
        """f: how many of so many clients may lie; at least one, and fewer than half."""
        return max(0, min(math.ceil((self.options.share or 0.0) * clients - 1e-9), (clients - 1) // 2))

    def check(self, clients: int) -> None:
        """Raise ConfigError where a round of so many clients is too small."""
        f = max(1, self.suspects(clients))
        if clients < f + self.fewest:
            raise ConfigError(
                f"defence.name={self.options.name}: a round has {clients} clients, and with {f} that may lie "
                f"(defence.share={self.options.share:g}) it takes at least {f + self.fewest}; raise "
                "federation.clients_per_round, or choose another defence"
            )


class Selection(Defence):
    """A defence that gives clients other weights, from the inner products of their updates."""

    @abstractmethod
    def weights(self, products: Tensor, weights: Tensor) -> Tensor:
        """New weights (K,) float64 that sum to 1, from ⟨ΔP_k, ΔP_j⟩ (K, K) and the method's weights (K,), float64."""


class Shortening(Defence):
    """A defence that shortens updates: each client's factors and head move a fraction of their way."""

    @abstractmethod
    def fractions(self, shapes: Tensor) -> Tensor:
        """The fraction (K,) of their way that clients keep, from (K, 3) ‖X‖², ⟨X, Y⟩, ‖Y‖² of the whole update."""


class ByEntry(Defence):
    """A defence that looks at every number by itself: of the factors as they are, so that the basis matters."""

    @abstractmethod
    def rows(self, rows: Tensor) -> Tensor:
        """New packed adapters (K, P), with equal weights, from those of the clients."""


def make_defence(options: DefenceConfig) -> Defence:
    """The defence that defence.name names."""
    made: Defence = DEFENCES[str(options.name)](options)
    return made

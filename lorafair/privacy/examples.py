"""ε of every client with example-level privacy: its samples, its steps, and the rounds in which it takes part.

A neighbour has one image more or less at one client. Who takes part in a round follows from the seed alone.

Letters: N clients of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lorafair.config.schema import ClientConfig, Config
from lorafair.data.loading import number_of_batches, sampling_probability
from lorafair.privacy.accounting import Releases, epsilon_of, noise_multiplier_for


@dataclass(frozen=True)
class ExampleBudget:
    """What the clients of a run release of their images: noisy sums of the gradients of a random sample, step by step.

    All else that a client sends follows from these sums and from what it was sent.
    """

    sizes: Sequence[int]  # (N,) training images
    local: ClientConfig
    delta: float

    def releases(self, noise_multiplier: float, client: int, rounds: int) -> tuple[Releases, ...]:
        """Of a client that has taken part in so many rounds."""
        size = self.sizes[client]
        steps = rounds * number_of_batches(size, self.local)
        return (Releases(noise_multiplier, sampling_probability(size, self.local), steps),)

    def epsilons(self, noise_multiplier: float, rounds: Sequence[int]) -> list[float]:
        """Of each client (N,), after it has taken part in so many rounds (N,)."""
        return [epsilon_of(self.releases(noise_multiplier, c, taken), self.delta) for c, taken in enumerate(rounds)]

    def kinds(self, rounds: Sequence[int]) -> int:
        """How many clients differ in their ε."""
        return len({self.releases(1.0, client, taken) for client, taken in enumerate(rounds)})

    def largest_epsilon(self, noise_multiplier: float, rounds: Sequence[int]) -> float:
        """Of all clients."""
        worst = self._worst(rounds)
        return max(epsilon_of(self.releases(noise_multiplier, c, rounds[c]), self.delta) for c in worst)

    def noise_multiplier(self, epsilon: float, rounds: Sequence[int]) -> float:
        """The smallest with which no client has a larger ε after so many rounds (N,). Raises ConfigError."""
        noise = 0.0
        for c in self._worst(rounds):
            if epsilon_of(self.releases(noise, c, rounds[c]), self.delta) > epsilon:
                releases_of = partial(self.releases, client=c, rounds=rounds[c])
                noise = noise_multiplier_for(epsilon, self.delta, releases_of)
        return noise

    def _worst(self, rounds: Sequence[int]) -> list[int]:
        """The clients one of which has the largest ε: no other samples as often and takes as many steps."""
        chosen: list[int] = []
        most = -1
        for client in sorted(range(len(self.sizes)), key=partial(self._rank, rounds=rounds)):
            steps = self.releases(1.0, client, rounds[client])[0].count
            if steps > most:
                chosen.append(client)
                most = steps
        return chosen

    def _rank(self, client: int, rounds: Sequence[int]) -> tuple[float, int, int]:
        [releases] = self.releases(1.0, client, rounds[client])
        return -releases.sampling_probability, -releases.count, client


def budget_of_examples(config: Config, local: ClientConfig, sizes: Sequence[int]) -> ExampleBudget | None:
    """What clients with so many images (N,) release of them, where the configuration protects images."""
    if config.privacy.unit != "example":
        return None
    assert config.privacy.delta is not None
    return ExampleBudget(sizes, local, config.privacy.delta)

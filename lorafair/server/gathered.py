"""What the server does with the clients' updates before the method: rules that see all clients of a round.

A rule is a file of its own; `rules_of` names those that a configuration switches on, in the order in which they apply.

Letters: K clients of the round, P packed length of the layers that a rank aggregates.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lorafair.aggregation.defences.base import make_defence
from lorafair.communication.collectives import ClientResults
from lorafair.experiment import Experiment
from lorafair.model.adapter import AdapterLayout
from lorafair.server.defence import DefenceRule


class GatheredRule(Protocol):
    """Changes the gathered updates or their weights. It is called on every rank, and may use collectives."""

    def __call__(self, round_index: int, shard: AdapterLayout, start: Tensor, results: ClientResults) -> ClientResults:
        """The results that the method gets.

        `shard` are the layers that this rank aggregates, `start` (P,) what the clients were sent of them, and
        `results.rows` (K, P) their packed adapters after training. A rule that needs all layers, as for the distance of
        two clients, adds up over ranks; what it decides must be the same on all of them.
        """
        ...


def rules_of(experiment: Experiment) -> tuple[GatheredRule, ...]:
    """The rules of a run."""
    rules: list[GatheredRule] = []
    if experiment.config.defence.name is not None:
        rules.append(DefenceRule(experiment, make_defence(experiment.config.defence)))
    return tuple(rules)

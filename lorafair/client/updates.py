"""What happens to a client's update between its training and the server: rules, each a function of one client's rows.

A rule is a file of its own; `rules_of` names those that a configuration switches on, in the order in which they apply.

Letters: C clients of a cohort, P packed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lorafair.client.uploads import CodedUploads
from lorafair.experiment import Experiment
from lorafair.server.state import ServerState


class UpdateRule(Protocol):
    """Changes what clients send. It works client by client: the result is the same in any cohort and on any rank."""

    def __call__(self, round_index: int, clients: Sequence[int], start: Tensor, rows: Tensor) -> Tensor:
        """What the server gets (C, P), of packed adapters `start` (C, P) before and `rows` (C, P) after training."""
        ...


def rules_of(experiment: Experiment, state: ServerState) -> tuple[UpdateRule, ...]:
    """The rules of a round: first what a client does, then what is done to its message."""
    rules: list[UpdateRule] = []
    if experiment.attack is not None and experiment.attack.factor is not None:
        rules.append(experiment.attack.update)
    if experiment.codings.up is not None:
        rules.append(CodedUploads(experiment, state))
    return tuple(rules)


def kept_by_clients(rules: Sequence[UpdateRule], clients: Sequence[int]) -> list[Tensor]:
    """What these clients keep to themselves until they take part again, (C, q): what a coding has lost."""
    lost = [rule.take_lost(clients) for rule in rules if isinstance(rule, CodedUploads)]
    return [tensor for tensor in lost if tensor is not None]

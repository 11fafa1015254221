"""The clients of a round by federation.profile; the rule itself is in virtual_time/choice.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lorafair.aggregation.base import ServerUpdate
from lorafair.communication.traffic import Traffic
from lorafair.console import log
from lorafair.experiment import Experiment
from lorafair.server.state import ServerState
from lorafair.virtual_time.choice import Choice, Work

FOLDED = "folded_bytes"  # in the totals: what each client of the last round received of folded parts

# What some clients receive and send in a round (from 0), where this is the server's update.
TrafficOf = Callable[[tuple[int, ...], ServerUpdate, int], Traffic]
_NO_FOLDED_PARTS = ServerUpdate(factors={}, folded={}, head={}, sent_lora_rank={})


def choose_clients(experiment: Experiment, state: ServerState, traffic_of: TrafficOf) -> Choice | None:
    """The clients of the round that comes next, None without a profile. Call on every rank.

    The size of folded parts is not known before the server step. A client is taken to receive as many of their bytes as
    each client did in the round before, which rank 0 knows.
    """
    rule, round_index = experiment.choice_rule, state.completed_rounds
    if rule is None:
        return None
    folded = int(experiment.fabric.broadcast(state.totals.get(FOLDED, 0)))

    def work(client: int) -> Work:
        traffic = traffic_of((client,), _NO_FOLDED_PARTS, round_index)
        return Work(experiment.costs[client], traffic.down + folded, traffic.up)

    order, wanted = experiment.scheduler.order(round_index)
    choice = rule.choose(order, wanted, round_index, work)
    if not choice.in_time:
        log.warning(
            f"round {round_index + 1}: no client is done within federation.deadline_seconds={rule.deadline:g}; the "
            "round waits for the fastest one"
        )
    return choice


def folded_bytes(client: int, update: ServerUpdate, round_index: int, traffic_of: TrafficOf) -> int:
    """What a client receives of folded parts."""
    whole = traffic_of((client,), update, round_index)
    without = traffic_of((client,), dataclasses.replace(update, folded={}), round_index)
    return whole.down - without.down

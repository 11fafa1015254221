"""What a round has cost: images trained, bytes sent and received, client by client, and the totals since round 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from lorafair.aggregation.base import ServerUpdate
from lorafair.checkpointing.partial_round import Cohort
from lorafair.communication.collectives import ClientResults
from lorafair.communication.traffic import (
    Traffic,
    client_traffic,
    with_class_counts,
    with_control_variates,
    with_losses,
    with_private_numbers,
)
from lorafair.experiment import Experiment
from lorafair.schedule import RoundPlan
from lorafair.server.choice import FOLDED, folded_bytes
from lorafair.server.private_release import numbers_beside_mean
from lorafair.server.state import ServerState, lora_ranks_of
from lorafair.virtual_time.record import RoundWork


def seconds_of(cohorts: Sequence[Cohort], plan: RoundPlan, clients: ClientResults) -> dict[int, float]:
    """client -> seconds that its training has taken, of some cohorts of a round."""
    seconds = dict(zip(plan.clients, clients.seconds, strict=True))
    return {client: seconds[client] for cohort in cohorts for client in cohort}


def add_to_totals(
    state: ServerState, seconds: float, traffic: Traffic, clients: ClientResults, shared: Mapping[int, float]
) -> None:
    """Add the cost of a round to the totals since round 1; that of clients taken over, if there are any, is apart."""
    costs = {"seconds": seconds, "bytes": traffic.total, "dropped": len(clients.dropped), **clients.counts}
    if shared:
        costs |= {"shared_clients": len(shared), "shared_seconds": sum(shared.values())}
    for name, amount in costs.items():
        state.totals[name] = state.totals.get(name, 0) + amount


def work_of(
    experiment: Experiment, state: ServerState, plan: RoundPlan, update: ServerUpdate, server_seconds: float
) -> RoundWork:
    """What the clients and the server of the round just completed have done, client by client; on rank 0.

    Late clients have received what the others have; what they send is not taken.
    """
    choice, round_index = plan.choice, state.completed_rounds - 1
    late = () if choice is None else choice.late
    traffics = traffic_with_missed(experiment, state, (*plan.clients, *late), update, round_index)
    count = len(plan.clients)
    if choice is not None:
        of_experiment = partial(traffic_of, experiment, state)
        state.totals[FOLDED] = folded_bytes(plan.clients[0], update, round_index, of_experiment)
    return RoundWork(
        round=state.completed_rounds,
        clients=plan.clients,
        images=tuple(experiment.costs[client] for client in plan.clients),
        down=tuple(traffic.down for traffic in traffics[:count]),
        up=tuple(traffic.up for traffic in traffics[:count]),
        late=late,
        late_images=tuple(experiment.costs[client] for client in late),
        late_down=tuple(traffic.down for traffic in traffics[count:]),
        late_up=tuple(traffic.up for traffic in traffics[count:]),
        waited=None if choice is None else choice.waited,
        classes=len(experiment.data.classes),
        server_seconds=float(f"{server_seconds:.4g}"),
    )


def traffic_of(
    experiment: Experiment, state: ServerState, clients: tuple[int, ...], update: ServerUpdate, round_index: int
) -> Traffic:
    """What these clients would have sent and received in a round."""
    lora_ranks = lora_ranks_of(experiment, state, clients)
    layout, aggregator = experiment.layout, experiment.aggregator
    traffic = client_traffic(layout, aggregator, update, round_index, lora_ranks, experiment.codings)
    return sum(_with_numbers_beside(experiment, traffic), Traffic())


def traffic_with_missed(
    experiment: Experiment, state: ServerState, clients: tuple[int, ...], update: ServerUpdate, round_index: int
) -> list[Traffic]:
    """What each of these clients of a round has sent and received, with what it had to catch up on; once a round."""
    if experiment.catch_up is None or state.missed is None:
        return [traffic_of(experiment, state, (client,), update, round_index) for client in clients]
    everyone = lora_ranks_of(experiment, state, range(len(experiment.clients)))
    traffic = experiment.catch_up.traffic_of_round(state.missed, update, round_index, clients, everyone)
    return _with_numbers_beside(experiment, traffic)


def _with_numbers_beside(experiment: Experiment, traffic: list[Traffic]) -> list[Traffic]:
    """Of each client, with what travels beside its adapter."""
    if experiment.config.client.scaffold:
        traffic = [with_control_variates(of_client) for of_client in traffic]
    if numbers := numbers_beside_mean(experiment):
        traffic = [with_private_numbers(of_client, 1, numbers) for of_client in traffic]
    if experiment.head_class_counts is not None:
        traffic = [with_class_counts(of_client, 1, len(experiment.data.classes)) for of_client in traffic]
    if experiment.measured > 2:
        traffic = [with_losses(of_client, 1) for of_client in traffic]
    return traffic

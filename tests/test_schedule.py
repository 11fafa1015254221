"""Round plans: the clients, their weights and their ranks."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafair.schedule import RoundPlan, Scheduler, expected_seconds, update_client_seconds


def scheduler(sizes: list[int], **changes: Any) -> Scheduler:
    options: dict[str, Any] = {
        "seed": 0, "sizes": sizes, "costs": sizes, "clients_per_round": None, "weighting": "size", "cohort": 1,
        "world_size": 2,
    }  # fmt: skip
    return Scheduler(**(options | changes))


def plan(sizes: list[int], **changes: Any) -> RoundPlan:
    """The first round, before any time is measured."""
    return scheduler(sizes, **changes).plan(0, measured={})


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=30),
    world_size=st.integers(1, 9),
    cohort=st.integers(1, 5),
    fraction=st.floats(0.1, 1.0),
)
def test_every_client_of_a_round_is_trained_once_whatever_the_ranks(
    sizes: list[int], world_size: int, cohort: int, fraction: float
) -> None:
    count = max(1, int(fraction * len(sizes)))
    made = plan(sizes, world_size=world_size, cohort=cohort, clients_per_round=count)
    assert sorted(chain.from_iterable(made.clients_of_rank)) == list(made.clients)
    assert len(made.clients) == count
    assert len(made.clients_of_rank) == world_size
    assert sum(made.weights) == pytest.approx(1)
    alone = plan(sizes, world_size=1, cohort=cohort, clients_per_round=count)
    assert (alone.clients, alone.weights) == (made.clients, made.weights)
    # Who trains side by side is not a matter of the number of ranks either.
    assert sorted(chain.from_iterable(made.cohorts_of_rank)) == sorted(alone.cohorts_of_rank[0])


def test_weights_by_size_or_uniform() -> None:
    assert plan([10, 30]).weights == (0.25, 0.75)
    assert plan([10, 30], weighting="uniform").weights == (0.5, 0.5)


def test_clients_go_to_ranks_longest_first() -> None:
    assert plan([7, 6, 5, 4, 3]).clients_of_rank == ((0, 3, 4), (1, 2))


def test_clients_side_by_side_have_similar_work() -> None:
    assert plan([1, 9, 2, 8], cohort=2).cohorts_of_rank == (((1, 3),), ((2, 0),))


def test_clients_are_drawn_anew_each_round_and_reproducibly() -> None:
    rounds, same = (scheduler([5] * 20, clients_per_round=6) for _ in range(2))
    drawn = [rounds.plan(r, measured={}).clients for r in range(30)]
    assert drawn == [same.plan(r, measured={}).clients for r in range(30)]
    assert len(set(drawn)) > 25
    counts = [sum(client in clients for clients in drawn) for client in range(20)]
    assert all(2 <= count <= 18 for count in counts)  # 9 expected
    assert drawn[0] != plan([5] * 20, clients_per_round=6, seed=1).clients


@given(seconds=st.lists(st.floats(0.01, 100), min_size=12, max_size=12), cohort=st.integers(1, 4))
def test_measured_times_decide_who_trains_where_and_nothing_else(seconds: list[float], cohort: int) -> None:
    sizes = [5, 9, 2, 8, 4, 7, 11, 3, 6, 1, 10, 12]
    rounds = scheduler(sizes, world_size=3, cohort=cohort)
    by_cost, by_time = (rounds.plan(0, measured) for measured in ({}, dict(enumerate(seconds))))
    assert (by_time.clients, by_time.weights) == (by_cost.clients, by_cost.weights)
    assert sorted(chain.from_iterable(by_time.cohorts_of_rank)) == sorted(chain.from_iterable(by_cost.cohorts_of_rank))


def test_the_slowest_client_gets_a_rank_of_its_own() -> None:
    measured = {0: 1.0, 1: 1.0, 2: 1.0, 3: 3.0}
    assert scheduler([5, 5, 5, 5]).plan(0, measured).clients_of_rank == ((3,), (0, 1, 2))


def test_what_an_earlier_attempt_has_finished_is_on_rank_0_and_no_work() -> None:
    rounds = scheduler([7, 6, 5, 4, 3])
    assert rounds.plan(0, {}, finished=[(0,), (3,)]).clients_of_rank == ((0, 3, 1), (2, 4))
    everything = rounds.plan(0, {}, finished=[(client,) for client in range(5)])
    assert everything.clients_of_rank == ((0, 1, 2, 3, 4), ())
    assert (everything.clients, everything.weights) == (rounds.plan(0, {}).clients, rounds.plan(0, {}).weights)


def test_times_are_learned_halfway_and_expected_by_cost_where_nothing_is_known() -> None:
    measured: dict[int, float] = {}
    costs = {0: 4.0, 1: 2.0, 2: 1.0}
    assert expected_seconds(costs, measured) == costs
    update_client_seconds(measured, (0, 2), (2.0, 1.0))
    assert expected_seconds(costs, measured) == {0: 2, 1: pytest.approx(1.2), 2: 1}  # 3 s for a cost of 5
    update_client_seconds(measured, (0,), (4.0,))
    assert measured == {0: 3.0, 2: 1.0}


def test_poisson_sampling_takes_each_client_by_itself_at_the_rate() -> None:
    rounds, total, wanted = 3000, 20, 4
    made = scheduler([1] * total, clients_per_round=wanted, poisson=True, weighting="uniform")
    taken = np.zeros((rounds, total))
    for index in range(rounds):
        taken[index, list(made.plan(index, {}).clients)] = 1
    rate = wanted / total
    assert abs(taken.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / taken.size)
    assert np.abs(taken.mean(0) - rate).max() < 5 * math.sqrt(rate * (1 - rate) / rounds)
    counts = taken.sum(1)  # binomial; a fixed number would have no variance
    assert counts.var() == pytest.approx(total * rate * (1 - rate), rel=0.15)
    assert (counts == 0).mean() == pytest.approx((1 - rate) ** total, abs=0.01)
    correlation = np.corrcoef(taken.T) - np.eye(total)
    assert np.abs(correlation).max() < 6 / math.sqrt(rounds)


def test_poisson_sampling_repeats_and_may_take_nobody_or_everybody() -> None:
    few = scheduler([1] * 4, clients_per_round=1, poisson=True, weighting="uniform")
    assert few.plan(3, {}) == few.plan(3, {})
    empty = next(plan for index in range(50) if not (plan := few.plan(index, {})).clients)
    assert empty.weights == ()
    assert empty.clients_of_rank == ((), ())
    for wanted in (None, 4):
        everyone = scheduler([1] * 4, clients_per_round=wanted, poisson=True)
        assert all(everyone.plan(index, {}).clients == (0, 1, 2, 3) for index in range(20))


def test_clients_that_are_given_are_planned() -> None:
    made = scheduler([1] * 9, clients_per_round=2, poisson=True, weighting="uniform").plan(0, {}, clients=[7, 1, 4])
    assert made.clients == (1, 4, 7)
    assert made.weights == pytest.approx((1 / 3,) * 3)

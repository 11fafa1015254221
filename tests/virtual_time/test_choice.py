"""Which clients of a round are in time: against a search over all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafair.config.profiles import read_profile
from lorafair.virtual_time.choice import Rule, Work
from lorafair.virtual_time.devices import Devices


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Devices:
    file = tmp_path_factory.mktemp("profile") / "p.yaml"
    file.write_text(
        "clients: {images_per_second: {lognormal: {median: 10, sigma: 1}}, down_mbps: 8, up_mbps: 8, latency_ms: 100,\n"
        "  availability: 0.6}\n"
    )
    return Devices(read_profile(file), 0)


def seconds(devices: Devices, client: int, round_index: int) -> float:
    speed = devices.of(client, round_index).images_per_second
    assert speed is not None
    return 0.1 + 1.0 + 20 / speed + 0.1 + 0.5


def work(client: int) -> Work:
    return Work(images=20, down=1_000_000, up=500_000)


@settings(max_examples=80, deadline=None)
@given(
    clients=st.integers(1, 12),
    wanted=st.integers(1, 12),
    over=st.sampled_from([None, 1.3, 2.0]),
    deadline=st.sampled_from([None, 0.5, 3.0, 4.0, 8.0]),
    round_index=st.integers(0, 30),
)
def test_the_first_of_those_asked_that_are_available_and_in_time(
    devices: Devices, clients: int, wanted: int, over: float | None, deadline: float | None, round_index: int
) -> None:
    wanted = min(wanted, clients)
    order = sorted(range(clients), key=lambda c: (c * 7 + round_index) % 13)
    choice = Rule(devices, over, deadline).choose(order, wanted, round_index, work)
    attempts = {c: devices.of(c, round_index).failed_attempts for c in order}
    here = [c for c in order if attempts[c] == min(attempts.values())]
    asked = here[: -int(-(wanted * (over or 1)) // 1)]
    times = {c: seconds(devices, c, round_index) for c in asked}
    assert set(choice.clients) | set(choice.late) == set(asked)
    assert not set(choice.clients) & set(choice.late)
    assert list(choice.clients) == sorted(choice.clients)
    in_time = [c for c in asked if deadline is None or times[c] <= deadline]
    assert choice.in_time == bool(in_time)
    if not in_time:
        assert choice.clients == (min(asked, key=lambda c: times[c]),), "the fastest is kept"
        assert choice.waited is None
        return
    assert len(choice.clients) == min(wanted, len(in_time))
    assert set(choice.clients) <= set(in_time)
    assert max(times[c] for c in choice.clients) <= min([times[c] for c in choice.late], default=1e9)
    assert choice.waited == (deadline if len(in_time) < min(wanted, len(asked)) else None)


def test_operations_are_divided_by_the_speed(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("clients: {gflops: 2, down_mbps: 1, up_mbps: 1}\n")
    rule = Rule(Devices(read_profile(tmp_path / "p.yaml"), 0), None, 5.0, flop_per_image=1e9)
    times = {0: 8, 1: 10, 2: 11}  # images; 4, 5 and 5.5 seconds
    choice = rule.choose([2, 1, 0], 3, 0, lambda client: Work(times[client], 0, 0))
    assert (choice.clients, choice.late, choice.waited) == ((0, 1), (2,), 5.0)

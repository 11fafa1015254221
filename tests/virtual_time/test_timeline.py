"""Rounds in virtual time against arithmetic by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafair.config.profiles import read_profile
from lorafair.virtual_time.devices import Devices
from lorafair.virtual_time.record import RoundWork
from lorafair.virtual_time.timeline import Spent, round_cost, timeline

# Three devices: one row of the trace for each client, in an order that the seed decides.
ROWS = [
    {"gflops": 100.0, "down": 8.0, "up": 4.0},
    {"gflops": 10.0, "down": 80.0, "up": 40.0},
    {"gflops": 1000.0, "down": 1.0, "up": 0.5},
]
FLOP = 2e9  # of an image


def devices_of(folder: Path, seed: int = 0, **more: Any) -> Devices:
    """Three kinds of devices in a trace, and a server of twice the speed."""
    lines = ["gflops,down,up", *(f"{row['gflops']},{row['down']},{row['up']}" for row in ROWS)]
    (folder / "devices.csv").write_text("\n".join(lines) + "\n")

    def column(name: str) -> dict[str, Any]:
        return {"trace": {"file": "devices.csv", "column": name}}

    clients = {"gflops": column("gflops"), "down_mbps": column("down"), "up_mbps": column("up"), "latency_ms": 50}
    clients |= {"compute_watts": 10, "network_watts": 2, "idle_watts": 1}
    content = {"clients": clients | more, "server": {"speed": 2, "watts": 100, "idle_watts": 20}}
    content["costs"] = {"per_kwh": 0.5, "per_gb": 3}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return Devices(read_profile(folder / "mine.yaml"), seed)


def work(**changes: Any) -> RoundWork:
    values: dict[str, Any] = {
        "round": 1, "clients": (0, 1, 2), "images": (50, 100, 200), "down": (1_000_000, 2_000_000, 3_000_000),
        "up": (500_000, 600_000, 700_000), "late": (), "late_images": (), "late_down": (), "late_up": (),
        "waited": None, "classes": 10, "server_seconds": 0.8,
    }  # fmt: skip
    return RoundWork(**(values | changes))


def by_hand(gflops: float, down: float, up: float, images: int, received: int, sent: int) -> tuple[float, float, float]:
    """Seconds of download, local training and upload."""
    return 0.05 + 8 * received / (down * 1e6), images * 2.0 / gflops, 0.05 + 8 * sent / (up * 1e6)


def test_the_rows_of_a_trace_are_dealt_out(tmp_path: Path) -> None:
    for seed in range(5):
        devices = devices_of(tmp_path, seed)
        dealt = [(d.gflops, d.down_mbps, d.up_mbps) for d in (devices.of(client, 0) for client in range(6))]
        assert sorted(dealt[:3]) == sorted(tuple(row.values()) for row in ROWS)
        assert dealt[3:] == dealt[:3]


def test_a_round_of_three_clients_is_that_of_the_slowest_and_the_server(tmp_path: Path) -> None:
    devices = devices_of(tmp_path)
    rows = [next(r for r in ROWS if r["gflops"] == devices.of(c, 0).gflops) for c in range(3)]
    images, down, up = (50, 100, 200), (1_000_000, 2_000_000, 3_000_000), (500_000, 600_000, 700_000)
    phases = [by_hand(*row.values(), i, d, u) for row, i, d, u in zip(rows, images, down, up, strict=True)]
    arrivals = [sum(each) for each in phases]
    longest = max(arrivals)
    cost = round_cost(work(), devices, FLOP)
    assert cost.seconds == pytest.approx(longest + 0.4, rel=1e-12)
    assert cost.slowest == arrivals.index(longest)
    busy = sum(2 * (d + u) + 10 * c for d, c, u in phases)
    idle = sum(longest - arrival + 0.4 for arrival in arrivals)
    assert cost.client_joules == pytest.approx(busy + idle, rel=1e-12)
    assert cost.server_joules == pytest.approx(20 * longest + 100 * 0.4, rel=1e-12)
    assert cost.bytes == 7_800_000


def test_rounds_add_up_to_time_energy_traffic_and_costs(tmp_path: Path) -> None:
    devices = devices_of(tmp_path)
    works = [work(), work(round=2, clients=(2,), images=(10,), down=(0,), up=(0,), server_seconds=0.0)]
    alone = [round_cost(each, devices, FLOP) for each in works]
    spent = timeline(works, devices, FLOP).spent()
    assert list(spent) == [1, 2]
    assert spent[2].seconds == alone[0].seconds + alone[1].seconds
    gflops = devices.of(2, 1).gflops
    assert gflops is not None
    assert alone[1].seconds == pytest.approx(10 * 2 / gflops), "no message, no latency"
    whole = Spent(seconds=7200.0, joules=7.2e6, client_joules=1.0, bytes=2_500_000_000)
    assert (whole.hours, whole.kwh, whole.megabytes) == (2.0, 2.0, 2500.0)
    assert whole.cost(devices.profile.costs) == pytest.approx(2 * 0.5 + 2.5 * 3)


def test_a_late_client_costs_its_download_and_energy_until_the_server_goes_on(tmp_path: Path) -> None:
    devices = devices_of(tmp_path, gflops=1, down_mbps=8, up_mbps=8, latency_ms=0)
    # Kept: 1 s download, 10 s training, 1 s upload. Late: 1 s download, then training until the deadline.
    late = {"late": (5,), "late_images": (500,), "late_down": (1_000_000,), "late_up": (1_000_000,)}
    one = {"clients": (0,), "images": (5,), "down": (1_000_000,), "up": (1_000_000,)}
    cost = round_cost(work(**one, **late, waited=30.0), devices, FLOP)
    assert cost.seconds == pytest.approx(30.4)
    kept_joules = 2 * 2 + 10 * 10 + (30 - 12 + 0.4)
    late_joules = 2 * 1 + 10 * 29 + 0.4
    assert cost.client_joules == pytest.approx(kept_joules + late_joules)
    assert cost.bytes == 3_000_000, "what the late client sends is not taken"
    first = round_cost(work(**one, **late), devices, FLOP)
    assert first.seconds == pytest.approx(12.4), "the server goes on with the first"


def test_a_client_that_is_away_is_waited_for(tmp_path: Path) -> None:
    away = devices_of(tmp_path, availability=0.3, retry_seconds=100)
    here = devices_of(tmp_path)
    attempts = [away.of(client, 0).failed_attempts for client in range(3)]
    assert max(attempts) > 0
    of_client = [round_cost(work(clients=(c,), images=(1,), down=(8,), up=(8,)), here, FLOP).seconds for c in range(3)]
    for client, seconds in enumerate(of_client):
        one = work(clients=(client,), images=(1,), down=(8,), up=(8,))
        assert round_cost(one, away, FLOP).seconds == pytest.approx(100 * attempts[client] + seconds)


def test_devices_follow_from_seed_client_and_round_alone(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "clients: {images_per_second: {lognormal: {median: 10, sigma: 0.5}}, down_mbps: {uniform: {low: 1, high: 2}},\n"
        "  up_mbps: {choice: {1: 0.5, 5: 0.5}, per: round}, availability: {uniform: {low: 0.4, high: 0.9}}}\n"
        "kinds: {old: {probability: 0.5, latency_ms: 9}, new: {probability: 0.5, images_per_second: 90}}\n"
    )
    profile = read_profile(tmp_path / "p.yaml")
    one, other = Devices(profile, 3), Devices(profile, 3)
    many = [one.of(client, round) for round in range(3) for client in range(200)]
    assert [other.of(client, round) for round in (2, 1, 0) for client in reversed(range(200))] == [
        many[200 * round + client] for round in (2, 1, 0) for client in reversed(range(200))
    ], "neither the order nor the number of clients matters"
    first, second = many[:200], many[200:400]
    assert [d.down_mbps for d in first] == [d.down_mbps for d in second]
    assert [d.up_mbps for d in first] != [d.up_mbps for d in second]
    assert {d.kind for d in first} == {"old", "new"}
    assert {d.images_per_second for d in first if d.kind == "new"} == {90.0}
    assert 75 < sum(d.kind == "old" for d in first) < 125
    assert [d.down_mbps for d in first] != [Devices(profile, 4).of(c, 0).down_mbps for c in range(200)]
    speeds = sorted(d.images_per_second or 0 for d in first if d.kind == "old")
    assert 8 < speeds[len(speeds) // 2] < 12.5
    here = sum(d.failed_attempts == 0 for d in many) / len(many)
    assert 0.6 < here < 0.7, "the mean availability is 0.65"


def test_a_trace_by_round_goes_on_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("mbps\n1\n2\n3\n4\n")
    trace = "{trace: {file: t.csv, column: mbps}, per: round}"
    (tmp_path / "p.yaml").write_text(f"clients: {{gflops: 1, down_mbps: {trace}, up_mbps: {trace}}}\n")
    devices = Devices(read_profile(tmp_path / "p.yaml"), 0)
    rows = [devices.of(7, round).down_mbps for round in range(9)]
    assert all(after == before % 4 + 1 for before, after in pairwise(rows))
    assert rows == [devices.of(7, round).up_mbps for round in range(9)], "one row for all columns"

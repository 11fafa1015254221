"""A federation whose late clients are dropped: what is trained, what is counted, and what a continued run must keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorafair.config.schema import Config
from lorafair.errors import LorafairError
from lorafair.federation import run_federation
from lorafair.reporting.run_dir import read_metrics
from lorafair.virtual_time.record import read_work
from tests.conftest import launched

Tiny = Callable[..., Config]
SMALL = ("data.train_images=24", "data.test_images=12", "method.name=fedit", "rounds=1")
BYTES = 13_328  # of an adapter and a head


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Three devices of 24, 12 and 2 images a second, one for each client."""
    (tmp_path / "devices.csv").write_text("speed\n24\n12\n2\n")
    speed = "{trace: {file: devices.csv, column: speed}}"
    file = tmp_path / "mine.yaml"
    file.write_text(f"clients: {{images_per_second: {speed}, down_mbps: 1, up_mbps: 1}}\n")
    return file


def test_a_late_client_is_not_trained_and_its_download_is_counted(tiny: Tiny, profile: Path) -> None:
    config = tiny(*SMALL, f"federation.profile={profile}", "federation.deadline_seconds=5")
    run_federation(launched(1), config)
    [work] = read_work(config.folder)
    metrics = read_metrics(config.folder)
    assert len(work.clients) == 2
    assert len(work.late) == 1
    assert work.waited == 5.0
    assert metrics["comm/up_bytes"][1] == 2 * BYTES
    assert metrics["comm/down_bytes"][1] == 3 * BYTES
    assert work.bytes == metrics["comm/total_bytes"][1]
    assert metrics["server/late_clients"][1] == 1
    trained = {name for name in metrics if name.startswith("train/loss/")}
    assert len(trained) == 2


def test_if_all_are_late_the_fastest_is_kept_and_that_is_said(
    tiny: Tiny, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(*SMALL, f"federation.profile={profile}", "federation.deadline_seconds=0.5")
    run_federation(launched(1), config)
    [work] = read_work(config.folder)
    assert len(work.clients) == 1
    assert len(work.late) == 2
    assert work.waited is None
    said = "warning: round 1: no client is done within federation.deadline_seconds=0.5; the round waits for the fastest"
    assert said in capsys.readouterr().out


def test_a_continued_run_keeps_its_devices(tiny: Tiny, profile: Path) -> None:
    options = (*SMALL, f"federation.profile={profile}", "federation.deadline_seconds=5")
    run_federation(launched(1), tiny(*options))
    profile.write_text(profile.read_text() + "server: {watts: 5}\n")
    run_federation(launched(1), tiny(*options, "rounds=2"))
    with pytest.raises(LorafairError, match=r"federation\.deadline_seconds is 5\.0 there and 6\.0 here"):
        run_federation(launched(1), tiny(*options, "rounds=3", "federation.deadline_seconds=6"))
    profile.write_text(profile.read_text().replace("up_mbps: 1", "up_mbps: 2"))
    with pytest.raises(LorafairError, match=r"federation\.profile gives the clients other speeds, networks or availab"):
        run_federation(launched(1), tiny(*options, "rounds=3"))


def test_asking_more_clients_than_there_are_is_refused(tiny: Tiny, profile: Path) -> None:
    more = ("federation.over_selection=2", "federation.clients_per_round=3")
    with pytest.raises(
        LorafairError, match=r"federation\.over_selection=2 has no effect: federation\.clients_per_round=3"
    ):
        run_federation(launched(1), tiny(*SMALL, f"federation.profile={profile}", *more))

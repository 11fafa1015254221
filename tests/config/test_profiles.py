"""Profiles: those that are shipped, and mistakes in one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafair.config.identity import differences, run_identity
from lorafair.config.loading import load_config
from lorafair.config.profiles import read_profile, shipped_profiles
from lorafair.errors import ConfigError

GOOD = "clients: {gflops: 10, down_mbps: 5, up_mbps: 2}\n"


def test_shipped_profiles_can_be_read_and_name_their_sources() -> None:
    assert {"fibre_silo", "hospital", "phones_4g", "phones_5g", "jetson"} <= set(shipped_profiles())
    for name, file in shipped_profiles().items():
        profile = read_profile(name)
        assert profile.about
        assert all(kind["compute_watts"].numbers[0] > 0 for kind in profile.kinds.values())
        comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert len(comment) > 5, "the sources"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clients: {gflops: 1, down_mbps: 5, up_mps: 2}", r"no key clients\.up_mps; did you mean clients\.up_mbps\?"),
        ("client: {gflops: 1}", "a profile is a group of keys, and clients is one of them"),
        (GOOD + "servers: {}", r"there is no key servers; did you mean server\?"),
        ("clients: {gflops: 1, down_mbps: 5}", r"clients\.up_mbps is missing"),
        ("clients: {down_mbps: 5, up_mbps: 1}", "clients needs exactly one of gflops and images_per_second"),
        (
            "clients: {gflops: 1, images_per_second: 2, down_mbps: 5, up_mbps: 1}",
            "clients needs exactly one of gflops and images_per_second",
        ),
        ("clients: {gflops: 0, down_mbps: 5, up_mbps: 1}", r"clients\.gflops=0 is out of range: it must be above 0"),
        ("clients: {gflops: 1, down_mbps: 5, up_mbps: 1, availability: 1.5}", r"availability=1\.5 .* at most 1"),
        ("clients: {gflops: fast, down_mbps: 5, up_mbps: 1}", r"clients\.gflops=fast: give a number or one of log"),
        ("clients: {gflops: {lognorm: 3}, down_mbps: 5, up_mbps: 1}", r"did you mean lognormal\?"),
        ("clients: {gflops: {lognormal: {mean: 3}}, down_mbps: 5, up_mbps: 1}", "must have two numbers, median"),
        ("clients: {gflops: {uniform: {low: 3, high: 2}}, down_mbps: 5, up_mbps: 1}", "low=3 is above high=2"),
        ("clients: {gflops: {choice: {1: 0.5, 2: 0.6}}, down_mbps: 5, up_mbps: 1}", "must sum to 1"),
        ("clients: {gflops: {uniform: {low: 1, high: 2}, per: day}, down_mbps: 5, up_mbps: 1}", "per=day is not"),
        (
            "clients: {gflops: 1, down_mbps: 5, up_mbps: 1, availability: {lognormal: {median: 0.5, sigma: 1}}}",
            "a lognormal has no upper end",
        ),
        (
            "clients: {gflops: {trace: {file: no.csv, column: a}}, down_mbps: 5, up_mbps: 1}",
            r"clients\.gflops\.trace: .*no\.csv cannot be read",
        ),
        (
            "clients: {gflops: {trace: {file: t.csv, column: a}}, down_mbps: 5, up_mbps: 1}",
            r"t\.csv has no column a; it has speed, other",
        ),
        (GOOD + "kinds: {old: {probability: 0.5}}", r"all of them sum to 1; they are \[0\.5\]"),
        (GOOD + "server: {speed: 2, seconds: 1}", r"server\.speed and server\.seconds exclude each other"),
        (GOOD + "server: {speed: 0}", r"server\.speed=0 must be a number above 0"),
        (GOOD + "costs: {per_kwh: cheap}", r"costs\.per_kwh=cheap must be a number at least 0"),
        ("clients: {gflops: 1, gflops: 2}", "cannot be read: .*duplicate"),
        ("- 1", "a profile is a group of keys"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_the_file(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    (tmp_path / "t.csv").write_text("speed,other\n1,2\n")
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_profile(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_kind_replaces_the_speed_of_all_clients(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        GOOD + "kinds: {a: {probability: 0.25, images_per_second: 3}, b: {probability: 0.75, up_mbps: 9}}\n"
    )
    profile = read_profile(tmp_path / "mine.yaml")
    assert "gflops" not in profile.kinds["a"]
    assert profile.kinds["b"]["gflops"].numbers == (10.0,)
    assert (profile.kinds["a"]["up_mbps"].numbers, profile.kinds["b"]["up_mbps"].numbers) == ((2.0,), (9.0,))
    assert profile.needs_flop


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["federation.profile=hospitl", "federation.deadline_seconds=3"], r"there is no profile hospitl; did you "),
        (["federation.profile=fibre_silo"], r"federation\.profile=fibre_silo has no effect: set federation\.over_sel"),
        (["federation.deadline_seconds=3"], r"federation\.deadline_seconds=3\.0 has no effect: it needs federation\."),
        (["federation.over_selection=1.3"], r"federation\.over_selection=1\.3 has no effect: it needs federation\."),
        (
            ["federation.profile=jetson", "federation.over_selection=1.3"],
            r"has no effect: all clients take part in every round; set federation\.clients_per_round",
        ),
        (
            ["federation.profile=jetson", "federation.over_selection=1", "federation.clients_per_round=2"],
            r"federation\.over_selection=1\.0 is out of range: it must be above 1",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_the_options_are_one_line(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(pairs)


def test_what_decides_who_is_late_is_part_of_the_identity(tmp_path: Path) -> None:
    def identity(content: str, *pairs: str) -> dict[str, object]:
        (tmp_path / content[:3]).mkdir(exist_ok=True)
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        file.write_text(content)
        return run_identity(load_config(f"federation.profile={file}", "federation.deadline_seconds=3", *pairs))

    mine = identity(GOOD)
    assert differences(mine, identity(GOOD)) == "", "the name of the file does not matter"
    assert differences(mine, identity(GOOD + "server: {watts: 3}\ncosts: {per_gb: 1}\nabout: x\n")) == ""
    slower = identity(GOOD.replace("10", "9"))
    assert differences(mine, slower) == "federation.profile gives the clients other speeds, networks or availability"
    assert differences(mine, identity(GOOD, "federation.deadline_seconds=4")) == (
        "federation.deadline_seconds is 3.0 there and 4.0 here"
    )
    without = run_identity(load_config())
    assert "profile" not in without
    assert "federation.profile is set there alone" in differences(mine, without)

"""`lorafair timeline`: tables, files and mistakes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafair.cli import main
from lorafair.comparison import page
from lorafair.comparison.document import FigurePart, document
from lorafair.comparison.figures import KINDS, PRICED_KINDS
from lorafair.comparison.findings import Findings
from lorafair.comparison.plan import Comparison
from lorafair.comparison.record import write_record
from lorafair.comparison.section import load_comparison
from lorafair.comparison.tables import Table
from lorafair.errors import ConfigError
from lorafair.reporting.run_dir import read_metrics
from lorafair.virtual_time.record import WORK_FILE, WorkFile
from tests.comparison.made_up import made_up
from tests.virtual_time.test_timeline import work

# A round of FedIT takes 1.4 s: 0.1 s download at 8 Mbit/s, 1 s training of 100 images, 0.1 s upload, 0.2 s server.
PROFILE = """
clients: {images_per_second: 100, down_mbps: 8, up_mbps: 8, compute_watts: 36, idle_watts: 0}
server: {seconds: 0.2, watts: 0}
costs: {per_kwh: 1000, currency: USD}
"""


def record(comparison: Comparison, rounds: int = 4) -> None:
    """Give the made-up runs the work of their rounds; those of lora_fair take twice as long to train."""
    for run in comparison.final_runs:
        file = WorkFile(run.folder, 0)
        for round in range(1, rounds + 1):
            images = 200 if run.method == "lora_fair" else 100
            line = {"round": round, "clients": (0, 1), "images": (images, images // 2)}
            file.write(work(**line, down=(100_000,) * 2, up=(100_000,) * 2))
        file.close()


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    (tmp_path / "mine.yaml").write_text(PROFILE)
    made = made_up(tmp_path / "made", ["fedit", "lora_fair"], seeds=2)
    record(made)
    return made


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_command_prints_and_writes_what_runs_take(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, out = tmp_path / "mine.yaml", tmp_path / "out"
    assert main(["timeline", str(comparison.folder), f"--profile={profile}", "--target=40", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "Profile mine: virtual time, traffic and energy to reach an accuracy, and of all rounds" in printed
    header = next(line for line in printed.splitlines() if line.startswith("method"))
    names = ["method", "reach 40 %", "rounds", "seconds", "MB", "J", "USD"]
    assert re.split(" {2,}", header) == [*names, *(f"{name} in all" for name in names[3:])]
    line = next(line for line in printed.splitlines() if line.startswith("LoRA-FAIR"))
    assert re.split(" {2,}", line)[7:] == ["9.6", "1.6", "432", "0.12"], "four rounds of 0.1 + 2 + 0.1 + 0.2 seconds"

    rounds = [row for row in rows_of(out / "timeline.csv") if row["method"] == "fedit" and row["seed"] == "1"]
    assert [float(row["seconds"]) for row in rounds] == pytest.approx([1.4, 2.8, 4.2, 5.6])
    assert [float(row["joules"]) for row in rounds] == pytest.approx([54.0, 108.0, 162.0, 216.0]), "36 W for 1.5 s"
    assert [float(row["cost"]) for row in rounds] == pytest.approx([0.015, 0.03, 0.045, 0.06], rel=1e-5)
    assert {row["megabytes"] for row in rounds[:1]} == {"0.400000"}
    assert {row["slowest_client"] for row in rounds} == {"0"}
    run = next(r for r in comparison.final_runs if (r.method, r.seed) == ("fedit", 1))
    accuracy = read_metrics(run.folder)["eval/accuracy"]
    assert [float(row["accuracy"]) / 100 for row in rounds] == pytest.approx(list(accuracy.values()), abs=1e-6)

    first = next(r for r, value in sorted(accuracy.items()) if value >= 0.4)
    [reached] = [r for r in rows_of(out / "targets.csv") if (r["method"], r["seed"]) == ("fedit", "1")]
    assert (reached["target"], reached["round"]) == ("40", str(first))
    assert float(reached["seconds"]) == pytest.approx(1.4 * first)

    [events] = (out / "mine" / "default-fedit-1").glob("events.*")
    curves = EventAccumulator(str(events)).Reload()
    by_time = curves.Scalars("1 accuracy by virtual time/milliseconds")
    assert [event.step for event in by_time] == [1400, 2800, 4200, 5600]
    assert [event.value for event in by_time] == pytest.approx(list(accuracy.values()))
    assert [event.step for event in curves.Scalars("2 accuracy by traffic/kilobytes")] == [400, 800, 1200, 1600]
    assert curves.Scalars("3 by round/hours")[3].value == pytest.approx(5.6 / 3600)
    assert (out / "default-time.png").stat().st_size > 5000


def test_the_target_is_by_default_the_highest_that_all_runs_reach(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [read_metrics(run.folder)["eval/accuracy"] for run in comparison.final_runs]
    lowest = int(1000 * min(max(curve.values()) for curve in runs)) / 10
    assert main(["timeline", str(comparison.folder), "--profile", str(tmp_path / "mine.yaml")]) == 0
    printed = capsys.readouterr().out
    assert f"reach {lowest:g} %" in printed
    assert printed.count("2 of 2") == 2


def test_a_profile_in_operations_counts_those_of_the_model(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "ops.yaml").write_text(
        "clients: {gflops: 0.003650816, down_mbps: 8, up_mbps: 8}\nserver: {seconds: 0.2}\n"
    )
    folder = comparison.final_runs[0].folder
    assert main(["timeline", str(folder), "--profile", str(tmp_path / "ops.yaml")]) == 0
    [seconds, *_] = [float(row["seconds"]) for row in rows_of(folder / "timeline" / "timeline.csv")]
    assert seconds == pytest.approx(100.4, rel=1e-5), "an image a second: 3,650,816 operations each"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "lorafair timeline needs a RUN: a run directory, a folder with runs, or a comparison's folder"),
        (["{folder}"], "lorafair timeline needs --profile: a YAML file or one of fibre_silo, hospital"),
        (["{folder}", "--profile=5g"], "there is no profile 5g; "),
        (
            ["{folder}", "--profile", "{mine}", "--target=99.5"],
            "--target=99.5: no run reaches 99.5 %; the highest accu",
        ),
        (["{folder}", "--profile", "{mine}", "--target=0.5"], "--target=0.5 must be an accuracy in percent, above 1"),
        (
            ["{folder}", "--profile", "{mine}", "--target=high"],
            "lorafair timeline: argument --target: high: give an acc",
        ),
        (["{folder}", "--profile", "{mine}", "--format=jpeg"], "there is no format jpeg; "),
        (["nowhere", "--profile", "{mine}"], "there is no nowhere; give the directory of a run"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.format(folder=comparison.folder, mine=tmp_path / "mine.yaml") for a in arguments]
    assert main(["timeline", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_run_of_an_older_version_is_named_and_left_out(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = comparison.final_runs[0].folder
    (older / WORK_FILE).unlink()
    given = ["--profile", str(tmp_path / "mine.yaml")]
    assert main(["timeline", str(older), *given]) == 2
    assert f"error: {older.resolve()} has recorded no work (work.jsonl): an older version" in capsys.readouterr().err
    assert main(["timeline", str(comparison.folder), *given]) == 0
    printed = capsys.readouterr().out
    assert f"1 run without recorded work, or not of all rounds, left out: {older.resolve()}" in printed
    assert "1 of 1" in printed


def test_the_list_names_the_shipped_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= {"fibre_silo", "hospital", "phones_4g", "phones_5g", "jetson"}


def with_section(comparison: Comparison, more: str) -> Comparison:
    """The same comparison with more keys in its section."""
    file = comparison.folder.parent / "made_up.yaml"
    line = next(line for line in file.read_text().splitlines() if line.startswith("compare: "))
    section = json.loads(line.removeprefix("compare: ")) | json.loads(more)
    text = file.read_text().replace(line, f"compare: {json.dumps(section)}")
    file.with_name("priced.yaml").write_text(text)
    loaded = load_comparison(str(file.with_name("priced.yaml")), f"run_dir={comparison.folder}")
    assert loaded is not None
    return loaded


def test_a_report_prices_its_runs(comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    priced = with_section(comparison, json.dumps({"profile": str(tmp_path / "mine.yaml"), "target": 40}))
    parts = list(document(Findings(priced)))
    [found] = [part for part in parts if isinstance(part, Table) and part.caption.startswith("Profile mine: ")]
    assert list(found.header[:4]) == ["method", "reach 40 %", "rounds", "seconds"]
    assert [row[0] for row in found.rows] == ["FedIT", "LoRA-FAIR"]
    assert "default-time" in [part.name for part in parts if isinstance(part, FigurePart)]
    assert set(page._IMPORTANCE) == {*KINDS, *PRICED_KINDS}
    write_record(priced)
    assert main(["plot", str(comparison.folder), "--figure", "time", "--format=svg"]) == 0, "the folder knows it"
    assert (comparison.folder / "default-time.svg").is_file()
    assert main(["plot", str(comparison.final_runs[0].folder), "--figure", "time"]) == 2
    assert "there is nothing to show in figure time: no profile is given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('{"profile": "hospitl"}', r"compare\.profile: there is no profile hospitl; did you mean hospital\?"),
        ('{"target": 40}', r"compare\.target=40 has no effect: it needs compare\.profile"),
        ('{"profile": "hospital", "target": [40, 140]}', r"compare\.target=140 must be an accuracy in percent"),
    ],
)
def test_mistakes_in_the_section_are_one_line(more: str, message: str, comparison: Comparison) -> None:
    with pytest.raises(ConfigError, match=message):
        with_section(comparison, more)

"""Draws of a comparison: their seeds and folders, when they stop, and what the report says about them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorafair import __version__
from lorafair.comparison import run as runner
from lorafair.comparison.document import Paragraph, document
from lorafair.comparison.evidence import components_table, p_values, significance_table
from lorafair.comparison.findings import Findings
from lorafair.comparison.folders import read_folders
from lorafair.comparison.listing import list_runs
from lorafair.comparison.markdown import to_text
from lorafair.comparison.outcomes import Difference
from lorafair.comparison.plan import Comparison, Run
from lorafair.comparison.record import write_record
from lorafair.comparison.report import write_results
from lorafair.comparison.section import load_comparison
from lorafair.comparison.statistics import components, confidence_sequence, estimate
from lorafair.comparison.table_files import write_tables
from lorafair.comparison.tables import difference_table, overall_table
from lorafair.config.identity import run_identity
from lorafair.config.layers import VERSION_LINE
from lorafair.config.loading import to_yaml
from lorafair.errors import ConfigError
from lorafair.seeding import seeded_numpy
from tests.comparison.made_up import COMMON, finish
from tests.conftest import launched

CROSSED = "draws: {partition: 6, training: 3, design: crossed}"


def declared(folder: Path, draws: str, *pairs: str, methods: str = "[fedit, lora_fair]") -> Comparison:
    folder.mkdir(exist_ok=True)
    file = folder / "draws.yaml"
    file.write_text(f"rounds: 2\n{COMMON}\ncompare: {{methods: {methods}, {draws}}}\n")
    comparison = load_comparison([str(file), f"run_dir={folder / 'out'}", *pairs])
    assert comparison is not None
    return comparison


def done(comparison: Comparison, accuracy: Callable[[str, int], float], draws: range) -> None:
    """Runs of these draws are done, with these accuracies in %."""
    for run in comparison.final_runs:
        if run.seed in draws:
            complete(comparison, run, accuracy)


def complete(comparison: Comparison, run: Run, accuracy: Callable[[str, int], float]) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = to_yaml(comparison.config(run))
    (run.folder / "config.yaml").write_text(f"{VERSION_LINE}{__version__}\n{settings}")
    finish(comparison, run, ["photo"], 2)
    result = json.loads((run.folder / "result.json").read_text())
    result["mean_accuracy"] = accuracy(run.method, run.seed) / 100
    (run.folder / "result.json").write_text(json.dumps(result))


def gains(accuracy: Callable[[str, int], float], draws: int) -> Any:
    return np.array([accuracy("lora_fair", d) - accuracy("fedit", d) for d in range(draws)])


def noisy(gain: float) -> Callable[[str, int], float]:
    """FedIT about 60 %, the other one as much above it; a draw has a part that both share."""

    def accuracy(method: str, draw: int) -> float:
        shared, own = seeded_numpy(draw, "shared").normal(), seeded_numpy(draw, method).normal()
        return float(60 + 3 * shared + own + (0 if method == "fedit" else gain))

    return accuracy


def test_a_draw_is_a_seed_and_has_its_folder(tmp_path: Path) -> None:
    """So three seeds may become 200 draws, without a run being repeated."""
    seeds, draws = declared(tmp_path, "seeds: [0, 1, 2]"), declared(tmp_path, "draws: 200")
    assert {run.folder for run in seeds.runs} <= {run.folder for run in draws.runs}
    of_folder = {run.folder: run for run in draws.runs}
    for run in seeds.runs:
        assert run_identity(seeds.config(run)) == run_identity(draws.config(of_folder[run.folder]))
    assert [(run.seed, run.method) for run in draws.runs[:3]] == [(0, "fedit"), (0, "lora_fair"), (1, "fedit")]
    assert len(draws.runs) == 400


@pytest.mark.parametrize("layout", ["crossed", "nested"])
def test_a_design_sets_the_seeds_apart(layout: str, tmp_path: Path) -> None:
    comparison = declared(tmp_path, CROSSED.replace("crossed", layout))
    configs = {run.folder.name: comparison.config(run) for run in comparison.runs}
    assert len(configs) == 36
    config = configs["fedit-draw7"]
    training = 1 if layout == "crossed" else 7
    assert (config.seed, config.seed_of("partition")) == (2, 2)
    assert {config.model.seed, config.federation.seed, config.client.seed} == {training}
    identities = {json.dumps(run_identity(config), default=str) for config in configs.values()}
    assert len(identities) == 36, "no two draws are alike"


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ("draws: 1", r"compare\.draws=1 must be a whole number, at least 2"),
        ("draws: true", r"compare\.draws=True must be a whole number"),
        ("draws: 3, seeds: [0]", r"compare\.draws and compare\.seeds are both given"),
        ("draws: {partition: 2}", r"compare\.draws\.training is missing"),
        ("draws: {partitions: 2}", r"there is no compare\.draws\.partitions; did you mean partition\?"),
        ("draws: {partition: 2, training: 2, design: both}", r"compare\.draws\.design=both must be crossed or nested"),
        ("draws: {partition: 2, training: 1, design: nested}", r"compare\.draws\.training=1 must be .* at least 2"),
        ("draws: 9, until: bored", r"compare\.until=bored must be decided"),
        ("draws: 9, batch: 3", r"compare\.batch=3 has no effect without compare\.until"),
        ("draws: 9, until: decided, batch: 0", r"compare\.batch=0 must be a whole number, at least 1"),
        ("draws: 9, until: decided, margin: 0", r"compare\.margin=0 must be a number of points above 0"),
        ("draws: 9, until: decided, margin: .inf", r"compare\.margin=inf must be a number of points above 0"),
        ("draws: 9, until: decided", r"until=decided has no effect: .*every 10 draws .*batch.*compare\.draws=9"),
        ("draws: 9, until: decided, batch: 9", r"until=decided has no effect: .*a smaller batch"),
        (f"{CROSSED}, until: decided", r"compare\.until=decided needs compare\.draws as a number"),
        ("seeds: [0], until: decided", r"compare\.until=decided needs compare\.draws"),
        (f"{CROSSED}, settings: {{a: {{client.seed: 3}}}}", r"compare\.settings\.a sets client\.seed: the design"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(draws: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        declared(tmp_path, draws)
    assert "\n" not in str(caught.value)


def test_a_pair_that_the_design_sets_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"partition\.seed=3: .*what the comparison varies \(compare\.draws in"):
        declared(tmp_path, CROSSED, "partition.seed=3")
    assert declared(tmp_path, "draws: 3", "partition.seed=3").config(declared(tmp_path, "draws: 3").runs[0]).seed == 0


@pytest.mark.parametrize("in_two", [False, True], ids=["at once", "interrupted"])
def test_a_comparison_does_no_more_runs_than_a_decision_takes(
    in_two: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, gain = declared(tmp_path, UNTIL), noisy(2.0)
    begun: list[int] = []
    interrupted: list[bool] = []

    def federation(fabric: Any, config: Any, *more: Any) -> str:
        if len(begun) == 7 and not interrupted and in_two:
            interrupted.append(True)
            raise KeyboardInterrupt
        run = next(run for run in comparison.final_runs if run.folder == config.run_dir)
        begun.append(run.index)
        complete(comparison, run, gain)
        return ""

    monkeypatch.setattr(runner, "try_federation", federation)
    monkeypatch.setattr(runner, "report_runs", lambda *arguments: None)
    monkeypatch.setattr("lorafair.comparison.run.gc.collect", lambda: 0)  # most of the time here
    if in_two:
        with pytest.raises(KeyboardInterrupt):
            runner.run_comparison(launched(1), comparison)
    runner.run_comparison(launched(1), declared(tmp_path, UNTIL))
    stop = next(n for n in range(10, 61, 10) if confidence_sequence(gains(gain, n), 0.05)[0] > 0)
    assert begun == list(range(2 * stop))
    assert stop < 60
    runner.run_comparison(launched(1), declared(tmp_path, UNTIL))
    runner.run_comparison(launched(1), declared(tmp_path, UNTIL), index=119)
    assert len(begun) == 2 * stop, "nothing is done twice, and a job of an array ends at once"


UNTIL = "draws: 60, until: decided, batch: 10"


def test_draws_stop_with_the_batch_that_decides(tmp_path: Path) -> None:
    comparison = declared(tmp_path, UNTIL)
    done(comparison, noisy(2.0), range(30))
    gains = np.array([noisy(2.0)("lora_fair", d) - noisy(2.0)("fedit", d) for d in range(30)])
    expected = next(n for n in (10, 20, 30) if confidence_sequence(gains[:n], 0.05)[0] > 0)
    states = {(run.method, run.seed): comparison.state(run)[0] for run in comparison.final_runs}
    assert states["lora_fair", 29] == "done", "nothing that is there is lost"
    assert {state for (_, draw), state in states.items() if draw >= 30} == {"not needed"}
    fresh = declared(tmp_path, UNTIL)
    assert {fresh.stopped_before(run) for run in fresh.final_runs if run.seed >= expected} == {expected}
    assert {fresh.stopped_before(run) for run in fresh.final_runs if run.seed < expected} == {None}
    decision, lock = runner.decide(comparison, comparison.final_runs[-1], None)
    assert (decision.stopped, lock) == (expected, None)
    assert "not needed" in list_runs(comparison)


def test_what_is_not_decided_goes_on_also_the_baseline(tmp_path: Path) -> None:
    comparison = declared(tmp_path, UNTIL, methods="[fedit, lora_fair, flora]")
    done(comparison, lambda method, draw: noisy(3.0 if method == "lora_fair" else 0.0)(method, draw), range(20))
    left = {run.method: comparison.state(run)[0] for run in comparison.final_runs if run.seed == 40}
    assert left == {"fedit": "unfinished", "lora_fair": "not needed", "flora": "unfinished"}
    assert comparison.decision_level == 0.025
    assert declared(tmp_path, "draws: 60").decision_level is None


def test_a_margin_decides_that_there_is_next_to_nothing(tmp_path: Path) -> None:
    comparison = declared(tmp_path, f"{UNTIL}, margin: 5")
    done(comparison, noisy(0.0), range(20))
    assert comparison.state(comparison.final_runs[-1])[0] == "not needed"
    assert Findings(comparison).answers()[0][1].startswith("Within 5 points of FedIT: LoRA-FAIR")
    assert declared(tmp_path, UNTIL).state(comparison.final_runs[-1])[0] == "unfinished"


def counted(more: int) -> Callable[[str, int], float]:
    """Of 96 test images the other one knows so many more on every draw; in % the differences differ in last bits."""

    def accuracy(method: str, draw: int) -> float:
        right = 30 + 7 * draw % 23 + (0 if method == "fedit" else more)
        return 100 * (right / 96)

    return accuracy


@pytest.mark.parametrize("draws", ["seeds: [0, 1, 2, 3]", "draws: 4", CROSSED, "draws: 40, until: decided"])
def test_the_same_difference_on_every_draw_is_no_finding(draws: str, tmp_path: Path) -> None:
    assert len(set(gains(counted(1), 18).tolist())) > 1
    for more, text in ((1, r"The same difference on every (seed|draw), so there is no interval: LoRA-FAIR \+1\.04"),
                       (0, r"As accurate as FedIT on every (seed|draw): LoRA-FAIR")):  # fmt: skip
        comparison = declared(tmp_path / str(more), draws)
        done(comparison, counted(more), range(18))
        findings = Findings(comparison)
        assert re.match(text, findings.answers()[0][1])
        assert p_values(findings) == {}
        assert significance_table(findings, "default").rows == []
        assert comparison.stopped_before(comparison.final_runs[-1]) is None


def test_the_report_of_draws_that_stop(tmp_path: Path) -> None:
    comparison = declared(tmp_path, UNTIL)
    done(comparison, noisy(2.0), range(20))
    findings = Findings(comparison)
    text = to_text(document(findings, details=False))
    difference = findings.differences("default")["lora_fair"]
    assert difference.interval == confidence_sequence(difference.values, 0.05)
    assert "At most 60 draws" in text
    assert "confidence sequences" in text
    assert "80 runs were not needed" in text
    assert "Not in this report" not in text
    few = Difference({("default", d): float(d) for d in range(3)}, comparison.draws, 0.05)
    assert (few.interval, few.interval_text) == (None, "-inf to +inf")


def test_the_report_of_a_design(tmp_path: Path) -> None:
    comparison = declared(tmp_path, CROSSED)
    done(comparison, noisy(2.0), range(17))  # the last partition is not whole
    findings = Findings(comparison)
    difference = findings.differences("default")["lora_fair"]
    whole = np.array([noisy(2.0)("lora_fair", d) - noisy(2.0)("fedit", d) for d in range(15)]).reshape(5, 3)
    known = estimate(whole, "crossed")
    assert known is not None
    assert difference.mean == pytest.approx(whole.mean())
    assert difference.interval == pytest.approx(known.interval(0.95))
    table = components_table(findings, "default")
    assert [row[0] for row in table.texts] == ["FedIT", "LoRA-FAIR", "LoRA-FAIR − FedIT"]
    assert table.header == ["of", "partition", "training", "interaction and residual"]
    part = components(whole, "crossed")[0]
    assert table.texts[2][1].startswith(f"{part.variance**0.5:.2f} ({part.low**0.5:.2f} to {part.high**0.5:.2f})")
    assert "18 draws (6 partitions × 3 trainings, crossed)" in findings.question()
    write_results(findings, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["seed"] == "7"]
    assert {(line["partition_seed"], line["training_seed"]) for line in lines} == {("2", "1")}


def test_seeds_have_tests_and_components_too(tmp_path: Path) -> None:
    comparison = declared(tmp_path, "seeds: [0, 1, 2, 3, 4, 5]", methods="[fedit, lora_fair, flora]")
    done(
        comparison,
        lambda method, draw: noisy({"lora_fair": 2.0, "flora": 0.5}.get(method, 0.0))(method, draw),
        range(6),
    )
    findings = Findings(comparison)
    found = p_values(findings)
    plain = sorted(p for p, _ in found.values())
    assert sorted(corrected for _, corrected in found.values()) == [
        min(1, 2 * plain[0]), max(min(1, 2 * plain[0]), plain[1])
    ]  # fmt: skip
    table = significance_table(findings, "default")
    assert [row[:2] for row in table.texts] == [["LoRA-FAIR", "6"], ["FLoRA", "6"]]
    (row,) = components_table(findings, "default").texts
    assert float(row[1].split()[0]) > float(row[2].split()[0]), "the part that methods share is the larger one"
    assert any(isinstance(part, Paragraph) and "Holm corrects" in part.text for part in document(findings))
    assert len(difference_table(findings, "default").header) == 9


def test_a_folder_of_draws_is_read_as_such(tmp_path: Path) -> None:
    comparison = declared(tmp_path, CROSSED)
    done(comparison, noisy(2.0), range(18))
    write_record(comparison)
    outcomes, notes = read_folders([comparison.folder])
    assert notes == []
    assert outcomes.draws == comparison.draws
    of_folder, of_plan = (o.differences("default")["lora_fair"] for o in (outcomes, Findings(comparison)))
    assert of_folder.interval == of_plan.interval
    assert list(outcomes.comparison.methods) == ["fedit", "lora_fair"]
    paths = write_tables(outcomes, tmp_path / "tables")
    rows: list[Any] = [path.read_text().splitlines()[0] for path in paths if path.name.endswith("differences.csv")]
    assert rows == ["method,mean,95% interval low,95% interval high"]


def test_over_settings_a_draw_counts_once(tmp_path: Path) -> None:
    draws = "draws: 4, settings: {one: {}, two: {}}"
    comparison = declared(tmp_path, draws)
    done(comparison, noisy(2.0), range(4))
    findings = Findings(comparison)
    difference = findings.difference("lora_fair", "one", "two")
    assert difference is not None
    assert difference.values.shape == (4,)
    assert "each with its mean over settings" in overall_table(findings).caption

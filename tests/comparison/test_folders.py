"""From folders to runs: which there are, what they are called, and what is said of those that are not finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorafair.comparison.folders import read_folders
from lorafair.comparison.plan import Comparison
from lorafair.comparison.record import RECORD_FILE, read_record, write_record
from lorafair.errors import ConfigError
from tests.comparison.made_up import made_up


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    settings = {"b_first": {}, "a_second": {"client.steps": 3}}
    return made_up(tmp_path / "here", {"lora_fair": {}, "fedit": {}}, seeds=2, settings=settings)


def test_a_comparison_is_read_in_its_own_order_and_with_its_baseline(comparison: Comparison) -> None:
    outcomes, notes = read_folders([comparison.folder])
    assert (list(outcomes.comparison.methods), outcomes.comparison.baseline) == (["fedit", "lora_fair"], "fedit")
    write_record(comparison)
    outcomes, notes = read_folders([comparison.folder])
    assert notes == []
    assert list(outcomes.comparison.methods) == ["lora_fair", "fedit"]
    assert list(outcomes.comparison.settings) == ["b_first", "a_second"]
    assert outcomes.comparison.seeds == (0, 1)
    assert outcomes.comparison.baseline == "lora_fair"
    for (setting, method), runs in outcomes.finished.items():
        assert [run.run.folder for run in runs] == [
            comparison.folder.resolve() / setting / f"{method}-seed{seed}" for seed in (0, 1)
        ]
    changed, _ = read_folders([comparison.folder], "FedIT")
    assert changed.comparison.baseline == "fedit"
    with pytest.raises(
        ConfigError, match=r"^baseline fedi is none of the methods; did you mean fedit\? methods: lora_"
    ):
        read_folders([comparison.folder], "fedi")


def test_tuning_runs_are_no_results(comparison: Comparison) -> None:
    tuning = comparison.folder / "b_first" / "tuning" / "fedit-learning_rate0.1"
    shutil.copytree(comparison.runs[0].folder, tuning)
    outcomes, _ = read_folders([comparison.folder])
    assert sum(map(len, outcomes.recorded.values())) == 8


def test_unfinished_runs_are_shown_as_far_as_they_go(comparison: Comparison) -> None:
    first, second, third = (comparison.runs[index].folder for index in (0, 1, 2))
    (first / "result.json").unlink()
    metrics = (first / "metrics.csv").read_text()
    two_rounds = [line for line in metrics.splitlines() if line[0] in "r12"]
    (first / "metrics.csv").write_text("\n".join([*two_rounds, "2,eval/acc"]))
    (second / "result.json").unlink()
    (second / "metrics.csv").unlink()
    (third / "failed.txt").write_text("the disk was full\n")
    (third / "result.json").unlink()
    outcomes, notes = read_folders([comparison.folder])
    assert sorted(notes) == sorted(
        [
            f"{first.resolve()} is not finished: 2 of 4 rounds are shown",
            f"{second.resolve()} has recorded no round yet",
            f"{third.resolve()} has failed: the disk was full",
        ]
    )
    (run,) = outcomes.recorded["b_first", "lora_fair"]
    assert list(run.curves["eval/accuracy"]) == [1, 2]
    assert ("b_first", "lora_fair") not in outcomes.finished
    with pytest.raises(ConfigError, match=r"has recorded no round yet, so there is nothing to show$"):
        read_folders([second])


def test_runs_with_other_settings_are_no_seeds_of_one_line(comparison: Comparison) -> None:
    """lora_fair-seed0 of one folder and lora_fair-seed1 of another differ in client.steps."""
    a, b = (comparison.folder / "b_first" / "lora_fair-seed0", comparison.folder / "a_second" / "lora_fair-seed1")
    outcomes, _ = read_folders([a, b])
    assert list(outcomes.comparison.methods) == ["a_second/lora_fair", "b_first/lora_fair"]
    both, _ = read_folders([a, comparison.folder / "b_first" / "lora_fair-seed1"])
    assert [len(runs) for runs in both.recorded.values()] == [2]
    assert both.title("lora_fair") == "LoRA-FAIR"
    copy = comparison.folder / "again" / "lora_fair-seed0"
    shutil.copytree(a, copy)
    outcomes, _ = read_folders([a, copy])
    assert list(outcomes.comparison.methods) == ["again/lora_fair", "b_first/lora_fair"], "the same seed twice"
    outcomes, _ = read_folders([a, a, a.parent])
    assert sum(map(len, outcomes.recorded.values())) == 4, "each run once"


def test_several_folders_are_settings_of_their_own(comparison: Comparison, tmp_path: Path) -> None:
    other = made_up(tmp_path / "there" / "second", ["fedit"], seeds=1)
    outcomes, _ = read_folders([comparison.folder, other.folder])
    assert list(outcomes.comparison.settings) == ["out/a_second", "out/b_first", "out/default"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "nothing",
            r"^there is no .*/nothing; give the directory of a run, a folder with runs, or that of a comparison$",
        ),
        ("her", r"^there is no .*/her; did you mean .*/here\? give the directory of a run"),
        ("here/made_up.yaml", r"made_up\.yaml is a configuration and no run; .*, for example runs/made_up$"),
        ("broken/config.yaml", r"/broken/config\.yaml is a part of the run .*/broken; give that directory$"),
        ("broken/metrics.csv", r"/broken/metrics\.csv is a part of the run .*/broken; give that directory$"),
        ("empty", r"/empty is no run, and no run is below it: a run has a config\.yaml; give the directory"),
        ("broken", r"/broken/config\.yaml cannot be read \(.*\); leave this run out$"),
    ],
)
def test_what_is_no_run_is_said(place: str, message: str, comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("a: [1, 2")
    (tmp_path / "broken" / "metrics.csv").write_text("round,name,value\n")
    with pytest.raises(ConfigError, match=message) as caught:
        read_folders([tmp_path / place])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "3", "{}", '{"methods": {"a": {}}, "settings": {}, "seeds": [], "baseline": "a"}']
)
def test_a_record_that_cannot_be_read_is_said(content: str, tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / RECORD_FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"comparison\.json cannot be read \(.*\); lorafair compare FILE --report "):
        read_record(tmp_path)


def test_a_record_has_plain_values(comparison: Comparison) -> None:
    write_record(comparison)
    content = json.loads((comparison.folder / RECORD_FILE).read_text())
    assert content["methods"]["fedit"] == {"method.name": "fedit"}
    assert content["settings"] == {"b_first": {}, "a_second": {"client.steps": 3}}

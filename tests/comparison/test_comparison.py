"""A comparison: its plan, what it skips, continues and refuses, and the numbers of its report."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lorafair import registry
from lorafair.checkpointing.lock import LOCK, acquire
from lorafair.cli import main
from lorafair.commands.checks import check_comparison
from lorafair.comparison import plan
from lorafair.comparison.fairness import start_text
from lorafair.comparison.figures import Figures, draw_figures
from lorafair.comparison.findings import Findings
from lorafair.comparison.listing import list_runs
from lorafair.comparison.outcomes import Difference, Outcomes
from lorafair.comparison.plan import Comparison
from lorafair.comparison.report import write_report
from lorafair.comparison.run import run_comparison
from lorafair.comparison.section import load_comparison
from lorafair.comparison.tables import map_table, overall_table
from lorafair.errors import ConfigError, LorafairError
from tests.conftest import launched, run_ranks

ROOT = Path(__file__).parents[2]
COMMON = """
rounds: 2
data: {source: synthetic, train_images: 32, test_images: 16}
model: {name: test_vit, weights: random, image_size: 32, lora: {rank: 4, last_blocks: 2}}
client: {optimizer: adamw, learning_rate: 0.005, batch_size: 16}
fabric: {accelerator: cpu, devices: 1}
checkpoint: {every: 1}
"""
TWO_BY_TWO = "compare: {methods: [fedit, lora_fair], seeds: [0, 1]}"


def declared(folder: Path, section: str, *pairs: str) -> Comparison:
    """A comparison on the tiny model, whose runs go to folder/out."""
    file = folder / "methods.yaml"
    file.write_text(f"{COMMON}{section}\n")
    comparison = load_comparison([str(file), f"run_dir={folder / 'out'}", *pairs])
    assert comparison is not None
    return comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of two methods and two seeds that has run."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        run_comparison(launched(1), declared(folder, TWO_BY_TWO))
    return folder


@pytest.fixture(autouse=True)
def _one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of single tests draw one kind of figure; that of `finished` is drawn in full, before this."""

    def drawn(findings: Findings, width: str) -> Figures:
        return draw_figures(findings, ["accuracy"], width)

    monkeypatch.setattr("lorafair.comparison.report.draw_figures", drawn)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Comparison:
    """The same with a folder of its own, to be changed."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return declared(tmp_path, TWO_BY_TWO)


def result_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded


# The plan


def test_runs_are_numbered_tuning_first_and_have_their_folders(tmp_path: Path) -> None:
    comparison = declared(
        tmp_path,
        """
compare:
  methods: {fedit: {}, sgd: {method.name: lora_fair, method: {solver: sgd}}}
  settings: {plain: {}, skew: {partition: {scheme: dirichlet, clients_per_domain: 2}}}
  seeds: [3, 4]
  tune: {options: {client.learning_rate: [0.001, 0.01]}, rounds: 1, fraction: 0.25, seed: 9}
""",
    )
    names = [str(run.folder.relative_to(comparison.folder)) for run in comparison.runs]
    assert names[:3] == [
        "plain/tuning/fedit-learning_rate0.001", "plain/tuning/fedit-learning_rate0.01",
        "plain/tuning/sgd-learning_rate0.001",
    ]  # fmt: skip
    assert names[8:11] == ["plain/fedit-seed3", "plain/fedit-seed4", "plain/sgd-seed3"]
    assert [run.index for run in comparison.runs] == list(range(16))
    tuning, final = comparison.config(comparison.runs[3]), comparison.config(comparison.runs[10], 1)
    assert (tuning.seed, tuning.rounds, tuning.data.validation_fraction) == (9, 1, 0.25)
    assert (final.seed, final.rounds, final.data.validation_fraction) == (3, 2, None)
    assert tuning.client.learning_rate == final.client.learning_rate == 0.01
    assert final.method == {"name": "lora_fair", "solver": "sgd"}
    assert comparison.config(comparison.runs[-1]).partition.clients_per_domain == 2
    assert comparison.baseline == "fedit"


def test_without_a_section_there_is_no_comparison() -> None:
    assert load_comparison([str(ROOT / "conf" / "demo.yaml")]) is None


METHODS = "methods: [fedit, flora]"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("3", r"compare=3 must be a group with methods, settings"),
        ("{method: {}}", r"there is no compare\.method; did you mean methods\? possible: methods, settings"),
        ("{seeds: [0]}", r"compare\.methods is missing"),
        ("{methods: [], seeds: [0]}", r"compare\.methods is empty"),
        ("{methods: fedit, seeds: [0]}", r"compare\.methods=fedit must be a list of names or a group"),
        ("{methods: [fedit, fedit], seeds: [0]}", r"compare\.methods: fedit is named twice"),
        ("{methods: [3], seeds: [0]}", r"compare\.methods: 3 is no name"),
        ("{methods: {a/b: {}}, seeds: [0]}", r"compare\.methods: 'a/b' is no label"),
        ("{methods: {fedit: 3}, seeds: [0]}", r"compare\.methods\.fedit=3 must be a group of options"),
        ("{methods: {fedit: {client.learning_rat: 1}}, seeds: [0]}",
         r"compare\.methods\.fedit: there is no option client\.learning_rat; did you mean client\.learning_rate\?"),
        ("{methods: {fedit: {client: {batch_size: many}}}, seeds: [0]}",
         r"compare\.methods\.fedit: client\.batch_size: Value 'many'"),
        ("{methods: {fedit: {rounds: 0}}, seeds: [0]}", r"compare\.methods\.fedit: rounds=0 is out of range"),
        ("{methods: {fedit: {client: 3, client.steps: 2}}, seeds: [0]}",
         r"compare\.methods\.fedit: client=3: client\.steps is set, too"),
        ("{methods: {fedit: {seed: 3}}, seeds: [0]}", r"compare\.methods\.fedit sets seed: the seeds of all runs"),
        ("{methods: {fedit: {run_dir: a}}, seeds: [0]}", r"compare\.methods\.fedit sets run_dir"),
        ("{methods: {fedit: {resume: never}}, seeds: [0]}", r"compare\.methods\.fedit sets resume"),
        ("{methods: {fedit: {fabric: {devices: 2}}}, seeds: [0]}", r"compare\.methods\.fedit sets fabric\.devices"),
        ("{methods: {fedit: {compare: {seeds: [1]}}}, seeds: [0]}", r"compare\.methods\.fedit sets compare\.seeds"),
        (f"{{{METHODS}}}", r"compare\.seeds is missing"),
        (f"{{{METHODS}, seeds: []}}", r"compare\.seeds=\[\] must be a list of at least one"),
        (f"{{{METHODS}, seeds: [1, true]}}", r"compare\.seeds=.* whole number"),
        (f"{{{METHODS}, seeds: [1, 1]}}", r"compare\.seeds=\[1, 1\]: name each seed once"),
        (f"{{{METHODS}, seeds: [0], baseline: flor}}", r"compare\.baseline=flor is none of .* did you mean flora\?"),
        (f"{{{METHODS}, seeds: [0], settings: [a]}}", r"compare\.settings=\['a'\] must be a group"),
        (f"{{{METHODS}, seeds: [0], settings: {{}}}}", r"compare\.settings is empty"),
        (f"{{{METHODS}, seeds: [0], settings: {{report: {{}}}}}}", r"compare\.settings\.report: this name is taken"),
        (f"{{{METHODS}, seeds: [0], settings: {{a: {{method.name: flora}}}}}}",
         r"compare\.settings\.a sets method\.name"),
        (f"{{{METHODS}, seeds: [0], settings: {{a: {{partition.alpha: 1}}}}}}",
         r"compare\.methods\.fedit with compare\.settings\.a: partition\.alpha=1\.0 has no effect"),
        ("{methods: {fedit: {rounds: 3}}, seeds: [0], settings: {a: {rounds: 4}}}",
         r"compare\.methods\.fedit and compare\.settings\.a both set rounds"),
        (f"{{{METHODS}, seeds: [0], tune: 3}}", r"compare\.tune=3 must be a group"),
        (f"{{{METHODS}, seeds: [0], tune: {{option: 3}}}}",
         r"there is no compare\.tune\.option; did you mean options\?"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{}}}}}}", r"compare\.tune\.options=\{\} must name options"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{rounds: [1]}}}}}}", r"rounds cannot be tuned"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{client.steps: 3}}}}}}", r"client\.steps=3 must be a list"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{client.steps: [3, 0]}}}}}}", r"client\.steps=0 is out of range"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{client.steps: [3, 3]}}}}}}", r"name each value once"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{client.steps: [3]}}, fraction: 1}}}}",
         r"compare\.tune\.fraction=1 must be between 0 and 1"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{client.steps: [3]}}, rounds: 0}}}}", r"compare\.tune\.rounds=0"),
        (f"{{{METHODS}, seeds: [0], tune: {{options: {{client.steps: [3]}}, seed: a}}}}", r"compare\.tune\.seed=a"),
        ("{methods: {fedit: {client.steps: 2}}, seeds: [0], tune: {options: {client.steps: [3]}}}",
         r"compare\.methods\.fedit and compare\.tune\.options both set client\.steps"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_section_is_one_line_that_names_the_key(section: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        declared(tmp_path, f"compare: {section}")
    assert "\n" not in str(caught.value)
    assert "compare" in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["seed=3"], r"seed=3: seed is what the comparison varies \(compare\.seeds in .*methods\.yaml\)"),
        (["method.name=flora"], r"method\.name=flora: method is what the comparison varies"),
        (["partition.scheme=iid"], r"partition\.scheme=iid: .* \(compare\.settings\.skew in"),
        (["client.learning_rate=1"], r"client\.learning_rate=1: .* \(compare\.tune\.options in"),
        (["data.validation_fraction=0.5"], r"data\.validation_fraction=0\.5: .*what the comparison varies"),
        (["resume=never"], r"resume=never: a comparison always continues"),
        (["compare.seeds=[1]"], r"compare\.seeds=\[1\]: what is compared stands in the YAML file"),
        (["rouns=1"], r"there is no option rouns; did you mean rounds\?"),
    ],
)
def test_a_pair_that_an_entry_also_sets_is_a_mistake(pairs: list[str], message: str, tmp_path: Path) -> None:
    section = """
compare:
  methods: [fedit]
  settings: {skew: {partition: {scheme: dirichlet}}}
  seeds: [0]
  tune: {options: {client.learning_rate: [0.1]}}
"""
    with pytest.raises(ConfigError, match=message):
        declared(tmp_path, section, *pairs)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            "[fedit, lora_fare]",
            r"compare\.methods\.lora_fare: method\.name=lora_fare is unknown; did you mean lora_fair\?",
        ),
        ("{fedit: {method: {solver: sgd}}}", r"compare\.methods\.fedit: method\.solver is no option of fedit"),
        ("{flora: {federation.initialization: local}}", r"compare\.methods\.flora: federation\.initialization=local"),
        ("{fedit: {model.image_size: 31}}", r"compare\.methods\.fedit: model\.image_size=31"),
    ],
)
def test_methods_and_models_are_checked_before_the_first_run(methods: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_comparison(declared(tmp_path, f"compare: {{methods: {methods}, seeds: [0]}}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "4"], r"--index 4: the runs are 0 to 3"),
        (["--index", "-1"], r"--index: -1: give the number of a run"),
        (["--index=x"], r"--index: x: give the number of a run"),
        (["--index"], r"--index: expected one argument; lorafair compare --help"),
        (["--list", "--report"], r"--report: not allowed with argument --list"),
        (["--list=3"], r"--list: ignored explicit argument '3'"),
        (["--indx", "3"], r"--indx is no option of lorafair compare; did you mean --index\?"),
        (["--tune"], r"--tune: there is no compare\.tune"),
        (["--report"], r"no run of .* is done yet"),
    ],
)
def test_flags_that_do_not_fit(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared(tmp_path, TWO_BY_TWO)
    assert main(["compare", str(tmp_path / "methods.yaml"), f"run_dir={tmp_path / 'out'}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "demo.yaml"],
        ["compare"],
        ["demo.yaml", "--list"],
        ["demo.yaml", "--index=1"],
        ["--report", "demo.yaml"],
    ],
)
def test_a_comparison_needs_a_section(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "none of the files has a compare: section, so there is nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", [["compare"], []])
def test_the_subcommand_may_be_left_out(
    subcommand: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared(tmp_path, TWO_BY_TWO)
    assert main([*subcommand, str(tmp_path / "methods.yaml"), f"run_dir={tmp_path / 'out'}", "--list"]) == 0
    assert capsys.readouterr().out.count(" unfinished ") == 4


def test_the_list_imports_nothing_heavy(tmp_path: Path) -> None:
    declared(tmp_path, TWO_BY_TWO)
    code = (
        "import sys; from lorafair.cli import main\n"
        f"main([{str(tmp_path / 'methods.yaml')!r}, '--list'])\n"
        "print([m for m in ('torch', 'timm', 'lightning', 'matplotlib', 'scipy', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["index", "setting", "method", "seed", "state", "options"]
    assert lines[5].split() == ["3", "default", "lora_fair", "1", "unfinished", "-"]
    assert lines[-1] == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "compare").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_example_is_right_and_starts_with_its_command(file: Path) -> None:
    command = file.read_text().splitlines()[0]
    assert command.endswith(f" python train.py conf/compare/{file.name}")
    # The Mixer's weights are made by a script, which the first line of its files names, too.
    comparison = load_comparison([str(file), *(["model.weights=random"] if "distil_mixer.py" in command else [])])
    assert comparison is not None
    assert comparison.folder == Path("runs", file.stem)
    check_comparison(comparison)


# Running


def stamps(comparison: Comparison) -> list[int]:
    return [(run.folder / "result.json").stat().st_mtime_ns for run in comparison.runs]


@pytest.mark.slow
def test_finished_runs_are_not_repeated(copied: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(copied)
    run_comparison(launched(1), copied)
    assert stamps(copied) == before
    assert capsys.readouterr().out.count("done before") == 4
    assert list_runs(copied).count("  done  ") == 4


def halve(folder: Path) -> None:
    """As if the run had been killed after its first round."""
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "round_000002")


@pytest.mark.slow
def test_a_run_in_progress_elsewhere_is_left_to_the_other_process(
    copied: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied.runs[2]
    for name in ("result.json", "metrics.csv"):
        (run.folder / name).unlink()
    held = acquire(run.folder)
    before = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if file.is_file()}
    assert "in progress" in list_runs(copied)
    run_comparison(launched(1), copied)
    printed = capsys.readouterr().out
    assert f"[2/4] {run.name}: left to process {held.holder.pid} on " in printed
    assert f"1 run left to other processes: {run.name}; --report writes the report once it is done\n" in printed
    run_comparison(launched(1), copied, index=2)
    assert "round " not in capsys.readouterr().out.replace("rounds", "")
    assert before == {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if file.is_file()}
    held.release()
    assert not list(copied.folder.rglob(LOCK))


@pytest.mark.parametrize("name", ["report.html", "report.md", "results.csv", "report"])
def test_a_full_disk_at_the_report_names_the_file(
    name: str, copied: Comparison, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original, start = io.open, str(copied.folder / ("report/events" if name == "report" else f".{name}.partial"))

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax") and os.fsdecode(file).startswith(start):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, mode, *arguments, **options)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr("lorafair.comparison.report.draw_figures", lambda findings, width: Figures({}, {}))
    with pytest.raises(LorafairError, match=rf"^{copied.folder / name} cannot be written: No space left on device$"):
        write_report(copied)
    assert capfd.readouterr().err == ""


def test_a_final_run_whose_tuning_is_in_progress_elsewhere_is_left_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = "compare: {methods: [fedit, flora], seeds: [0], tune: {options: {client.steps: [1, 2]}, rounds: 1}}"
    comparison = declared(tmp_path, section)
    held = []
    for run in comparison.runs:
        if run.candidate is not None:
            run.folder.mkdir(parents=True)
            held.append(acquire(run.folder))
    run_comparison(launched(1), comparison)
    printed = capsys.readouterr().out
    assert printed.count(", which is at its tuning") == 2
    assert "[5/6] default / fedit-seed0: left to process " in printed  # which options it takes is not known yet
    assert "[2/6] default / fedit-steps2 (tuning) with steps=2: left to process " in printed
    run_comparison(launched(1), comparison, only_tuning=True)
    assert "default / fedit: left to other processes" in capsys.readouterr().out
    with pytest.raises(LorafairError, match=r"waits for its tuning; run --index 0, 1 first"):
        run_comparison(launched(1), comparison, index=4)
    for lock in held:
        lock.release()


@pytest.mark.slow
def test_half_finished_runs_continue(copied: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied.runs[2].folder
    expected = result_of(folder)
    halve(folder)
    with pytest.raises(LorafairError, match="unfinished"):
        write_report(declared_again(copied, folder))
    write_report(copied)
    assert "Not in this report: 1 of 4 runs: default / lora_fair-seed0 (unfinished)" in capsys.readouterr().out
    run_comparison(launched(1), copied)
    assert "continuing after round 1 of 2" in capsys.readouterr().out
    result = result_of(folder)
    assert result["accuracy"] == expected["accuracy"]
    assert result["start"] == expected["start"]


def declared_again(comparison: Comparison, folder: Path) -> Comparison:
    """A comparison of the method of one folder alone."""
    method, seed = re.fullmatch(r"(.*)-seed(\d+)", folder.name).groups()  # type: ignore[union-attr]
    section = f"compare: {{methods: [{method}], seeds: [{seed}]}}"
    return declared(comparison.folder.parent, section)


@pytest.mark.slow
def test_a_folder_with_other_settings_is_refused(copied: Comparison) -> None:
    root = copied.folder.parent
    changed = declared(root, TWO_BY_TWO, "client.learning_rate=0.01")
    message = (
        r"fedit-seed0 holds a run with other settings: client\.learning_rate is 0\.005 there and 0\.01 here\. Choose"
    )
    with pytest.raises(LorafairError, match=message):
        run_comparison(launched(1), changed)
    assert "conflict" in list_runs(changed)
    halve(copied.runs[0].folder)
    with pytest.raises(LorafairError, match=message):
        run_comparison(launched(1), changed, index=0)
    with pytest.raises(LorafairError, match=r"fedit-seed1 holds a run of 2 rounds, more than the 1"):
        run_comparison(launched(1), declared(root, TWO_BY_TWO, "rounds=1"), index=1)


@pytest.mark.slow
def test_a_method_whose_file_has_changed_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    source = (
        "from dataclasses import dataclass\nimport lorafair\nfrom lorafair.aggregation.fedit import FedIT\n"
        "@lorafair.register_method('changing')\n@dataclass(frozen=True)\nclass Changing(FedIT): pass\n"
    )
    plugin.write_text(source)
    comparison = declared(tmp_path, "compare: {methods: {changing: {}}, seeds: [0]}", f"plugins=[{plugin}]")
    run_comparison(launched(1), comparison)
    assert [comparison.state(run)[0] for run in comparison.runs] == ["done"]
    plugin.write_text(f"{source}# changed\n")
    message = "holds a run with other settings: the file that defines method changing has changed. Choose"
    with pytest.raises(LorafairError, match=message):
        run_comparison(launched(1), comparison)
    registry.METHODS.remove("changing")


def test_another_version_is_refused(copied: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "__version__", "9.9.9")
    with pytest.raises(LorafairError, match=r"fedit-seed0 was made by lorafair .*, this is 9\.9\.9.*does not mix"):
        run_comparison(launched(1), copied)
    halve(copied.runs[0].folder)
    with pytest.raises(LorafairError, match=r"was made by lorafair"):
        run_comparison(launched(1), copied, index=0)


def on_two_ranks(fabric: Any, arguments: Sequence[str], index: int | None) -> str:
    comparison = load_comparison(arguments)
    assert comparison is not None
    try:
        run_comparison(fabric, comparison, index=index)
    except (LorafairError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return ""


@pytest.mark.slow
def test_two_ranks_give_the_same_numbers_and_go_on_after_a_failure(finished: Path, tmp_path: Path) -> None:
    """The second method diverges, which only rank 0 can say."""
    broken = "{method.name: lora_fair, client.learning_rate: 1.0e+38}"
    section = f"compare: {{methods: {{fedit: {{}}, broken: {broken}}}, seeds: [0, 1]}}"
    comparison = declared(tmp_path, section)
    arguments = [str(tmp_path / "methods.yaml"), f"run_dir={tmp_path / 'out'}", "fabric.devices=2"]
    first, second = run_ranks(2, on_two_ranks, arguments, None)
    assert re.match(
        r"LorafairError 2 of 4 runs failed: default / broken-seed0: round 1: every client .*broken-seed1", first
    )
    assert second == "SystemExit 2"
    for seed in (0, 1):
        name = f"out/default/fedit-seed{seed}"
        assert result_of(tmp_path / name)["accuracy"] == result_of(finished / name)["accuracy"]
        assert "every client returned NaN" in (tmp_path / f"out/default/broken-seed{seed}/failed.txt").read_text()
    assert (
        "WARNING: failed: default / broken-seed0, default / broken-seed1: round 1"
        in (tmp_path / "out" / "report.md").read_text()
    )
    assert list_runs(comparison).count("  failed  ") == 2


UNUSABLE = """
import lorafair

@lorafair.register_logger("unusable")
def unusable(run_dir):
    raise OSError("no server")

@lorafair.register_callback("unusable")
def make():
    raise ValueError("no such file")

@lorafair.register_metric("unusable")
def metric(classes):
    raise ValueError("no classes")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("loggers={unusable: {}}", r"loggers\.unusable cannot be opened: no server"),
        ("callbacks=[unusable]", r"callbacks: unusable failed: ValueError: no such file \(unusable\.py, line 10\)"),
        ("evaluation.metrics=[unusable]", r"evaluation\.metrics: unusable failed: ValueError: no classes"),
    ],
)
def test_what_only_rank_0_opens_ends_the_run_on_both_and_the_next_one_starts(
    pair: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "unusable.py").write_text(UNUSABLE)
    file = tmp_path / "methods.yaml"
    section = "compare: {methods: [fedit], seeds: [0, 1]}"
    file.write_text(f"plugins: [./unusable.py]\n{COMMON}{section}\n")
    arguments = [str(file), f"run_dir={tmp_path / 'out'}", "fabric.devices=2", pair]
    first, second = run_ranks(2, on_two_ranks, arguments, None, seconds=60)
    assert re.match(rf"LorafairError no run of .* is done yet, .*: default / fedit-seed0: {message}", first), first
    assert second == "SystemExit 2"
    assert (tmp_path / "out/default/fedit-seed1/failed.txt").exists()


@pytest.mark.slow
def test_one_index_runs_alone_and_without_a_report(tmp_path: Path) -> None:
    comparison = declared(tmp_path, TWO_BY_TWO)
    arguments = [str(tmp_path / "methods.yaml"), f"run_dir={tmp_path / 'out'}", "--index", "3"]
    assert main(arguments) == 0
    assert [comparison.state(run)[0] for run in comparison.runs] == ["unfinished"] * 3 + ["done"]
    assert [path.name for path in comparison.folder.iterdir() if path.name[0] != "."] == ["default"]


@pytest.mark.slow
def test_a_failed_run_is_tried_again(tmp_path: Path) -> None:
    comparison = declared(tmp_path, TWO_BY_TWO)
    (comparison.runs[0].folder).mkdir(parents=True)
    (comparison.runs[0].folder / "failed.txt").write_text("the disk was full\n")
    assert "0: the disk was full" in list_runs(comparison)
    run_comparison(launched(1), comparison, index=0)
    assert not (comparison.runs[0].folder / "failed.txt").exists()
    assert comparison.state(comparison.runs[0])[0] == "done"


# Tuning

TUNED = """
compare:
  methods: [fedit, ffa_lora]
  seeds: [0]
  tune: {options: {client.learning_rate: [0.00001, 0.02]}, rounds: 2, fraction: 0.5}
"""


@pytest.mark.slow
def test_tuning_chooses_by_held_out_images_and_the_report_says_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = declared(tmp_path, TUNED, "rounds=1")
    with pytest.raises(LorafairError, match=r"waits for its tuning; run --index 0, 1 first"):
        run_comparison(launched(1), comparison, index=4)
    run_comparison(launched(1), comparison, only_tuning=True)
    assert "waiting" not in list_runs(comparison)
    assert not (comparison.folder / "default" / "fedit-seed0").exists()
    run_comparison(launched(1), comparison)
    printed = capsys.readouterr().out
    for method in comparison.methods:
        tried = [result_of(run.folder) for run in comparison.tuning_runs("default", method)]
        assert all(result["config"]["data"]["validation_fraction"] == 0.5 for result in tried)
        best = int(np.argmax([result["mean_accuracy"] for result in tried]))
        chosen = comparison.candidates[best]["client.learning_rate"]
        final = result_of(comparison.folder / "default" / f"{method}-seed0")
        assert final["config"]["client"]["learning_rate"] == chosen
        assert final["config"]["data"]["validation_fraction"] is None
        warned = f"WARNING: tuning chose client.learning_rate={chosen:g}, at the edge of its grid (1e-05, 0.02), for "
        assert f"default / {method}" in printed.partition(warned)[2].partition("\n")[0]
    assert "Tuned options: the best of 2 for each method" in (comparison.folder / "report.md").read_text()


@pytest.mark.slow
def test_a_failed_tuning_run_cannot_win_and_a_failed_grid_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = declared(tmp_path, TUNED.replace("[0.00001, 0.02]", "[1.0e+38, 0.02]"), "rounds=1")
    for run in comparison.runs[:3]:
        if run.index != 1:
            run.folder.mkdir(parents=True)
            (run.folder / "failed.txt").write_text("diverged\n")
    run_comparison(launched(1), comparison, index=1)
    choice = comparison.choice("default", "fedit")
    assert choice is not None
    assert (choice.best, choice.accuracies[0]) == (1, None)
    failed = comparison.runs[3].folder
    failed.mkdir()
    (failed / "failed.txt").write_text("diverged, too\n")
    message = (
        r"default / ffa_lora-seed0: all of its tuning runs failed: ffa_lora-.*: diverged; ffa_lora-.*: diverged, too"
    )
    with pytest.raises(LorafairError, match=message):
        run_comparison(launched(1), comparison, index=5)
    assert "[1/1] default / ffa_lora-seed0\n" in capsys.readouterr().out, "none of the options was chosen"
    assert "all of its tuning runs failed" in list_runs(comparison)


# The report


def test_the_numbers_of_the_report(finished: Path, tmp_path: Path) -> None:
    """Against NumPy and SciPy on result.json."""
    out = finished / "out"
    results = {(m, s): result_of(out / "default" / f"{m}-seed{s}") for m in ("fedit", "lora_fair") for s in (0, 1)}
    report = (out / "report.md").read_text()
    rows = {cells[0]: cells for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in report.splitlines()
            if line.startswith("| ")) if len(cells) == 8}  # fmt: skip
    for method, title in (("fedit", "FedIT"), ("lora_fair", "LoRA-FAIR")):
        both = [results[method, seed] for seed in (0, 1)]
        for column, domain in enumerate(("plain", "noisy", "inverted"), start=1):
            values = 100 * np.array([result["accuracy"][domain] for result in both])
            assert rows[title][column] == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        means = 100 * np.array([result["mean_accuracy"] for result in both])
        assert rows[title][4] == f"{means.mean():.1f} ± {means.std(ddof=1):.1f}"
        assert rows[title][5] == "2"
        assert float(rows[title][6]) == pytest.approx(np.mean([r["totals"]["bytes"] for r in both]) / 1e6, abs=0.006)
    test = stats.ttest_rel(*(
        [100 * results[method, seed]["mean_accuracy"] for seed in (0, 1)] for method in ("lora_fair", "fedit")
    ))  # fmt: skip
    low, high = test.confidence_interval(0.95)
    assert f"{low:+.2f} to {high:+.2f} |" in report
    assert "Same start: for every seed and setting" in report
    assert "There is 1 comparison" in report
    for method, title in (("fedit", "FedIT"), ("lora_fair", "LoRA-FAIR")):
        bias = [curves_of(out / "default" / f"{method}-seed{seed}") for seed in (0, 1)]
        cells = [
            np.mean([curves[f"server/error_{when}"][number] for curves in bias])
            for when in ("before", "after") for number in (0, -1)
        ]  # fmt: skip
        assert f"| {title} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in report
    for name in ("default-accuracy.png", "default-traffic.png", "default-bias.png"):
        assert (out / name).stat().st_size > 10_000
        assert f"]({name})" in report
    assert list((out / "report").glob("events.out.tfevents.*"))
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 4
    for line in lines:
        result = results[line["method"], int(line["seed"])]
        expected = result["mean_accuracy"] if line["domain"] == "(mean)" else result["accuracy"][line["domain"]]
        assert float(line["accuracy"]) == pytest.approx(100 * expected, abs=1e-4)
        recall = result["domains"].get(line["domain"], {}).get("balanced_accuracy", result["mean_balanced_accuracy"])
        assert float(line["balanced_accuracy"]) == pytest.approx(100 * recall, abs=1e-4)


def curves_of(folder: Path) -> dict[str, list[float]]:
    curves: dict[str, list[float]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["name"], []).append(float(row["value"]))
    return curves


@pytest.mark.parametrize("values", [(1.0, 3.5), (0.2, -1.0, 2.0, 0.4)])
def test_the_interval_is_that_of_a_paired_t_test(values: tuple[float, ...]) -> None:
    difference = Difference({("default", seed): value for seed, value in enumerate(values)})
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert difference.half_width is not None
    assert difference.mean - difference.half_width == pytest.approx(low)
    assert difference.mean + difference.half_width == pytest.approx(high)
    assert Difference({("default", 0): 1.0}).half_width is None


def test_over_all_settings_every_pair_of_a_setting_and_a_seed_counts() -> None:
    accuracies = {  # of seeds 0 and 1; b has no seed 1 in the second setting
        ("one", "a"): [10.0, 20.0], ("one", "b"): [12.0, 19.0], ("two", "a"): [30.0, 40.0], ("two", "b"): [33.5],
    }  # fmt: skip
    design: Any = SimpleNamespace(
        methods={label: {"method.name": "fedit"} for label in "ab"},
        settings={"one": {}, "two": {}},
        seeds=(0, 1),
        baseline="a",
    )
    runs: list[Any] = [
        SimpleNamespace(
            run=SimpleNamespace(setting=setting, method=method, seed=seed),
            result={"rounds": 2},
            accuracy=value,
            curves={"server/error_before": {1: bias, 2: bias / 2}},
        )
        for (setting, method), values in accuracies.items()
        for bias in [{"one": 0.2, "two": 0.4}[setting]]
        for seed, value in enumerate(values)
    ]
    outcomes = Outcomes(design, runs)
    low, high = stats.ttest_1samp([2.0, -1.0, 3.5], 0).confidence_interval(0.95)
    assert overall_table(outcomes).texts == [["b", "2 of 3", "+1.50", f"{low:+.2f} to {high:+.2f}"]]
    table = map_table(outcomes)
    rows = table.texts
    assert table.header == ["setting", "bias of a", "b"]
    assert [row[:2] for row in rows] == [["two", "0.300"], ["one", "0.150"]], "the largest bias first"
    assert rows[0][2] == "+3.50 (–)"


def test_a_method_that_began_elsewhere_is_named(copied: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied.runs[3].folder / "result.json"
    result = json.loads(file.read_text())
    result["start"]["clients"] = "other"
    file.write_text(json.dumps(result))
    write_report(copied)
    said = "WARNING: the methods did not begin alike: default, seed 1: LoRA-FAIR and FedIT differ in clients."
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_starts_that_differ_by_design_have_a_reason(tmp_path: Path) -> None:
    methods = "{fedit: {}, all: {method.name: centralized}, small: {method.name: fedit, model.lora.rank: 2}}"
    comparison = declared(tmp_path, f"compare: {{methods: {methods}, seeds: [0]}}", "rounds=1")
    for index in range(3):
        run_comparison(launched(1), comparison, index=index)
    text = start_text(Findings(comparison))
    assert text.startswith("Same start")
    assert "all (one client has the images of all)" in text
    assert "small (it sets model.lora.rank)" in text
    assert "with one seed there is no interval" in Findings(comparison).interval_text().lower()

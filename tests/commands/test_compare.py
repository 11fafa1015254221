"""`lorafair.compare`: all runs of a comparison from Python."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

import lorafair
from lorafair.cluster.saved import note_resume, note_saved
from lorafair.cluster.signals import Interrupted
from lorafair.commands import compare as compare_module
from lorafair.comparison.figures import draw_figures
from lorafair.errors import ConfigError, LorafairError
from tests.conftest import TINY

SECTION = "compare: {methods: [fedit, lora_fair], seeds: [0, 1]}\n"


@pytest.fixture(autouse=True)
def _one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/comparison looks at all of them."""
    monkeypatch.setattr(
        "lorafair.comparison.report.draw_figures",
        lambda findings, width: draw_figures(findings, ["accuracy"], width),
    )


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "two.yaml").write_text(SECTION)
    return [str(tmp_path / "two.yaml"), *TINY, "rounds=1", f"run_dir={tmp_path / 'out'}"]


@pytest.mark.slow
def test_a_comparison_runs_in_place_and_is_not_repeated(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    result = lorafair.compare(arguments)
    assert result.folder == tmp_path / "out"
    assert list(result.runs) == [("default", m, s) for m in ("fedit", "lora_fair") for s in (0, 1)]
    assert repr(result) == f"ComparisonResult(4 of 4 runs, {tmp_path / 'out'})"
    fedit = result.runs["default", "fedit", 1]
    assert fedit.config.seed == 1
    assert 0 <= fedit.mean_accuracy <= 1
    assert "| LoRA-FAIR |" in result.report
    assert "Same start: " in result.report
    assert not dist.is_initialized()
    assert signal.getsignal(signal.SIGINT) == handler
    alone = lorafair.run(*TINY, "rounds=1", "seed=1", "method.name=fedit", run_dir=tmp_path / "alone")
    assert alone.accuracy == fedit.accuracy
    capsys.readouterr()
    again = lorafair.compare(*arguments)
    assert capsys.readouterr().out.count(": done before") == 4
    assert again.runs["default", "fedit", 1].accuracy == fedit.accuracy


@pytest.mark.slow
def test_a_run_that_fails_is_an_error_after_the_others_are_done(arguments: list[str], tmp_path: Path) -> None:
    broken = "{method.name: fedit, client.weight_decay: 1.0e+38}"
    (tmp_path / "two.yaml").write_text(f"compare: {{methods: {{broken: {broken}, fedit: {{}}}}, seeds: [0]}}\n")
    with pytest.raises(LorafairError, match=r"^1 of 2 runs failed: default / broken-seed0: round 1: every client "):
        lorafair.compare(arguments)
    assert (tmp_path / "out" / "default" / "fedit-seed0" / "result.json").exists()


def test_more_processes_are_a_child_with_the_same_arguments(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(compare_module, "show_child", started.append)
    result = lorafair.compare(*arguments, "fabric.devices=2")
    assert started == [["compare", *arguments, "fabric.devices=2"]]
    assert result.runs == {}, "nothing was done"
    assert re.match(r"ComparisonResult\(0 of 4 runs, ", repr(result))


def test_an_interrupted_comparison_says_what_continues_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        note_saved()
        raise Interrupted(signal.SIGINT, "before fedit")

    note_resume("never")  # of a run before it
    monkeypatch.setattr("lorafair.comparison.run.run_comparison", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"before fedit; the same call continues$"):
        lorafair.compare(arguments)


def test_without_a_section_it_is_a_single_run() -> None:
    with pytest.raises(
        ConfigError, match=r"^none of the files has a compare: section; lorafair\.run does a single run$"
    ):
        lorafair.compare("synthetic.yaml")


def test_mistakes_are_found_before_the_first_run(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("compare: {methods: {fedit: {model.image_size: 31}}, seeds: [0]}\n")
    with pytest.raises(ConfigError, match=r"^compare\.methods\.fedit: model\.image_size=31"):
        lorafair.compare([argument for argument in arguments if not argument.startswith("model.image_size=")])
    assert not (tmp_path / "out").exists()

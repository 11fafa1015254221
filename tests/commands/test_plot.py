"""`lorafair plot` and `lorafair.plot`: files and figures of any runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lorafair
from lorafair.cli import main
from lorafair.commands.compare import ComparisonResult
from lorafair.commands.run import RunResult
from lorafair.comparison.figures import KINDS
from lorafair.comparison.plan import Comparison
from lorafair.errors import ConfigError
from tests.comparison.made_up import made_up

ROOT = Path(__file__).parents[2]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return made_up(tmp_path / "made", ["fedit", "lora_fair"], seeds=2)


def test_the_command_writes_figures_and_tables(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (comparison.runs[1].folder / "result.json").unlink()
    out = tmp_path / "out"
    assert main(["plot", str(comparison.folder), "--figure", "accuracy", "--format", "svg", "png", f"--out={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["default-accuracy.png", "default-accuracy.svg"]
    printed = capsys.readouterr().out
    assert f"{comparison.runs[1].folder.resolve()} is not finished: 4 of 4 rounds are shown\n" in printed
    assert f"figures:  2 files in {out}: default-accuracy.svg, default-accuracy.png\n" in printed
    assert main(["plot", str(comparison.runs[0].folder), "--width=2.5"]) == 0
    names = {path.name for path in comparison.runs[0].folder.iterdir()}
    assert {"accuracy.pdf", "layers.pdf", "results.tex", "results.csv"} <= names
    assert not {"differences.pdf", "map.pdf"} & names
    assert 'width="180pt"' not in printed


def test_the_list_imports_nothing_heavy() -> None:
    code = (
        "import sys, lorafair; from lorafair.cli import main; lorafair.plot\n"
        "main(['plot', '--help']); heavy = ('torch', 'timm', 'lightning', 'matplotlib', 'scipy', 'tensorboard')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "lorafair plot needs a RUN: a run directory, a folder with runs, or a comparison's folder"),
        (["x", "--figure", "acuracy"], "there is no figure acuracy; did you mean accuracy?"),
        (["x", "--format", "jpeg"], "there is no format jpeg; "),
        (["x"], "there is no x; give the directory of a run"),
        (["{folder}", "--figure", "map"], "there is nothing to show in figure map: it needs two settings"),
        (["{folder}", "--width", "wide"], "width=wide must be column (3.25 inches) or page"),
        (["{folder}", "--baseline", "flora"], "baseline flora is none of the methods; "),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", *(argument.format(folder=comparison.folder) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_the_figures_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(KINDS)


def test_from_python_with_folders_and_results(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    whole = lorafair.plot(ComparisonResult(comparison), figure=["traffic", "bias"], width="page", baseline="lora_fair")
    assert list(whole) == ["default-traffic", "default-bias"]
    assert whole["bias"].get_size_inches()[0] == 6.75
    run = lorafair.plot(RunResult(comparison.runs[0].folder), figure="loss")
    assert list(run) == ["loss"]
    assert run.captions["loss"].startswith("Training loss")
    assert run.notes == []
    (comparison.runs[0].folder / "result.json").unlink()
    assert lorafair.plot(str(comparison.runs[0].folder), figure="loss").notes == [capsys.readouterr().out.strip()]
    with pytest.raises(ConfigError, match=r"^lorafair\.plot needs a run: "):
        lorafair.plot()
    with pytest.raises(ConfigError, match=r"^lorafair\.plot: 3 is no run; give a folder, or what lorafair\.run or"):
        lorafair.plot(3)

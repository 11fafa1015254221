"""Tables for a paper: the numbers of the runs in LaTeX and CSV, and names that LaTeX sets as they are."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lorafair.comparison.findings import Findings
from lorafair.comparison.table_files import latex_escaped, latex_table, write_tables
from lorafair.comparison.tables import Table, accuracy_table, result_table
from tests.comparison.made_up import made_up


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """With a user's label, a reference that pools the data, and a domain with a special character."""
    methods = {"fedit": {}, "fair_2": {"method.name": "lora_fair"}, "centralized": {}}
    return Findings(made_up(tmp_path_factory.mktemp("tables"), methods, domains=("photo", "R&D_50%")))


def rows_of(latex: str) -> list[list[str]]:
    """The cells of a tabular, its header first."""
    body = latex[latex.index(r"\toprule") : latex.index(r"\bottomrule")]
    return [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in body.splitlines() if line.endswith(r"\\")]


def test_numbers_are_those_of_the_runs(findings: Findings, tmp_path: Path) -> None:
    paths = write_tables(findings, tmp_path / "new")
    assert [path.name for path in paths] == [
        "default-results.tex", "default-results.csv", "default-differences.tex", "default-differences.csv",
    ]  # fmt: skip
    header, *rows = rows_of(paths[0].read_text())
    assert header == ["method", "photo", r"R\&D\_50\%", "mean", "seeds"]
    with paths[1].open(newline="") as file:
        numbers = list(csv.DictReader(file))
    assert [row[0] for row in rows] == ["FedIT", r"fair\_2", "Centralized"]
    assert [row["method"] for row in numbers] == ["FedIT", "fair_2", "Centralized"]
    for method, cells, line in zip(findings.comparison.methods, rows, numbers, strict=True):
        results = [run.result for run in findings.runs_of("default", method)]
        for name, cell in zip(("photo", "R&D_50%"), cells[1:], strict=False):
            values = 100 * np.array([result["accuracy"][name] for result in results])
            plain = re.sub(r"\\mathbf\{(.*?)\}", r"\1", cell)
            assert plain == rf"${values.mean():.1f} \pm {values.std(ddof=1):.1f}$"
            assert float(line[name]) == pytest.approx(values.mean(), abs=1e-4)
            assert float(line[f"{name} std"]) == pytest.approx(values.std(ddof=1), abs=1e-4)
        assert cells[-1] == line["seeds"] == "3"


def test_differences_are_those_of_a_paired_test(findings: Findings, tmp_path: Path) -> None:
    _, _, latex, numbers = write_tables(findings, tmp_path)
    mine, theirs = ([run.accuracy for run in findings.runs_of("default", m)] for m in ("fair_2", "fedit"))
    low, high = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    row = next(row for row in rows_of(latex.read_text()) if row[0] == r"fair\_2")
    assert row[1:4] == [f"${a - b:+.2f}$" for a, b in zip(mine, theirs, strict=True)]
    assert row[4:] == [f"${np.mean(mine) - np.mean(theirs):+.2f}$", f"$[{low:+.2f}, {high:+.2f}]$"]
    with numbers.open(newline="") as file:
        line = next(csv.DictReader(file))
    assert float(line["mean"]) == pytest.approx(np.mean(mine) - np.mean(theirs), abs=1e-4)
    assert (line["95% interval low"], line["95% interval high"]) == (f"{low:+.2f}", f"{high:+.2f}")


def test_the_best_of_those_that_pool_no_data_is_bold(findings: Findings) -> None:
    table = result_table(findings, "default")
    for column in (1, 2, 3):
        means = [row[column].mean for row in table.rows]  # type: ignore[union-attr]
        best = int(np.argmax(means[:2]))  # the last one is centralized
        assert {row for row, other in table.best if other == column} == {best}
        cells = rows_of(latex_table(table))[1 + best]
        assert cells[column].startswith(rf"$\mathbf{{{means[best]:.1f}}} \pm ")
    assert "methods that pool the data are not marked" in table.caption
    assert len(rows_of(latex_table(table))) == 4
    assert accuracy_table(findings, "default").best == table.best


def test_one_seed_has_no_deviation_and_no_interval(tmp_path: Path) -> None:
    findings = Findings(made_up(tmp_path, ["fedit", "lora_fair"], seeds=1))
    results, numbers, differences, _ = (path.read_text() for path in write_tables(findings, tmp_path))
    assert r"\pm" not in results.partition(r"\toprule")[2]
    assert numbers.splitlines()[1].split(",")[2] == ""
    assert rows_of(differences)[1][-1] == "--"


def test_special_characters_are_escaped() -> None:
    escaped = latex_escaped(r"a_b & 5% #1 $x$ {y} ~ ^ \input{/etc/passwd} < > | ± é")
    without = re.sub(r"\\(text\w+\{\}|[&%$#_{}])|\$\\pm\$", "", escaped)
    assert not set(without) & set("\\&%$#_{}~^<>|±")
    assert latex_escaped("plain words, 1.5 (é)") == "plain words, 1.5 (é)"
    table = latex_table(Table("two\nlines", ["a_b", "50%"], [["x&y", "-1.5"], ["q", "+1.0 to +2.0"]]))
    assert table.splitlines()[0] == "% two lines.", "a caption cannot leave its comment"
    assert rows_of(table) == [[r"a\_b", r"50\%"], [r"x\&y", "$-1.5$"], ["q", "$[+1.0, +2.0]$"]]


def test_epsilon_has_a_column_where_a_run_has_privacy(tmp_path: Path) -> None:
    comparison = made_up(tmp_path, ("fedit", "lora_fair"), seeds=2)
    for run, epsilon in zip([run for run in comparison.final_runs if run.method == "fedit"], (2.5, 3.75), strict=True):
        file = run.folder / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"privacy": {"epsilon": epsilon}}))
    table = accuracy_table(Findings(comparison), "default")
    column = list(table.header).index("ε")
    assert [row[column] for row in table.texts] == ["3.75", "∞"]
    plain = made_up(tmp_path / "plain", ("fedit", "lora_fair"), seeds=2)
    assert "ε" not in accuracy_table(Findings(plain), "default").header

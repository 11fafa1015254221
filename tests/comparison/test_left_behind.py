"""Tables beside top-1, of runs whose results were made up."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from lorafair.comparison import left_behind
from lorafair.comparison.document import document
from lorafair.comparison.findings import Findings
from lorafair.comparison.markdown import to_text
from lorafair.comparison.outcomes import Difference, Summary
from lorafair.comparison.report import write_results
from lorafair.comparison.table_files import write_tables
from lorafair.comparison.tables import Table
from tests.comparison.made_up import made_up

METHODS: dict[str, Any] = {
    "fedit": {},
    "fedit_class": {"method.name": "fedit", "federation.head_weighting": "class"},
    "lora_fair": {"federation.head_weighting": "class"},  # without a plain one
    "lora_fair_fold": {"method.name": "lora_fair", "method.fold": True},  # differs in more
}


def results_of(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = (json.loads(file.read_text()) for file in folder.rglob("result.json"))
    return {(f["label"], f["seed"]): f for f in found}


def add_to_results(comparison: Any) -> None:
    """What runs record of balance, classes and clients; of one run of fedit without clients, as an older version."""
    for run in comparison.final_runs:
        file = run.folder / "result.json"
        result, place = json.loads(file.read_text()), len(run.method) + run.seed
        result["label"] = run.method
        result["domains"] = {
            domain: {"accuracy": a, "balanced_accuracy": a - 0.01 * place, "macro_f1": a / 2, "majority_class": 0.2,
                     "calibration_error": 0.1, "most_frequent_answer": 0.3}
            for domain, a in result["accuracy"].items()
        }  # fmt: skip
        result["recall"] = {d: {f"class-{c}": c / 20 for c in range(16)} for d in result["accuracy"]}
        if (run.method, run.seed) != ("fedit", 1):
            result["clients"] = {"worst_decile": 0.1 + run.seed / 10, "best_decile": 0.9, "accuracy": 0.5,
                                 "standard_deviation": 0.25, "number": 10, "without_test_images": 0}  # fmt: skip
            result["accuracy_worst_domain"] = min(result["accuracy"].values())
        file.write_text(json.dumps(result))


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    comparison = made_up(tmp_path_factory.mktemp("left_behind"), METHODS)
    add_to_results(comparison)
    return Findings(comparison)


def test_top_1_has_balanced_accuracy_and_its_baselines_beside_it(findings: Findings) -> None:
    table = left_behind.balance_table(findings, "default")
    assert table.header == [
        "method", "top-1", "balanced", "macro F1", "most frequent answer", "majority class", "calibration error"
    ]  # fmt: skip
    results = results_of(findings.comparison.folder)
    for row, method in zip(table.rows, METHODS, strict=True):
        runs = [results[method, seed] for seed in range(3)]
        means = [statistics.fmean(d["balanced_accuracy"] for d in r["domains"].values()) for r in runs]
        assert isinstance(row[2], Summary)
        assert row[2].values == pytest.approx([100 * mean for mean in means])
        assert str(row[1]) == str(Summary(tuple(100 * r["mean_accuracy"] for r in runs)))
        assert [str(cell) for cell in row[4:]] == ["30.0 ± 0.0", "20.0 ± 0.0", "10.0 ± 0.0"]


def test_the_worst_domain_and_the_deciles_of_clients(findings: Findings) -> None:
    table = left_behind.spread_table(findings, "default")
    results = results_of(findings.comparison.folder)
    worst = [100 * min(results["fedit", seed]["accuracy"].values()) for seed in range(3)]
    fedit = table.rows[0]
    assert isinstance(fedit[2], Summary)
    assert fedit[2].values == pytest.approx(worst)
    assert [str(cell) for cell in fedit[3:]] == ["20.0 ± 14.1", "50.0 ± 0.0", "90.0 ± 0.0", "25.0 ± 0.0"], "of two runs"
    assert str(table.rows[1][3]) == "20.0 ± 10.0"


def test_recall_of_many_classes_shows_the_hardest(findings: Findings) -> None:
    table = left_behind.recall_table(findings, "default")
    assert [row[0] for row in table.rows] == [f"class-{c}" for c in range(12)]
    assert [str(cell) for cell in table.rows[3][1:]] == ["15.0"] * 4
    assert "of the 12 of 16 classes where it is lowest" in table.caption


def test_plain_and_class_wise_heads_are_paired_where_nothing_else_differs(findings: Findings) -> None:
    assert left_behind.head_pairs(findings, "default") == [("fedit", "fedit_class")]
    rows = left_behind.head_table(findings, "default").rows
    assert [row[:2] for row in rows] == [["FedIT", "top-1"], ["FedIT", "balanced"]]
    results = results_of(findings.comparison.folder)
    top_1, balanced = (row[4] for row in rows)
    assert isinstance(top_1, Difference)
    assert isinstance(balanced, Difference)
    gains = [
        100 * (results["fedit_class", s]["mean_accuracy"] - results["fedit", s]["mean_accuracy"]) for s in range(3)
    ]
    assert top_1.mean == pytest.approx(statistics.fmean(gains))
    # The made-up recall is lower by a point for each letter of the label.
    assert balanced.mean == pytest.approx(statistics.fmean(gains) - len("fedit_class") + len("fedit"))


def test_the_report_and_its_files_have_them(findings: Findings, tmp_path: Path) -> None:
    text = to_text(document(findings, details=False))
    for what in ("Beside top-1, in %", "class-wise mean of the head"):
        assert what in text
    captions = [part.caption for part in document(findings) if isinstance(part, Table)]
    assert any("Who is left behind: accuracy in %" in caption for caption in captions)
    names = {path.name for path in write_tables(findings, tmp_path)}
    assert {"default-balance.csv", "default-left_behind.tex", "default-heads.csv"} <= {
        n.replace(" ", "-") for n in names
    }
    write_results(findings, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    [mean] = [x for x in lines if (x["method"], x["seed"], x["domain"]) == ("fedit_class", "2", "(mean)")]
    worst = min(float(x["accuracy"]) for x in lines if (x["method"], x["seed"]) == ("fedit_class", "2"))
    assert float(mean["worst_domain"]) == pytest.approx(worst)
    assert (mean["clients_worst_decile"], mean["majority_class"]) == ("30.0000", "20.0000")
    assert all(x["clients_worst_decile"] == "" for x in lines if x["domain"] != "(mean)")


def test_runs_of_an_older_version_have_no_such_tables(tmp_path: Path) -> None:
    findings = Findings(made_up(tmp_path))
    for make in (left_behind.balance_table, left_behind.spread_table, left_behind.recall_table, left_behind.head_table):
        assert not make(findings, "default").rows
    assert left_behind.reading_text(findings) == ""

"""Every claim about methods follows from the numbers stored in docs/data, and stands where docs/claims.csv says."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks import collect
from lorafair.errors import ConfigError

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data"
PROSE = {  # page -> the headings between which every decimal number is a claim; None: the whole page
    "docs/results.md": None,
    "docs/concepts/coded_fold.md": ("## Limits", None),
    "README.md": ("## What you can rely on", "## Methods"),
}
NO_CLAIM = {"0.1", "0.001", "0.002", "0.004", "0.01", "0.5", "0.05"}  # options of the settings and levels of tests
DECIMAL = re.compile(r"(?<![\w.,−-])[+−-]?\d+\.\d+(?![\w.]*\d)")


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    return importlib.import_module("claims")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    return importlib.import_module("stored_draws")


def test_every_claim_follows_from_the_stored_numbers(claims: ModuleType) -> None:
    found = claims.read()
    assert len(found) > 80
    assert len({claim.id for claim in found}) == len(found)
    wrong = [f"{claim.id}: {claim.value}, computed {claim.computed():.4f}" for claim in found if not claim.holds()]
    assert not wrong, "\n".join([*wrong, "python docs/_ext/claims.py --write"])
    for claim in found:
        half_a_digit = 0.5 * 10.0 ** -len(claim.value.partition(".")[2])
        assert float(claim.tolerance) <= 2.5 * half_a_digit + 0.01, f"{claim.id}: such a tolerance checks nothing"
        assert claim.command, claim.id


def test_a_changed_number_does_not_hold(claims: ModuleType) -> None:
    for claim in claims.read():
        digits = len(claim.value.partition(".")[2])
        moved = claim.number + 3 * max(float(claim.tolerance), 0.5 * 10.0**-digits)
        assert not dataclasses.replace(claim, value=f"{moved:.6f}").holds(), claim.id


def test_every_claim_stands_in_its_page(claims: ModuleType) -> None:
    for claim in claims.read():
        assert claim.stands_in_its_text(), f"{claim.id}: {claim.value} is not in {claim.text!r}"
        page = claims.one_line((ROOT / claim.page).read_text("utf-8"))
        assert claim.text in page, f"{claim.id}: {claim.page} does not have {claim.text!r}"


@pytest.mark.parametrize("page", PROSE)
def test_no_number_of_the_prose_is_unlisted(claims: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    if (part := PROSE[page]) is not None:
        text = text.partition(part[0])[2]
        text = text.partition(part[1])[0] if part[1] else text
    assert unlisted(claims, page, text + "\n\nIt gains +123.45 points.") == ["+123.45"]
    assert not unlisted(claims, page, text)


def unlisted(claims: ModuleType, page: str, text: str) -> list[str]:
    """Decimal numbers outside tables, code and links that no claim of the page covers."""
    prose = re.sub(r"^\|.*$", " ", re.sub(r"```.*?```", " ", text, flags=re.DOTALL), flags=re.MULTILINE)
    prose = claims.one_line(re.sub(r"`[^`]*`|(?<=\])\([^)]*\)", " ", prose))
    for claim in sorted(claims.read(), key=lambda claim: -len(claim.text)):
        if claim.page == page:
            prose = prose.replace(claims.one_line(re.sub(r"`[^`]*`", " ", claim.text)), " ")
    return [number for number in DECIMAL.findall(prose) if number not in NO_CLAIM]


def test_new_numbers_are_put_into_pages_and_list(
    claims: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where draws are added, the sentences get the new numbers and keep their line ends."""
    listed = [claim for claim in claims.read() if claim.id.startswith("long-head")]
    right, value = listed[0].text, listed[0].value
    wrong = right.replace(value, "+9.99")
    assert wrong != right
    old = [dataclasses.replace(claim, text=wrong, value=claim.value.replace(value, "+9.99")) for claim in listed]
    page = tmp_path / listed[0].page
    page.parent.mkdir()
    page.write_text("All heads\nclass-wise: {}.\n".format(wrong.replace(" ", "\n  ", 1)), "utf-8")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "CLAIMS", tmp_path / "claims.csv")
    claims.write(old)
    assert page.read_text("utf-8") == "All heads\nclass-wise: {}.\n".format(right.replace(" ", "\n  ", 1))
    assert claims.read(tmp_path / "claims.csv") == listed


def test_bytes_of_a_layer_are_those_that_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    traffic = importlib.import_module("traffic_table").layer_traffic
    coding = importlib.import_module("lorafair.aggregation.coded_fold").Coding(4, half_start=True)
    with (DATA / "layer_bytes.csv").open(encoding="utf-8") as handle:
        of_method = {row["method"]: int(row["bytes"]) for row in csv.DictReader(handle)}
    for method in ("fedit", "fedex_lora"):
        assert traffic(method, outputs=768, inputs=768, lora_ranks=(16,) * 10).down == 10 * of_method[method]
    assert of_method["fair_fold"] == 2 * 16 * 2 * 768 + coding.message_bytes(4 * 16, 768, 768)


def test_every_setting_has_its_draws(drawn: ModuleType) -> None:
    for setting in drawn.settings():
        assert drawn.BASELINE in setting.stored.methods(setting.setting)
        assert setting.draws >= 2
        assert ("are wanted" in setting.count_text()) == (setting.draws < setting.wanted)


def test_both_heads_of_an_aggregation_are_paired(drawn: ModuleType) -> None:
    labels = ["fedit", "lora_fair", "fair_fold_plain", "fedit_class", "lora_fair_class", "fair_fold", "ffa_lora",
              "fedit_last_heads", "fedit_class_last_heads"]  # fmt: skip
    assert drawn.pairs_of(labels) == {
        "fedit": ("fedit", "fedit_class"),
        "lora_fair": ("lora_fair", "lora_fair_class"),
        "fair_fold": ("fair_fold_plain", "fair_fold"),
        "ffa_lora": ("ffa_lora", None),
        "fedit_last_heads": ("fedit_last_heads", "fedit_class_last_heads"),
    }


def comparison(folder: Path, accuracies: dict[tuple[str, int], float]) -> Path:
    """A folder as a comparison of two methods leaves it."""
    methods = {label: {"method.name": label} for label in ("fedit", "lora_fair")}
    record = {"methods": methods, "settings": {"skew": {}}, "seeds": [0, 1], "baseline": "fedit"}
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(record))
    for (method, draw), accuracy in accuracies.items():
        run = folder / "skew" / f"{method}-seed{draw}"
        run.mkdir(parents=True, exist_ok=True)
        of_domain = {"accuracy": accuracy, "most_frequent_answer": 0.25, "majority_class": 0.1}
        result = {
            "mean_accuracy": accuracy, "accuracy": {"sans": accuracy, "mono": accuracy - 0.1},
            "mean_balanced_accuracy": accuracy, "domains": {"sans": of_domain, "mono": of_domain},
            "totals": {"bytes": 5_468_960}, "rounds": 2, "versions": {},
        }  # fmt: skip
        (run / "result.json").write_text(json.dumps(result))
        (run / "metrics.csv").write_text("round,name,value\n1,server/error_before,0.4\n2,server/error_before,0.2\n")
    return folder


def test_draws_are_collected_once_all_methods_have_them(tmp_path: Path, drawn: ModuleType) -> None:
    file, both = tmp_path / "draws.csv", {("fedit", 0): 0.5, ("lora_fair", 0): 0.51}
    folder = comparison(tmp_path / "runs", {**both, ("fedit", 1): 0.4})
    collect.main([str(file), str(folder)])
    stored = drawn.Stored(file)
    assert stored.values("skew", "fedit") == {0: 50.0}
    assert stored.difference("skew", "lora_fair", "fedit").by_draw == {0: pytest.approx(1.0)}
    assert stored.mean("skew", "fedit", "worst_domain") == 40.0
    assert stored.mean("skew", "fedit", "megabytes") == 5.469
    assert stored.mean("skew", "fedit", "bias") == pytest.approx(0.3)
    assert stored.mean("skew", "fedit", "bias_left") is None
    comparison(folder, {("lora_fair", 1): 0.42})
    collect.main([str(file), str(folder)])
    paired = drawn.Stored(file).difference("skew", "lora_fair", "fedit")
    assert paired.by_draw == {0: pytest.approx(1.0), 1: pytest.approx(2.0)}


def test_other_numbers_of_a_stored_draw_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "draws.csv"
    folder = comparison(tmp_path / "runs", {("fedit", 0): 0.5, ("lora_fair", 0): 0.51})
    collect.main([str(file), str(folder)])
    before = file.read_text()
    comparison(folder, {("fedit", 0): 0.6})
    with pytest.raises(ConfigError, match=r"fedit, draw 0 of skew .*accuracy 50\.000 and 60\.000.*--replace"):
        collect.main([str(file), str(folder)])
    assert file.read_text() == before
    collect.main([str(file), str(folder), "--replace"])
    assert "60.000" in file.read_text()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drawn: ModuleType) -> Iterator[ModuleType]:
    """The directives, on a made comparison: aggregation adds 1 point, the class-wise head 5, the draw up to 30."""
    pytest.importorskip("sphinx")
    columns = ("accuracy", "balanced_accuracy", "worst_domain", "most_frequent_answer", "majority_class", "megabytes",
               "bias_left")  # fmt: skip
    gains = {"fedit": 0.0, "flex_lora": 1.0, "fedit_class": 5.0, "flex_lora_class": 6.0}
    with (tmp_path / "made.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["setting", "method", "draw", *columns])
        for place, (label, gain) in enumerate(gains.items()):
            for draw in range(10):
                noise = 0.01 * ((7 * draw + 3 * place * draw) % 5)
                writer.writerow(["skew", label, draw, 30 + 3 * draw + gain + noise, 30, 20, 40, 10, 5.5, ""])
    (tmp_path / "settings.csv").write_text(
        "file,setting,page,title,about,wanted,command\nmade.csv,skew,results,Made skew,Made images,10,true\n"
    )
    monkeypatch.setattr(drawn, "DATA", tmp_path)
    drawn.stored.cache_clear()
    yield importlib.import_module("results_tables")
    drawn.stored.cache_clear()


def test_the_gain_of_the_head_is_not_credited_to_the_aggregation(tables: ModuleType, drawn: ModuleType) -> None:
    (setting,) = drawn.settings()
    contrasts = {part: paired.mean for part, paired in tables.contrasts_of(setting).items()}
    assert contrasts == {
        ("fedit", "head"): pytest.approx(5, abs=0.1),
        ("flex_lora", "plain"): pytest.approx(1, abs=0.1),
        ("flex_lora", "class"): pytest.approx(1, abs=0.1),
        ("flex_lora", "head"): pytest.approx(5, abs=0.1),
    }


def test_the_page_says_what_the_draws_show(tables: ModuleType, tmp_path: Path) -> None:
    def line(of: str, start: str) -> str:
        directive = SimpleNamespace(arguments=["made.csv"])
        return next(
            line.replace("\N{NO-BREAK SPACE}", " ")
            for line in "\n".join(getattr(tables, of).text(directive)).splitlines()
            if line.startswith(f"| {start} |")
        )

    number = r"[+−]\d\.\d\d ± \d\.\d\d"
    assert re.fullmatch(
        rf"\| Made skew \| 10 \| 43\.5 \|  \| \*\*\+0\.98 ± 0\.0\d\*\* \|  \|  \| \*\*{number}\*\* \|  \|",
        line("Map", "Made skew"),
    )
    assert re.fullmatch(r"\| FlexLoRA \| \*\*\+0\.98 ± 0\.0\d\*\* \|", line("Grid", "FlexLoRA"))
    assert re.fullmatch(
        r"\| FlexLoRA, class-wise head \| \*\*\+6\.00 ± 0\.0\d\*\* \|", line("Grid", "FlexLoRA, class-wise head")
    )
    made = tmp_path / "made.csv"
    few = [line for line in made.read_text().splitlines() if re.search(r",(draw|0|1),", line)]
    made.write_text("\n".join(few).replace("_class,1,3", "_class,1,9") + "\n")  # and one that is far off
    tables.stored.cache_clear()
    assert "| 2 of 10 |" in line("Map", "Made skew")
    assert "**" not in line("Grid", "FlexLoRA, class-wise head")

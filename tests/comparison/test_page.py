"""The report as one page: it needs nothing else, runs no code that a name brings, and says what the runs say."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorafair.comparison import page
from lorafair.comparison.document import Commands, Heading, Items, Paragraph, document
from lorafair.comparison.figures import Figures, draw_figures
from lorafair.comparison.findings import Findings
from lorafair.comparison.markdown import to_markdown, to_text
from lorafair.comparison.page import to_html
from lorafair.comparison.tables import Table, accuracy_table, difference_table
from tests.comparison.made_up import made_up

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "link", "img", "br", "wbr"}


class Reader(HTMLParser):
    """Collects the elements of a page, and fails where they are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """With one method that has failed and a domain that is a piece of HTML; its failure has one, too."""
    folder = tmp_path_factory.mktemp("page")
    methods = {"fedit": {}, "lora_fair": {}, "broken": {"method.name": "fedit"}}
    return Findings(made_up(folder, methods, domains=("photo", EVIL), without=["broken"]))


@pytest.fixture(scope="module")
def html(findings: Findings) -> str:
    return to_html(document(findings), draw_figures(findings, ["accuracy", "domains", "differences"], width="page"))


def test_the_page_is_whole_and_needs_nothing_else(html: str) -> None:
    elements = Reader(html).elements
    tags = Counter(tag for tag, _ in elements)
    assert not tags.keys() & {"script", "link", "iframe", "object", "embed", "img", "form", "base"}
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name) or "#").startswith("#") or str(attributes[name]).startswith("data:image/")
    assert not re.search(r"@import|url\((?!#)", html)
    assert tags["svg"] == 3
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_ids_are_there_once_and_what_is_linked_is_there(html: str) -> None:
    elements = Reader(html).elements
    ids = Counter(attributes["id"] for _, attributes in elements if "id" in attributes)
    assert not [name for name, count in ids.items() if count > 1]
    linked = {str(a["href"])[1:] for _, a in elements if str(a.get("href", "")).startswith("#")}
    linked |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert linked <= ids.keys()
    assert len(linked) > 10


def test_names_are_text_and_no_html(html: str, findings: Findings) -> None:
    assert EVIL not in html
    assert unescape(html).count(EVIL) >= 2, "in the table and in a figure"
    assert "every client &lt;returned&gt; NaN" in html
    evil: Any = [EVIL, f'{EVIL}" onload="x']
    parts = [Heading(EVIL, 1), Heading(EVIL), Paragraph(EVIL), Items([(EVIL, EVIL)]), Commands([(EVIL, EVIL)])]
    page = to_html([*parts, Table(EVIL, evil, [evil], frozenset({(0, 1)}))], {})
    assert {tag for tag, _ in Reader(page).elements} & {"script", "b"} == {"b"}
    assert len(re.findall(re.escape(escape(EVIL)), page.replace("<wbr>", ""))) == 14


def test_the_numbers_are_those_of_the_findings(html: str, findings: Findings) -> None:
    cells = Reader(html).cells
    for table in (accuracy_table(findings, "default"), difference_table(findings, "default")):
        for row in table.texts:
            places = [number for number, cell in enumerate(cells) if cell == row[0]]
            assert any(cells[place : place + len(row)] == row for place in places), row
    best = [row for row, column in accuracy_table(findings, "default").best if column == 3]
    (mean,) = {accuracy_table(findings, "default").texts[row][3] for row in best}
    assert f"<strong>{mean}</strong>" in html


def test_question_and_answer_come_first_and_what_failed_is_named(html: str, findings: Findings) -> None:
    text = unescape(re.sub(r"<[^>]+>", "", html[html.index("<body>") :]))
    order = [
        "Comparison out", "How accurate are LoRA-FAIR and broken, compared with FedIT? 3 seeds (0, 1, 2), 4 rounds.",
        "LoRA-FAIR", "WARNING: failed: default / broken-seed0, default / broken-seed1, default / broken-seed2: round 1",
        "Setting default", "How to read this", "Were the methods treated alike?", "the initial adapter and head",
        "model.lora.rank", "default/broken-seed2", "failed", "torch", "lorafair compare ", "made_up.yaml",
    ]  # fmt: skip
    places = [text.index(order[0])]
    for said in order[1:]:
        places.append(text.index(said, places[-1]))
    assert to_text(document(findings, details=False)).index("How accurate are") < 50
    assert "Options of all runs" not in to_text(document(findings, details=False))


@pytest.mark.parametrize(
    ("by_seed", "said"),
    [
        ([1.0, 1.1, 1.2], "More accurate than FedIT: LoRA-FAIR +1.10 points (+0.85 to +1.35)."),
        ([-1.0, -1.1, -1.2], "Less accurate than FedIT: LoRA-FAIR -1.10 points (-1.35 to -0.85)."),
        ([-1.0, 1.0, 0.5], "No difference to FedIT can be told (the interval holds zero): LoRA-FAIR +0.17 points"),
        ([0.0, 0.0, 0.0], "As accurate as FedIT on every seed: LoRA-FAIR."),
        ([2.0], "With one seed there is no interval, and chance may explain each difference: LoRA-FAIR +2.00 points."),
    ],
)
def test_the_answer_says_what_the_interval_says(by_seed: list[float], said: str, tmp_path: Path) -> None:
    comparison = made_up(tmp_path, ["fedit", "lora_fair"], seeds=len(by_seed))
    for run in comparison.final_runs:
        result = json.loads((run.folder / "result.json").read_text())
        result["mean_accuracy"] = 0.5 + (by_seed[run.seed] / 100 if run.method == "lora_fair" else 0)
        (run.folder / "result.json").write_text(json.dumps(result))
    ((setting, answer),) = Findings(comparison).answers()
    assert setting == ""
    assert answer.startswith(said)


def test_a_page_has_no_room_for_everything(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most important figures stay; of the others it is said where they are."""

    class Drawn:
        pass

    figures: dict[str, Any] = {f"default-{kind}": Drawn() for kind in ("accuracy", "loss", "differences", "layers")}
    monkeypatch.setattr(page, "inline_svg", lambda *arguments: f"<svg>{'x' * (page.LARGEST // 3)}</svg>")
    html = to_html(document(findings), figures)
    assert page.LARGEST / 2 < len(html) < 2_000_000
    assert html.count("<svg>") == 2
    assert "This page has no room for it: default-loss.png has it." in html
    assert "default-layers.png has it" in html


def test_markdown_links_the_figures_that_there_are(findings: Findings) -> None:
    text = to_markdown(document(findings), Figures({"default-bias": None}, {}))  # type: ignore[dict-item]
    assert text.count("](default-") == 1
    assert "](default-bias.png)" in text
    assert "\n| LoRA-FAIR | " in text
    assert "```bash\nlorafair compare " in text

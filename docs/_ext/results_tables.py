"""Directives that make the tables and the figure of the results from docs/data, when the site is built."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from lorafair_reference import FromCode
from results_figure import draw
from sphinx.util.docutils import SphinxDirective
from stored_draws import (
    BASELINE,
    DATA,
    Differences,
    Paired,
    Setting,
    Stored,
    contrasts_of,
    corrected,
    differences_of,
    parts_of,
    settings,
    signed,
    stored,
    title_of,
)

LEVEL = 0.05
_GAP = "\N{NO-BREAK SPACE}"
_MEASURES = {  # column -> header, digits
    "accuracy": ("top\N{NON-BREAKING HYPHEN}1", 1),
    "balanced_accuracy": ("balanced", 1),
    "worst_domain": ("worst domain", 1),
    "most_frequent_answer": ("most frequent answer", 1),
    "megabytes": ("MB", 2),
    "bias_left": ("bias left", 3),
}
_COLUMNS = {  # of the map: label -> header
    "lora_fair": "LoRA-FAIR",
    "flex_lora": "FlexLoRA",
    "fedex_lora": "FedEx-LoRA",
    "fair_fold_plain": "coded fold",
    "fedit_class": "class-wise head",
    "fair_fold": "FAIR-fold: both",
}
_DOMAINS = ("serif", "sans", "mono", "hand", "display")
_EARLIER = {
    "feature_skew": "Feature skew, eight rounds, tuned rates",
    "label_skew_tuned": "Label skew, eight rounds, tuned rates",
    "label_skew_001": "Label skew, eight rounds, all at 0.001",
    "label_skew_002": "Label skew, eight rounds, all at 0.002",
    "feature_skew_long": "Feature skew, one long round",
    "mixer_feature_skew": "MLP-Mixer, feature skew, tuned rates",
    "mixer_label_skew": "MLP-Mixer, label skew, tuned rates",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """In Markdown, numbers to the right."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def name(label: str) -> str:
    """A label as aggregation and head."""
    aggregation, by_class = parts_of(label)
    return f"{title_of(aggregation)}{', class-wise head' if by_class else ''}"


def unbroken(difference: Paired | None) -> str:
    """In one line of a cell."""
    return "" if difference is None else str(difference).replace(" ", _GAP)


def marked(difference: Paired, p: float | None) -> str:
    """Bold where the corrected p-value is below the level."""
    return f"**{unbroken(difference)}**" if p is not None and p < LEVEL else unbroken(difference)


def cell(tested: Differences, setting: str, label: str) -> str:
    """A difference in short, empty where there is none; bold where the corrected p-value is below the level."""
    if (setting, label) not in tested:
        return ""
    difference, p = tested[setting, label]
    return f"**{difference.short()}**" if p is not None and p < LEVEL else difference.short()


def probability(value: float | None) -> str:
    """A p-value."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


class Map(FromCode):
    """The settings of the page, a line each: what aggregation adds, what the head adds, and both."""

    def text(self) -> Iterator[str]:
        """A table. Bold is only what stays below the level after correction."""
        rows = []
        for at in [*settings(page="results"), *settings(page="map")]:
            tested, has = differences_of(at.file), at.stored
            rows.append([
                at.title, f"{at.draws}" if at.has_enough else f"{at.draws} of {at.wanted}",
                f"{has.mean(at.setting, BASELINE):.1f}",
                *(cell(tested, at.setting, label) for label in _COLUMNS),
            ])  # fmt: skip
        yield from table(["setting", "draws", "FedIT, %", *_COLUMNS.values()], rows)


class Grid(FromCode):
    """One comparison: a line a method, a column a setting, points above FedIT."""

    required_arguments, optional_arguments = 1, 0

    def text(self) -> Iterator[str]:
        """A table, after the line of FedIT itself and with the fewest draws of a setting."""
        shown = settings(self.arguments[0])
        tested = differences_of(self.arguments[0])
        labels = dict.fromkeys(label for at in shown for label in at.stored.methods(at.setting) if label != BASELINE)
        rows = [["FedIT, %", *(f"{at.stored.mean(at.setting, BASELINE):.1f}" for at in shown)]]
        rows += [[name(label), *(cell(tested, at.setting, label) for at in shown)] for label in labels]
        rows.append(["draws", *(str(at.draws) for at in shown)])
        yield from table(["points above FedIT", *(at.title for at in shown)], rows)


class Tables(FromCode):
    """Of every setting: all methods, and what each part adds."""

    def text(self) -> Iterator[str]:
        """A section a setting."""
        for at in settings():
            yield f"## {at.title}\n\n{at.about}. {at.count_text()[0].upper()}{at.count_text()[1:]}.\n"
            yield f"`{at.command}`\n"
            yield from self.all_methods(at)
            yield from self.by_part(at)

    def all_methods(self, at: Setting) -> Iterator[str]:
        """A line a method."""
        tested, has = differences_of(at.file), at.stored
        labels = has.methods(at.setting)
        unequal = len({len(has.lines[at.setting, label]) for label in labels}) > 1
        measures = [m for m in _MEASURES if any(has.mean(at.setting, label, m) is not None for label in labels)]
        rows = []
        for label in labels:
            aggregation, by_class = parts_of(label)
            means = {measure: has.mean(at.setting, label, measure) for measure in measures}
            difference, p = tested.get((at.setting, label), (None, None))
            rows.append([
                title_of(aggregation), "class-wise" if by_class else "plain",
                *("–" if v is None else f"{v:.{_MEASURES[m][1]}f}" for m, v in means.items()),
                "" if difference is None else marked(difference, p), "" if difference is None else probability(p),
                *([str(len(has.lines[at.setting, label]))] if unequal else []),
            ])  # fmt: skip
        headers = [_MEASURES[measure][0] for measure in measures]
        yield from table(
            ["aggregation", "head", *headers, "minus FedIT", "p (Holm)", *(["draws"] if unequal else [])], rows
        )
        if (largest := has.mean(at.setting, BASELINE, "majority_class")) is not None:
            yield f"Always answering the largest class of a domain: {largest:.1f} %.\n"

    def by_part(self, at: Setting) -> Iterator[str]:
        """What the aggregation of A and B adds with either head, and what the head adds to it."""
        contrasts = contrasts_of(at)
        tested = dict(zip(contrasts, corrected(contrasts.values()), strict=True))
        rows = []
        for aggregation in dict.fromkeys(aggregation for aggregation, _ in contrasts):
            row = [title_of(aggregation)]
            for part in ("plain", "class", "head"):
                difference = contrasts.get((aggregation, part))
                p = tested.get((aggregation, part))
                row += ["", ""] if difference is None else [marked(difference, p), probability(p)]
            rows.append(row)
        yield "What each part adds, in points:\n"
        yield from table(
            ["aggregation", "minus FedIT, plain heads", "p (Holm)",
             "minus FedIT, class-wise heads", "p (Holm)", "class-wise minus plain head", "p (Holm)"],
            rows,
        )  # fmt: skip


class Earlier(FromCode):
    """The tables of the first measurements."""

    def text(self) -> Iterator[str]:
        """A section a setting, and the map of settings."""
        means, differences = _rows("earlier_means.csv"), stored("earlier_differences.csv")
        for setting, title in _EARLIER.items():
            seeds = {row["seeds"] for row in means if row["setting"] == setting}
            yield f"### {title}\n\n{' to '.join(sorted(seeds))} seeds.\n"
            rows = [_earlier_row(differences, row) for row in means if row["setting"] == setting]
            header = ["method", *_DOMAINS, "mean", "minus FedIT", "MB", "rate", "bias", "bias left"]
            yield from table(header, rows)
        yield "### Ten settings, three seeds each\n"
        rows = [
            [row["setting"], row["bias"], _title(row["method"]),
             f"{signed(float(row['points_above_fedit']))} "
             f"({signed(float(row['interval_low']))} to {signed(float(row['interval_high']))})"]
            for row in _rows("earlier_map.csv")
        ]  # fmt: skip
        yield from table(["setting", "bias of FedIT", "method", "minus FedIT"], rows)


def _earlier_row(differences: Stored, row: dict[str, str]) -> list[str]:
    place = row["setting"], row["method"]
    paired = Paired(differences.values(*place, "points_above_fedit")) if place in differences.lines else None
    return [
        _title(row["method"]), *(row[domain] for domain in _DOMAINS), f"{row['mean']}{_GAP}±{_GAP}{row['mean_sd']}",
        unbroken(paired), row["megabytes"], row["learning_rate"] or "–", row["bias"] or "–", row["bias_left"] or "–",
    ]  # fmt: skip


def _title(label: str) -> str:
    plain = title_of(label)
    return f"`{label}`" if plain == label else plain


def _rows(file: str) -> list[dict[str, str]]:
    with (DATA / file).open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


class Figure(SphinxDirective):
    """Differences to FedIT in the settings of the summary, plain and class-wise head side by side."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Sphinx calls it."""
        drawn, shown = io.StringIO(), settings(page="results")
        draw(shown).savefig(drawn, format="svg", metadata={"Date": None})
        svg = drawn.getvalue()
        text = "; ".join(
            f"{at.title}: " + ", ".join(
                f"{name(label)} {difference}" for (setting, label), (difference, _) in differences_of(at.file).items()
                if setting == at.setting
            )
            for at in shown
        )  # fmt: skip
        label = f'role="img" aria-label="Points above FedIT. {text}"'
        figure = f'<div class="lf-results" {label}>{svg[svg.index("<svg") :]}</div>'
        return [nodes.raw("", figure, format="html")]


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    for word, directive in {
        "map": Map, "grid": Grid, "tables": Tables, "earlier": Earlier, "figure": Figure,
    }.items():  # fmt: skip
        app.add_directive(f"lorafair-results-{word}", directive)
    return {"parallel_read_safe": True}

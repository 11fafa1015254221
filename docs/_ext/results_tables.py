"""Directives that make the tables, sentences and the figure of the results from docs/data, when the site is built."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from lorafair_reference import FromCode
from sphinx.util.docutils import SphinxDirective
from stored_draws import (
    BASELINE,
    DATA,
    Paired,
    Setting,
    Stored,
    corrected,
    pairs_of,
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
    return f"{title_of(aggregation)}, {'class-wise' if by_class else 'plain'} head"


def unbroken(difference: Paired | None) -> str:
    """In one line of a cell."""
    return "" if difference is None else str(difference).replace(" ", _GAP)


def marked(difference: Paired, p: float | None) -> str:
    """Bold where the corrected p-value is below the level."""
    return f"**{unbroken(difference)}**" if p is not None and p < LEVEL else unbroken(difference)


def probability(value: float | None) -> str:
    """A p-value."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def differences_of(file: str) -> dict[tuple[str, str], tuple[Paired, float | None]]:
    """(setting, label) -> its difference to FedIT with the plain head and its p-value, corrected over the file."""
    found = {
        (at.setting, label): at.stored.difference(at.setting, label, BASELINE)
        for at in settings(file)
        for label in at.stored.methods(at.setting)
        if label != BASELINE
    }
    return dict(zip(found, zip(found.values(), corrected(found.values()), strict=True), strict=True))


def contrasts_of(at: Setting) -> dict[tuple[str, str], Paired]:
    """(aggregation, part) -> what the part alone adds: A and B's aggregation under either head, or the head."""
    found: dict[tuple[str, str], Paired] = {}
    pairs = pairs_of(at.stored.methods(at.setting))
    references = pairs[BASELINE]
    for aggregation, (plain, by_class) in pairs.items():
        if aggregation != BASELINE:
            for part, label, reference in (("plain", plain, references[0]), ("class", by_class, references[1])):
                if label is not None and reference is not None:
                    found[aggregation, part] = at.stored.difference(at.setting, label, reference)
        if plain is not None and by_class is not None:
            found[aggregation, "head"] = at.stored.difference(at.setting, by_class, plain)
    return found


class Counts(FromCode):
    """How many draws there are of each setting, and how many are wanted."""

    def text(self) -> Iterator[str]:
        """A table."""
        rows = [
            [at.title, str(at.draws), str(at.wanted), "enough" if at.has_enough else "**few: read with care**"]
            for at in settings()
        ]
        yield from table(["setting", "draws", "wanted", ""], rows)


class Findings(FromCode):
    """The settings of the summary: points above FedIT, the plain and the class-wise head side by side."""

    def text(self) -> Iterator[str]:
        """A small table a setting. Bold is only what stays below the level after correction."""
        for at in settings(page="results"):
            has, tested = at.stored, differences_of(at.file)
            yield f"**{at.title}.** {at.about}; {at.count_text()}.\n"
            rows, told = [], 0
            for aggregation, labels in pairs_of(has.methods(at.setting)).items():
                megabytes = has.mean(at.setting, next(filter(None, labels)), "megabytes")
                row = [title_of(aggregation), f"{megabytes:.2f}"]
                for label in labels:
                    difference, p = tested.get((at.setting, label or ""), (None, None))
                    told += p is not None and p < LEVEL
                    row.append("0" if label == BASELINE else "" if difference is None else marked(difference, p))
                rows.append(row)
            header = ["aggregation of A and B", "MB", "plain mean of the head", "class-wise mean of the head"]
            yield from table(header, rows)
            if told:
                number = sum(setting == at.setting for setting, _ in tested)
                yield f"Bold: {told} of {number} differences, with p (Holm) below {LEVEL}.\n"
            else:
                yield f"**With these draws no difference has a p (Holm) below {LEVEL}.**\n"


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


def draw(shown: Sequence[Setting]) -> Any:
    """A panel a setting: mean and interval of each method, both heads of an aggregation in one line."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    from lorafair.comparison.canvas import paper_settings

    labels = (label for at in shown for label in at.stored.methods(at.setting))
    aggregations = list(pairs_of(labels))[::-1]
    with paper_settings():
        matplotlib.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "lorafair"}  # a browser may not have the font
        rows = math.ceil(len(shown) / 2)
        drawing = Drawing(figsize=(7.4, 2.7 * rows + 0.3), layout="constrained")
        panels = drawing.subplots(rows, min(2, len(shown)), sharey=True, squeeze=False).ravel()
        for panel, at in zip(panels, shown, strict=False):
            tested = differences_of(at.file).items()
            of_setting = [(*parts_of(label), d) for (name, label), (d, _) in tested if name == at.setting]
            for by_class, color, marker in ((False, "#3a8fd0", "o"), (True, "#e08a00", "D")):
                points = [(aggregations.index(a) + 0.14 - 0.28 * c, d) for a, c, d in of_setting if c == by_class]
                for y, difference in points:
                    if difference.interval is not None:
                        panel.plot(difference.interval, (y, y), color=color)
                panel.plot([d.mean for _, d in points], [y for y, _ in points], marker, color=color, markersize=4.5,
                           label=f"{'class-wise' if by_class else 'plain'} mean of the head")  # fmt: skip
            _bounded(panel, [difference.mean for _, _, difference in of_setting])
            panel.axvline(0, color="#4a525c", linewidth=0.8)
            panel.set(title=f"{at.title}\n({at.count_text()})", xlabel="points above FedIT with the plain head")
            panel.spines[["top", "right"]].set_visible(False)
        for panel in panels[len(shown) :]:
            panel.set_visible(False)
        panels[0].set_ylim(-0.5, len(aggregations) - 0.5)
        panels[0].set_yticks(range(len(aggregations)), map(title_of, aggregations))
        drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return drawing


def _bounded(panel: Any, means: Sequence[float]) -> None:
    """Intervals of two draws are many times as wide as all else: they end at the edge of the panel."""
    (low, high), room = panel.get_xlim(), max(2.0, 1.2 * max(map(abs, means)))
    panel.set_xlim(max(low, min(0.0, *means) - room), min(high, max(0.0, *means) + room))


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    for word, directive in {
        "counts": Counts, "findings": Findings, "tables": Tables, "earlier": Earlier, "figure": Figure,
    }.items():  # fmt: skip
        app.add_directive(f"lorafair-results-{word}", directive)
    return {"parallel_read_safe": True}

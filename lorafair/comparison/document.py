"""What a report says, part by part, for each way of writing it down: on the console, as Markdown, as a page.

A part is a heading, a paragraph, a list, a table, a figure or a command.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorafair.comparison import left_behind, tables
from lorafair.comparison.evidence import components_table, reading_text, significance_table
from lorafair.comparison.fairness import start_table, start_text
from lorafair.comparison.figures import file_stem, kinds_of, of_kind
from lorafair.comparison.findings import Findings
from lorafair.comparison.pricing import pricing_table
from lorafair.comparison.tables import Cell, Table, seconds_of
from lorafair.config.identity import flatten, identity_settings
from lorafair.config.schema import Config
from lorafair.console import format_count, format_value
from lorafair.reporting.run_dir import CONFIG_FILE


@dataclass(frozen=True)
class Heading:
    """The title of the report (level 1) or of a section (level 2)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Some sentences; a warning stands out."""

    text: str
    kind: Literal["text", "warning"] = "text"


@dataclass(frozen=True)
class Items:
    """A list of terms and what is said about each; the term may be empty."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class FigurePart:
    """A figure by the name that `figures.draw_figures` gives it."""

    name: str
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines of shell, each with what it does."""

    lines: Sequence[tuple[str, str]]


Part = Heading | Paragraph | Items | Table | FigurePart | Commands


def document(findings: Findings, *, details: bool = True) -> Iterator[Part]:
    """All parts; without `details` those for a console, which shows what fits on a screen and names the report."""
    yield Heading(f"Comparison {findings.comparison.folder.name}", 1)
    yield Paragraph(findings.question())
    yield Items(findings.answers())
    for text in findings.warnings():
        yield Paragraph(text, "warning" if text.startswith("WARNING") else "text")
    begun = start_text(findings)
    if begun.startswith("WARNING"):
        yield Paragraph(begun, "warning")
    for setting in findings.settings():
        yield from _of_setting(findings, setting, details=details)
    yield from _of_all_settings(findings, figures=details)
    if not details:
        yield Paragraph(findings.interval_text())
        return
    yield Heading("How to read this")
    if not begun.startswith("WARNING"):
        yield Paragraph(begun)
    texts = (
        findings.interval_text(),
        reading_text(findings),
        findings.tuning_text(),
        left_behind.reading_text(findings),
    )
    yield from map(Paragraph, filter(None, texts))
    if any("privacy" in run.result for runs in findings.finished.values() for run in runs):
        yield Paragraph("ε: the largest of a method's runs, at privacy.delta; ∞ without privacy.")
    yield Paragraph(
        "MB: what all clients would send and receive over all rounds (float32 adapter and head). Seconds: the "
        "rounds, without start and loading; comparable where the runs had the machine to themselves. Training that was "
        "taken over from another run counts with the time that it took there."
    )
    yield from _details(findings)


_SHORT = (
    tables.accuracy_table,
    left_behind.balance_table,
    left_behind.head_table,
    tables.per_client_table,
    tables.difference_table,
)
_LONG = (
    tables.accuracy_table,
    left_behind.balance_table,
    left_behind.spread_table,
    left_behind.recall_table,
    left_behind.head_table,
    tables.per_client_table,
    tables.difference_table,
    significance_table,
    components_table,
    tables.bias_table,
)


def _of_setting(findings: Findings, setting: str, *, details: bool) -> Iterator[Part]:
    yield Heading(f"Setting {setting}")
    if changed := findings.comparison.settings[setting]:
        yield Paragraph(f"Options: {_options(changed)}.")
    for make in _LONG if details else _SHORT:
        table = make(findings, setting)
        if table.rows:
            yield table
    for pricing in findings.pricings:
        if (table := pricing_table(findings, setting, pricing)).rows:
            yield table
    for kind in kinds_of(findings) if details else ():
        if of_kind(kind).of_setting:
            yield FigurePart(file_stem(setting, kind), of_kind(kind).caption)


def _of_all_settings(findings: Findings, *, figures: bool) -> Iterator[Part]:
    overall, by_setting = tables.overall_table(findings), tables.map_table(findings)
    if len(findings.settings()) > 1 and overall.rows:
        yield Heading("All settings")
        yield overall
        if by_setting.rows:
            yield by_setting
        for kind in kinds_of(findings) if figures else ():
            if not of_kind(kind).of_setting:
                yield FigurePart(kind, of_kind(kind).caption)


def _details(findings: Findings) -> Iterator[Part]:
    comparison = findings.comparison
    checks = start_table(findings)
    if checks.rows:
        yield Heading("Were the methods treated alike?")
        yield checks
    yield Heading("Settings")
    yield Table(
        "What sets each method apart",
        ["method", "options"],
        [[findings.title(label), _options(options)] for label, options in comparison.methods.items()],
    )
    common = _common_options(comparison.configs, [*comparison.methods.values(), *comparison.settings.values()])
    if common:
        yield Table("Options of all runs, where they are not lorafair's defaults", ["option", "value"], common)
    yield Heading("Runs")
    yield _table_of_runs(findings)
    yield _table_of_versions(findings)
    yield Heading("How to repeat it")
    given = shlex.join(comparison.arguments) or "FILE.yaml"
    yield Commands(
        [
            (f"lorafair compare {given}", "do all runs, those of them that are not done yet, and write this report"),
            (f"lorafair compare {given} --report", "write this report again"),
            (f"lorafair plot {shlex.quote(str(comparison.folder))}", "figures and tables for a paper"),
            (f"lorafair run RUN/{CONFIG_FILE} run_dir=elsewhere", "repeat one run"),
        ]
    )


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={format_value(value)}" for key, value in options.items())


def _common_options(
    configs: Mapping[tuple[str, str, int], Config], varied: Sequence[Mapping[str, Any]]
) -> list[list[Cell]]:
    """Option and value of what all runs have and what is no default."""
    flat = [flatten(identity_settings(config)) for config in configs.values()]
    defaults = flatten(identity_settings(Config()))
    names = {key for options in varied for key in options} | {"seed", "method.name"}
    alike = {
        key: value for key, value in flat[0].items()
        if key not in names and all(other.get(key) == value for other in flat) and defaults.get(key) != value
    }  # fmt: skip
    return [[key, format_value(value)] for key, value in alike.items()]


def _table_of_runs(findings: Findings) -> Table:
    done = {run.run.index: run for runs in findings.finished.values() for run in runs}
    rows: list[list[Cell]] = []
    for run in findings.comparison.final_runs:
        found = done.get(run.index)
        accuracy = f"{found.accuracy:.2f}" if found else "–"
        seconds = f"{seconds_of(found.result):,.1f}" if found else "–"
        folder = str(run.folder.relative_to(findings.comparison.folder))
        rows.append(
            [
                folder,
                findings.title(run.method),
                run.setting,
                str(run.seed),
                findings.states[run.index],
                accuracy,
                seconds,
            ]
        )
    count = format_count(len(rows), "run")
    caption = f"{count} in {findings.comparison.folder}; accuracy in %, mean over domains"
    return Table(caption, ["folder", "method", "setting", "seed", "state", "accuracy", "seconds"], rows)


def _table_of_versions(findings: Findings) -> Table:
    versions: dict[str, dict[str, None]] = {}
    for runs in findings.finished.values():
        for run in runs:
            for package, version in run.result["versions"].items():
                versions.setdefault(package, {})[str(version)] = None
    rows = [[package, ", ".join(several)] for package, several in versions.items()]
    return Table("Made with", ["package", "version"], rows)

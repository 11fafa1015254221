"""The report of a comparison: Markdown, a CSV file, plots, and all of it in TensorBoard. One process only."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lorafair import third_party
from lorafair.comparison.findings import PER_CLIENT, Findings
from lorafair.comparison.listing import options_text
from lorafair.comparison.plan import REPORT, Comparison
from lorafair.comparison.plots import draw_plots
from lorafair.console import format_count, log, markdown_table, table
from lorafair.errors import LorafairError
from lorafair.files.writing import naming, replacing, write_atomically

REPORT_FILE, CSV_FILE = "report.md", "results.csv"
Table = tuple[list[str], list[list[str]]]  # header and rows


def write_report(comparison: Comparison) -> None:
    """Write report.md, results.csv and plots into the comparison's folder and print the tables.

    Raises LorafairError if no final run is done, ConfigError if a folder holds another run.
    """
    findings, folder = Findings(comparison), comparison.folder
    if not findings.finished:
        states = [*findings.failed, *findings.missing]
        raise LorafairError(f"no run of {folder} is done yet, so there is nothing to report: {states[0]}")
    plots = draw_plots(findings)
    write_atomically(folder / REPORT_FILE, _Document(findings, markdown_table, plots).text() + "\n")
    _write_csv(findings, folder / CSV_FILE)
    _show_in_tensorboard(folder, plots)
    log.info(f"\n{_Document(findings, table, {}).text()}\n")
    log.info(f"report:   {folder / REPORT_FILE}, {folder / CSV_FILE}")
    log.info(f"plots:    {', '.join(str(path) for path in plots.values())}")
    # With more than forty runs TensorBoard shows none of them until they are ticked.
    log.info(f"curves:   tensorboard --logdir {folder}, plots alone: {folder / REPORT}")


@dataclass(frozen=True)
class _Document:
    """The report as text: paragraphs, headings, tables as `render` makes them, plots as Markdown links."""

    findings: Findings
    render: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
    plots: Mapping[str, Path]  # title -> file; none on the console

    def text(self) -> str:
        """All of it, with an empty line between two parts."""
        parts = [self._heading(), *self.findings.warnings()]
        for setting in self.findings.settings():
            parts += self._of_setting(setting)
        parts += [*self._of_all_settings(), *self._how_to_read()]
        return "\n\n".join(parts)

    def _heading(self) -> str:
        findings, comparison = self.findings, self.findings.comparison
        first = next(iter(findings.finished.values()))[0].result
        rounds = sorted({f.result["rounds"] for runs in findings.finished.values() for f in runs})
        *others, last = rounds
        rounds_text = "".join(f"{r} or " for r in others) + format_count(last, "round")
        return (
            f"{self._title(f'Comparison {comparison.folder.name}', '#')}\n\n"
            f"{format_count(len(comparison.methods), 'method')}, {format_count(len(comparison.seeds), 'seed')} "
            f"({', '.join(map(str, comparison.seeds))}), {rounds_text}. "
            f"Images: {first.get('data', {}).get('description', '')}.\n"
            f"Made with lorafair {first['versions']['lorafair']}, torch {first['versions'].get('torch', '?')}."
        )

    def _of_setting(self, setting: str) -> Iterator[str]:
        findings, comparison = self.findings, self.findings.comparison
        yield self._title(f"Setting {setting}")
        if changed := comparison.settings[setting]:
            yield f"Options: {', '.join(f'{key}={value}' for key, value in changed.items())}."
        for caption, found in (
            ("Top-1 accuracy in %, mean ± standard deviation over seeds:", findings.accuracy_table(setting)),
            (
                "Methods whose clients keep a model each (above: the mean over all clients and domains):",
                findings.per_client_table(setting),
            ),
            (f"Mean accuracy minus that of {comparison.baseline}, in points:", findings.difference_table(setting)),
            (
                "Relative aggregation bias ‖ΔW − X‖/‖ΔW‖ of X = B̄Ā (before) and of what the method leaves (after):",
                findings.bias_table(setting),
            ),
        ):
            yield from self._table(caption, found)
        yield from self._pictures(f"{setting}-")

    def _of_all_settings(self) -> Iterator[str]:
        findings, baseline = self.findings, self.findings.comparison.baseline
        overall = findings.overall_table()
        if len(findings.settings()) > 1 and overall[1]:
            yield self._title("All settings")
            yield from self._table(
                f"Mean accuracy minus that of {baseline}, in points, over all pairs of a setting and a seed (the "
                "interval takes them for independent; settings of one seed share their images):",
                overall,
            )
            yield from self._table(
                f"By setting, the mean over seeds and its interval; settings by the mean bias of {baseline}:",
                findings.map_table(),
            )
        yield from self._pictures("map.png")

    def _how_to_read(self) -> Iterator[str]:
        findings = self.findings
        yield self._title("How to read this")
        yield from filter(None, (findings.start_text(), findings.interval_text(), findings.tuning_text()))
        yield (
            "MB: what all clients would send and receive over all rounds (float32 adapter and head). Seconds: the "
            "rounds, without start and loading; comparable where the runs had the machine to themselves."
        )

    def _title(self, text: str, marks: str = "##") -> str:
        return f"{marks} {text}" if self.plots else text

    def _table(self, caption: str, found: Table) -> Iterator[str]:
        """A table with its caption; nothing where it has no rows."""
        header, rows = found
        if rows:
            yield caption
            yield self.render(header, rows)

    def _pictures(self, begin: str) -> Iterator[str]:
        """Links to the plots whose file names begin so."""
        for title, path in self.plots.items():
            if path.name.startswith(begin):
                yield f"![{title}]({path.name})"


def _write_csv(findings: Findings, file: Path) -> None:
    """One line for each run and domain, and for its mean; accuracies in %."""
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["setting", "method", "seed", "domain", "accuracy", "rounds", "tuned", "bytes", "seconds"])
        for (setting, method), runs in findings.finished.items():
            for f in runs:
                values = {**f.result["accuracy"], "(mean)": f.result["mean_accuracy"]}
                values |= {f"({key.removeprefix('accuracy_')})": f.result[key] for key in PER_CLIENT if key in f.result}
                totals = f.result.get("totals", {})
                cost = [int(totals.get("bytes", 0)), f"{totals.get('seconds', 0):.3f}"]
                for domain, value in values.items():
                    run = [setting, method, f.run.seed, domain, f"{100 * value:.4f}", f.result["rounds"]]
                    writer.writerow([*run, options_text(f.chosen), *cost])


def _show_in_tensorboard(folder: Path, plots: Mapping[str, Path]) -> None:
    """The plots and the text of the report as one event file; an earlier one goes."""
    events = folder / REPORT
    for earlier in events.glob("events.out.tfevents.*"):
        earlier.unlink()
    with naming(events), third_party.one_error_of_events():
        writer = SummaryWriter(str(events))
        for title, path in plots.items():
            with Image.open(path) as picture:
                writer.add_image(title, np.asarray(picture.convert("RGB")), dataformats="HWC")
        writer.add_text("report", (folder / REPORT_FILE).read_text(encoding="utf-8"))
        writer.flush()
        writer.close()

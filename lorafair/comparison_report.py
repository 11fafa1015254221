"""The report of a comparison: Markdown, a CSV file, plots, and all of it in TensorBoard. One process only."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lorafair.comparison import REPORT, Comparison, options_text
from lorafair.comparison_findings import PER_CLIENT, Findings
from lorafair.comparison_plots import draw_plots
from lorafair.errors import LorafairError
from lorafair.tables import markdown_table, table
from lorafair.tracking import say


def write_report(comparison: Comparison) -> None:
    """Write report.md, results.csv and plots into the comparison's folder and print the tables.

    Raises LorafairError if no final run is done, ConfigError if a folder holds another run.
    """
    findings = Findings(comparison)
    if not findings.finished:
        states = [*findings.failed, *findings.missing]
        raise LorafairError(f"no run of {comparison.folder} is done yet, so there is nothing to report: {states[0]}")
    plots = draw_plots(findings)
    (comparison.folder / "report.md").write_text("\n".join(_lines(findings, markdown_table, plots)) + "\n")
    _write_csv(findings, comparison.folder / "results.csv")
    _show_in_tensorboard(comparison.folder, plots)
    say("")
    say("\n".join(_lines(findings, table, {})))
    say("")
    say(f"report:   {comparison.folder / 'report.md'}, {comparison.folder / 'results.csv'}")
    say(f"plots:    {', '.join(str(path) for path in plots.values())}")
    # With more than forty runs TensorBoard shows none of them until they are ticked.
    say(f"curves:   tensorboard --logdir {comparison.folder}, plots alone: {comparison.folder / REPORT}")


def _lines(
    findings: Findings,
    render: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
    plots: Mapping[str, Path],
) -> Iterator[str]:
    """The report line by line; tables as `render` makes them, plots as Markdown links (title -> file)."""
    comparison = findings.comparison
    markdown = bool(plots)
    seeds = ", ".join(map(str, comparison.seeds))
    first = next(iter(findings.finished.values()))[0].result
    rounds = sorted({f.result["rounds"] for runs in findings.finished.values() for f in runs})
    heading = "# " if markdown else ""
    yield f"{heading}Comparison {comparison.folder.name}"
    yield ""
    source = first.get("data", {}).get("description", "")
    yield f"{len(comparison.methods)} methods, seeds {seeds}, {' or '.join(map(str, rounds))} rounds. Images: {source}."
    yield f"Made with lorafair {first['versions']['lorafair']}, torch {first['versions'].get('torch', '?')}."
    for line in findings.warnings():
        yield ""
        yield line
    for setting in findings.settings():
        yield ""
        yield f"{'## ' if markdown else ''}Setting {setting}"
        changed = comparison.settings[setting]
        if changed:
            yield ""
            yield f"Options: {', '.join(f'{key}={value}' for key, value in changed.items())}."
        yield ""
        yield "Top-1 accuracy in %, mean ± standard deviation over seeds:"
        yield ""
        yield render(*findings.accuracy_table(setting))
        header, rows = findings.per_client_table(setting)
        if rows:
            yield ""
            yield "Methods whose clients keep a model each (above: the mean over all clients and domains):"
            yield ""
            yield render(header, rows)
        header, rows = findings.difference_table(setting)
        if rows:
            yield ""
            yield f"Mean accuracy minus that of {comparison.baseline}, in points:"
            yield ""
            yield render(header, rows)
        header, rows = findings.bias_table(setting)
        if rows:
            yield ""
            yield "Relative aggregation bias ‖ΔW − X‖/‖ΔW‖ of X = B̄Ā (before) and of what the method leaves (after):"
            yield ""
            yield render(header, rows)
        for title, path in plots.items():
            if path.name.startswith(f"{setting}-"):
                yield ""
                yield f"![{title}]({path.name})"
    header, rows = findings.overall_table()
    if len(findings.settings()) > 1 and rows:
        yield ""
        yield f"{'## ' if markdown else ''}All settings"
        yield ""
        yield (
            f"Mean accuracy minus that of {comparison.baseline}, in points, over all pairs of a setting and a seed (the"
            " interval takes them for independent; settings of one seed share their images):"
        )
        yield ""
        yield render(header, rows)
        yield ""
        yield f"By setting, the mean over seeds and its interval; settings by the mean bias of {comparison.baseline}:"
        yield ""
        yield render(*findings.map_table())
    for title, path in plots.items():
        if path.name == "map.png":
            yield ""
            yield f"![{title}]({path.name})"
    yield ""
    yield f"{'## ' if markdown else ''}How to read this"
    for text in (findings.start_text(), findings.interval_text(), findings.tuning_text()):
        if text:
            yield ""
            yield text
    yield ""
    yield (
        "MB: what all clients would send and receive over all rounds (float32 adapter and head). Seconds: the rounds, "
        "without start and loading; comparable where the runs had the machine to themselves."
    )


def _write_csv(findings: Findings, file: Path) -> None:
    """One line for each run and domain, and for its mean; accuracies in %."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["setting", "method", "seed", "domain", "accuracy", "rounds", "tuned", "bytes", "seconds"])
        for (setting, method), runs in findings.finished.items():
            for f in runs:
                values = {**f.result["accuracy"], "(mean)": f.result["mean_accuracy"]}
                values |= {f"({key.removeprefix('accuracy_')})": f.result[key] for key in PER_CLIENT if key in f.result}
                totals = f.result.get("totals", {})
                for domain, value in values.items():
                    writer.writerow(
                        [setting, method, f.run.seed, domain, f"{100 * value:.4f}", f.result["rounds"],
                         options_text(f.chosen), int(totals.get("bytes", 0)), f"{totals.get('seconds', 0):.3f}"]
                    )  # fmt: skip
    os.replace(partial, file)


def _show_in_tensorboard(folder: Path, plots: Mapping[str, Path]) -> None:
    """The plots and the text of the report as one event file; an earlier one goes."""
    events = folder / REPORT
    for earlier in events.glob("events.out.tfevents.*"):
        earlier.unlink()
    writer = SummaryWriter(str(events))
    for title, path in plots.items():
        with Image.open(path) as picture:
            writer.add_image(title, np.asarray(picture.convert("RGB")), dataformats="HWC")
    writer.add_text("report", (folder / "report.md").read_text())
    writer.close()

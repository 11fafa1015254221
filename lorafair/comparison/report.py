"""The report of a comparison: a page, Markdown, tables, figures, and all of it in TensorBoard. One process only."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lorafair import third_party
from lorafair.comparison.document import document
from lorafair.comparison.figures import KINDS, PRICED_KINDS, Figures, draw_figures, file_stem
from lorafair.comparison.findings import Findings
from lorafair.comparison.left_behind import mean_of_domains
from lorafair.comparison.listing import options_text
from lorafair.comparison.markdown import to_markdown, to_text
from lorafair.comparison.page import to_html
from lorafair.comparison.plan import REPORT, Comparison
from lorafair.comparison.record import write_record
from lorafair.comparison.table_files import write_tables
from lorafair.comparison.tables import PER_CLIENT, seconds_of
from lorafair.console import log
from lorafair.errors import LorafairError
from lorafair.files.writing import naming, replacing, write_atomically

_BESIDE = ("balanced_accuracy", "macro_f1", "calibration_error", "most_frequent_answer", "majority_class")
_SPREAD = ("worst_decile", "best_decile", "standard_deviation")
_OF_RUNS = ("worst_domain", *(f"clients_{kind}" for kind in _SPREAD))  # in the line of a run's mean
REPORT_FILE, PAGE_FILE, CSV_FILE = "report.md", "report.html", "results.csv"


def write_report(comparison: Comparison) -> None:
    """Write report.html, report.md, tables and figures into the comparison's folder and print the tables.

    Raises LorafairError if no final run is done, ConfigError if a folder holds another run.
    """
    findings, folder = Findings(comparison), comparison.folder
    if not findings.finished:
        states = [*(f"{names[0]}: {reason}" for reason, names in findings.failed.items()), *findings.missing]
        raise LorafairError(f"no run of {folder} is done yet, so there is nothing to report: {states[0]}")
    write_record(comparison)
    figures = draw_figures(findings, width="page")
    pictures = _save_pictures(comparison, figures)
    write_atomically(folder / REPORT_FILE, to_markdown(document(findings), figures))
    write_atomically(folder / PAGE_FILE, to_html(document(findings), figures))
    write_results(findings, folder / CSV_FILE)
    paths = write_tables(findings, folder)
    _show_in_tensorboard(folder, pictures)
    log.info(f"\n{to_text(document(findings, details=False))}\n")
    log.info(f"report:   {folder / PAGE_FILE} (all tables, figures and how to read them), {folder / REPORT_FILE}")
    log.info(f"tables:   {folder / CSV_FILE} and {len(paths)} of results, clients and differences, as .tex and .csv")
    traffic = next((path for path in pictures.values() if path.stem.endswith("traffic")), folder)
    log.info(f"figures:  {len(pictures)} as .png, accuracy by traffic: {traffic}; as PDF: lorafair plot {folder}")
    # With more than forty runs TensorBoard shows none of them until they are ticked.
    log.info(f"curves:   tensorboard --logdir {folder}, figures alone: {folder / REPORT}")


def _save_pictures(comparison: Comparison, figures: Figures) -> dict[str, Path]:
    """Every figure as a PNG, by its name; those of an earlier report that there are no longer are removed."""
    for kind, known in (KINDS | PRICED_KINDS).items():
        for setting in comparison.settings if known.of_setting else [""]:
            (comparison.folder / f"{file_stem(setting, kind)}.png").unlink(missing_ok=True)
    return dict(zip(figures, figures.save(comparison.folder, ("png",)), strict=True))


def write_results(findings: Findings, file: Path) -> None:
    """One line for each run and domain, and for its mean; accuracies, and all that is a fraction, in %."""
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        header = ["setting", "method", "seed", "domain", "accuracy", "rounds", "tuned", "bytes", "seconds"]
        draws = findings.draws
        designed = ["partition_seed", "training_seed"] if draws and draws.is_design else []
        writer.writerow([*header, *_BESIDE, *_OF_RUNS, *designed])
        for (setting, method), runs in findings.finished.items():
            for f in runs:
                values = {**f.result["accuracy"], "(mean)": f.result["mean_accuracy"]}
                values |= {f"({key.removeprefix('accuracy_')})": f.result[key] for key in PER_CLIENT if key in f.result}
                totals = f.result.get("totals", {})
                cost = [int(totals.get("bytes", 0)), f"{seconds_of(f.result):.3f}"]
                beside = {
                    domain: [of.get(kind) for kind in _BESIDE] for domain, of in f.result.get("domains", {}).items()
                }
                beside["(mean)"] = [mean_of_domains(kind)(f.result) for kind in _BESIDE]
                spread = [f.result.get("accuracy_worst_domain")]
                spread += [f.result.get("clients", {}).get(kind) for kind in _SPREAD]
                for domain, value in values.items():
                    run = [setting, method, f.run.seed, domain, f"{100 * value:.4f}", f.result["rounds"]]
                    more = beside.get(domain, [None] * len(_BESIDE))
                    more = [*more, *(spread if domain == "(mean)" else [None] * len(spread))]
                    percent = ["" if v is None else f"{100 * v:.4f}" for v in more]  # not there in older results
                    writer.writerow(
                        [*run, options_text(f.chosen), *cost, *percent]
                        + ([*map(str, draws.seeds(f.run.seed))] if draws and draws.is_design else [])
                    )


def _show_in_tensorboard(folder: Path, pictures: Mapping[str, Path]) -> None:
    """The figures and the text of the report as one event file; an earlier one goes."""
    events = folder / REPORT
    for earlier in events.glob("events.out.tfevents.*"):
        earlier.unlink()
    with naming(events), third_party.one_error_of_events():
        writer = SummaryWriter(str(events))
        for title, path in pictures.items():
            with Image.open(path) as picture:
                writer.add_image(title, np.asarray(picture.convert("RGB")), dataformats="HWC")
        writer.add_text("report", (folder / REPORT_FILE).read_text(encoding="utf-8"))
        writer.flush()
        writer.close()

"""What a comparison found: tables, paired differences, whether all began alike, and plots. One process only.

Everything is read from the folders of the runs, so a report can be written at any time, also of half the runs.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lorafair.aggregation import AGGREGATORS
from lorafair.comparison import REPORT, Comparison, Options, Run, failure_of, options_text, read_result
from lorafair.errors import LorafairError
from lorafair.tables import markdown_table, table
from lorafair.tracking import say

CONFIDENCE = 0.95
PER_CLIENT = ("accuracy_own_domain", "accuracy_other_domains")  # of methods whose clients keep a model each
# What runs that are compared should have in common, and the options of an entry that explain a difference.
START = {
    "initial_adapter": ("the initial adapter and head", ("model", "data")),
    "images": ("images", ("data",)),
    "frozen_weights": ("frozen weights", ("model",)),
    "clients": ("clients", ("partition", "data")),
}
Curve = dict[int, float]  # round -> value


@dataclass(frozen=True)
class Finished:
    """One final run that is done."""

    run: Run
    result: Mapping[str, Any]
    chosen: Options

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """The scalars of metrics.csv that are plotted."""
        curves: dict[str, Curve] = {}
        wanted = ("eval/accuracy", "comm/total_bytes", "server/error_before", "server/error_after")
        try:
            with (self.run.folder / "metrics.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    if row["name"] in wanted:
                        curves.setdefault(row["name"], {})[int(row["round"])] = float(row["value"])
        except (OSError, ValueError, KeyError) as error:
            folder = self.run.folder
            raise LorafairError(
                f"{folder / 'metrics.csv'} cannot be read ({error}); remove {folder} to repeat the run"
            ) from error
        return curves

    @property
    def accuracy(self) -> float:
        """Mean over domains, in %."""
        return 100 * float(self.result["mean_accuracy"])


@dataclass(frozen=True)
class Difference:
    """A method against the baseline, pair by pair of runs that differ in the method alone, in points of accuracy."""

    by_pair: Mapping[tuple[str, int], float]  # (setting, seed)

    @property
    def mean(self) -> float:
        """Mean over pairs."""
        return statistics.fmean(self.by_pair.values())

    @property
    def half_width(self) -> float | None:
        """Half of the confidence interval of the mean, by Student's t over pairs; None for one pair."""
        from scipy.stats import t  # scipy takes a second to import

        count = len(self.by_pair)
        if count < 2:
            return None
        return (
            float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(self.by_pair.values()) / math.sqrt(count)
        )

    @property
    def interval_text(self) -> str:
        """The interval for a table."""
        half = self.half_width
        return "–" if half is None else f"{self.mean - half:+.2f} to {self.mean + half:+.2f}"


class Findings:
    """The finished runs of a comparison and what follows from them."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.finished: dict[tuple[str, str], list[Finished]] = {}  # (setting, method) -> by seed
        self.missing: list[str] = []
        self.failed: list[str] = []
        self.choices = {(s, m): comparison.choice(s, m) for s in comparison.settings for m in comparison.methods}
        for run in comparison.final_runs:
            state, _ = comparison.state(run)
            choice = self.choices[run.setting, run.method]
            if state == "done" and choice is not None and choice.best is not None:
                done = Finished(run, read_result(run.folder), comparison.candidates[choice.best])
                self.finished.setdefault((run.setting, run.method), []).append(done)
            elif state == "failed":
                reason = failure_of(run) or "; ".join(choice.failures if choice else ())
                self.failed.append(f"{run.name}: {reason}")
            else:
                self.missing.append(f"{run.name} ({state})")

    def of(self, setting: str, method: str) -> list[Finished]:
        """The finished runs of a method in a setting, in the order of seeds."""
        return self.finished.get((setting, method), [])

    def methods(self, setting: str) -> list[str]:
        """Methods with a finished run in the setting, in the order given."""
        return [method for method in self.comparison.methods if self.of(setting, method)]

    def settings(self) -> list[str]:
        """Settings with a finished run."""
        return [setting for setting in self.comparison.settings if self.methods(setting)]

    def domains(self, setting: str) -> list[str]:
        """All domains of the setting's runs, in their order."""
        return list(
            dict.fromkeys(d for m in self.methods(setting) for f in self.of(setting, m) for d in f.result["accuracy"])
        )

    def difference(self, method: str, *settings: str) -> Difference | None:
        """The method against the baseline in these settings; None without a common seed."""
        common: dict[tuple[str, int], float] = {}
        for setting in settings:
            theirs = {f.run.seed: f.accuracy for f in self.of(setting, self.comparison.baseline)}
            mine = {f.run.seed: f.accuracy for f in self.of(setting, method)}
            seeds = [seed for seed in self.comparison.seeds if seed in mine and seed in theirs]
            common |= {(setting, seed): mine[seed] - theirs[seed] for seed in seeds}
        return Difference(common) if common else None

    # Tables: header and rows

    def accuracy_table(self, setting: str) -> tuple[list[str], list[list[str]]]:
        """Rows are methods, columns domains, mean, seeds and cost."""
        tuned = ["tuned options"] if self.comparison.tuning else []
        domains = self.domains(setting)
        header = ["method", *domains, "mean", "seeds", *tuned, "MB up + down", "seconds a run"]
        rows = []
        for method in self.methods(setting):
            runs = self.of(setting, method)
            row = [method]
            for domain in domains:
                row.append(
                    _mean_std([100 * f.result["accuracy"][domain] for f in runs if domain in f.result["accuracy"]])
                )
            row += [_mean_std([f.accuracy for f in runs]), str(len(runs))]
            row += [options_text(runs[0].chosen)] if tuned else []
            totals = [f.result.get("totals", {}) for f in runs]
            row.append(f"{statistics.fmean(t.get('bytes', 0) for t in totals) / 1e6:,.2f}")
            row.append(f"{statistics.fmean(t.get('seconds', 0) for t in totals):,.1f}")
            rows.append(row)
        return header, rows

    def per_client_table(self, setting: str) -> tuple[list[str], list[list[str]]]:
        """Methods whose clients keep a model each: on the client's own domain and on the others."""
        rows = []
        for method in self.methods(setting):
            runs = [f for f in self.of(setting, method) if all(key in f.result for key in PER_CLIENT)]
            if runs:
                rows.append([method, *(_mean_std([100 * f.result[key] for f in runs]) for key in PER_CLIENT)])
        return ["method", "own domain", "other domains"], rows

    def difference_table(self, setting: str) -> tuple[list[str], list[list[str]]]:
        """Every other method against the baseline, seed by seed."""
        seeds = self.comparison.seeds
        rows = []
        for method in self.methods(setting):
            difference = self.difference(method, setting) if method != self.comparison.baseline else None
            if difference is None:
                continue
            pairs = difference.by_pair
            by_seed = [f"{pairs[setting, s]:+.2f}" if (setting, s) in pairs else "–" for s in seeds]
            rows.append([method, *by_seed, f"{difference.mean:+.2f}", difference.interval_text])
        return ["method", *(f"seed {seed}" for seed in seeds), "mean", f"{CONFIDENCE:.0%} interval"], rows

    def overall_table(self) -> tuple[list[str], list[list[str]]]:
        """Every other method against the baseline over all settings and seeds."""
        rows = []
        for method in self.comparison.methods:
            difference = self.difference(method, *self.settings()) if method != self.comparison.baseline else None
            if difference is not None:
                above = sum(value > 0 for value in difference.by_pair.values())
                rows.append([method, f"{above} of {len(difference.by_pair)}", f"{difference.mean:+.2f}",
                             difference.interval_text])  # fmt: skip
        return ["method", "pairs above", "mean", f"{CONFIDENCE:.0%} interval"], rows

    # Sentences

    def interval_text(self) -> str:
        """What the intervals cover and how many there are."""
        count = sum(
            1
            for setting in self.settings()
            for method in self.methods(setting)
            if method != self.comparison.baseline and (d := self.difference(method, setting)) and len(d.by_pair) > 1
        )
        if not count:
            return "Differences are paired by seed. With one seed there is no interval, and a difference says little."
        return (
            "Differences are paired by seed. The interval is Student's t over seeds: it covers what a seed draws "
            "(which images are used and how they are dealt out to clients, initial factors, clients of a round, "
            "batches), not other data, models or settings. With few seeds it also rests on the differences being "
            "roughly normal. "
            f"There {'is 1 comparison' if count == 1 else f'are {count} comparisons'}, not corrected for their number: "
            f"if no method differed, about {count * (1 - CONFIDENCE):.1g} of the {count} intervals would leave out "
            "zero by chance."
        )

    def start_text(self) -> str:
        """Whether the methods of a seed and setting began alike, checked by the sums in result.json."""
        differing: list[str] = []
        exceptions: dict[str, None] = {}  # in the order found, each once
        compared = 0
        for setting in self.settings():
            for seed in self.comparison.seeds:
                runs = [f for m in self.methods(setting) for f in self.of(setting, m) if f.run.seed == seed]
                if len(runs) < 2:
                    continue
                compared += 1
                reference = next((f for f in runs if f.run.method == self.comparison.baseline), runs[0])
                for finished in runs:
                    for part, (name, groups) in START.items():
                        if finished.result["start"][part] == reference.result["start"][part]:
                            continue
                        reason = self._reason(finished, part, groups) or self._reason(reference, part, groups)
                        if reason:
                            exceptions[f"{finished.run.method} ({reason})"] = None
                        else:
                            method, other = finished.run.method, reference.run.method
                            differing.append(f"{setting}, seed {seed}: {method} and {other} differ in {name}")
        if differing:
            return f"WARNING: the methods did not begin alike: {'; '.join(differing)}."
        if not compared:
            return "Whether methods began alike cannot be checked yet: no two of them have finished with the same seed."
        but = f", except where it is part of what is compared: {', '.join(exceptions)}" if exceptions else ""
        return (
            "Same start: for every seed and setting all methods began from the same initial adapter and head, frozen "
            f"weights, images and clients (checked by their sha256 sums){but}."
        )

    def _reason(self, finished: Finished, part: str, groups: Sequence[str]) -> str:
        """Why this run may differ in a part of its start; empty if nothing explains it."""
        method = self.comparison.methods[finished.run.method]
        name = str(method["method.name"])
        if part == "clients" and AGGREGATORS[name].pools_data:
            return "one client has the images of all"
        given = [key for key in (*method, *finished.chosen) if key.partition(".")[0] in groups]
        return f"it sets {', '.join(given)}" if given else ""

    def warnings(self) -> list[str]:
        """Failed and missing runs, and tuned options at the edge of their grid."""
        lines = [f"WARNING: failed: {text}" for text in self.failed]
        if self.missing:
            lines.append(f"Not in this report: {len(self.missing)} of {len(self.comparison.final_runs)} runs: "
                         + ", ".join(self.missing))  # fmt: skip
        tuning = self.comparison.tuning
        at_edge: dict[str, list[str]] = {}
        for (setting, method), choice in self.choices.items():
            if tuning is None or choice is None or choice.best is None:
                continue
            for key, value in self.comparison.candidates[choice.best].items():
                values = tuning.options[key]
                numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
                if numbers and len(values) > 1 and value in (min(values), max(values)):
                    grid = ", ".join(f"{v:g}" for v in values)
                    at_edge.setdefault(f"{key}={value:g}, at the edge of its grid ({grid})", []).append(
                        f"{setting} / {method}"
                    )
        return lines + [
            f"WARNING: tuning chose {what}, for {', '.join(entries)}; a wider grid may change the comparison"
            for what, entries in at_edge.items()
        ]

    def tuning_text(self) -> str:
        """How the options were chosen; empty without tuning."""
        tuning = self.comparison.tuning
        if tuning is None:
            return ""
        rounds = f"{tuning.rounds} rounds" if tuning.rounds else "as many rounds"
        return (
            f"Tuned options: the best of {len(tuning.candidates)} for each method and setting alike, by mean accuracy "
            f"on {tuning.fraction:.0%} of the training images, held out, with seed {tuning.seed} and {rounds}; the "
            "final runs train on all training images."
        )


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
    say(f"curves:   tensorboard --logdir {comparison.folder}")


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


def _mean_std(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


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


# Plots

# Eight colours that colour-blind readers tell apart (after Okabe and Ito), then again with other markers and lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H", "$+$")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)))


def _style(findings: Findings, method: str) -> dict[str, Any]:
    number = list(findings.comparison.methods).index(method)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def _shade(findings: Findings, setting: str) -> float:
    """Opacity of a band: many of them together would hide the lines."""
    return min(0.12, 0.6 / len(findings.methods(setting)))


def draw_plots(findings: Findings) -> dict[str, Path]:
    """Draw everything there is; returns title -> PNG."""
    plots: dict[str, Path] = {}
    for setting in findings.settings():
        for kind, title, draw in (
            ("accuracy", "accuracy by round", _accuracy_by_round),
            ("traffic", "accuracy by megabytes", _accuracy_by_traffic),
            ("bias", "aggregation bias by round", _bias_by_round),
        ):
            path = findings.comparison.folder / f"{setting}-{kind}.png"
            path.unlink(missing_ok=True)
            if _draw(path, f"{title}, setting {setting}", lambda axes, d=draw, s=setting: d(findings, s, axes)):  # type: ignore[misc]
                plots[f"{setting}: {title}"] = path
    path = findings.comparison.folder / "map.png"
    path.unlink(missing_ok=True)
    title = f"difference to {findings.comparison.baseline} by aggregation bias"
    if len(findings.settings()) > 1 and _draw(path, title, lambda axes: _map(findings, axes)):
        plots[title] = path
    return plots


def _draw(path: Path, title: str, draw: Callable[[Any], bool]) -> bool:
    """A picture with its legend outside; false, and no picture, where `draw` finds nothing to show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot would touch the user's display and state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if not draw(axes):
        return False
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_xlabel() == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=3.5)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=150, format="png")
    os.replace(partial, path)
    return True


def _over_seeds(curves: Sequence[Curve]) -> tuple[Any, Any, Any]:
    """Rounds that all seeds have, mean and sample standard deviation (zero for one seed) there."""
    rounds = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = np.array([[curve[r] for r in rounds] for curve in curves]).reshape(len(curves), len(rounds))
    std = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(rounds))
    return np.array(rounds), values.mean(0) if len(curves) else np.zeros(0), std


def _accuracy_by_round(findings: Findings, setting: str, axes: Any) -> bool:
    for method in findings.methods(setting):
        style = _style(findings, method)
        shade = _shade(findings, setting)
        rounds, mean, std = _over_seeds([f.curves.get("eval/accuracy", {}) for f in findings.of(setting, method)])
        axes.plot(rounds, 100 * mean, label=method, **style)
        axes.fill_between(
            rounds, 100 * (mean - std), 100 * (mean + std), color=style["color"], alpha=shade, linewidth=0
        )
    axes.set_xlabel("round")
    axes.set_ylabel("mean accuracy in % (band: ± std over seeds)")
    return True


def _accuracy_by_traffic(findings: Findings, setting: str, axes: Any) -> bool:
    drawn = False
    for method in findings.methods(setting):
        style, runs, shade = _style(findings, method), findings.of(setting, method), _shade(findings, setting)
        rounds, mean, std = _over_seeds([f.curves.get("eval/accuracy", {}) for f in runs])
        sent_rounds, sent, _ = _over_seeds([f.curves.get("comm/total_bytes", {}) for f in runs])
        at = dict(zip(sent_rounds.tolist(), (sent / 1e6).tolist(), strict=True))
        x = [at.get(r, math.nan) for r in rounds.tolist()]
        if not any(value > 0 for value in x):  # nothing travels where data are pooled
            continue
        drawn = True
        axes.plot(x, 100 * mean, label=method, **style)
        axes.fill_between(x, 100 * (mean - std), 100 * (mean + std), color=style["color"], alpha=shade, linewidth=0)
    axes.set_xlabel("megabytes sent up and down by all clients so far")
    axes.set_ylabel("mean accuracy in % (band: ± std over seeds)")
    return drawn


def _bias_by_round(findings: Findings, setting: str, axes: Any) -> bool:
    drawn = False
    for method in findings.methods(setting):
        style, runs = _style(findings, method), findings.of(setting, method)
        for name, line in (("server/error_before", "-"), ("server/error_after", (0, (4, 2)))):
            curves = [f.curves[name] for f in runs if name in f.curves]
            if not curves:
                continue
            rounds, mean, _ = _over_seeds(curves)
            label = method if name.endswith("before") else None
            axes.plot(rounds, mean, label=label, **{**style, "linestyle": line})
            drawn = True
    axes.set_xlabel("round")
    axes.set_ylabel("‖ΔW − X‖ / ‖ΔW‖ (solid: before, dashed: after)")
    return drawn


def _map(findings: Findings, axes: Any) -> bool:
    baseline = findings.comparison.baseline
    places: list[tuple[float, str]] = []
    for setting in findings.settings():
        runs = findings.of(setting, baseline)
        biases = [b for f in runs for b in f.curves.get("server/error_before", {}).values()]
        if biases:
            places.append((statistics.fmean(biases), setting))
    if len(places) < 2:
        return False
    span = max(x for x, _ in places) - min(x for x, _ in places)
    others = [method for method in findings.comparison.methods if method != baseline]
    drawn = False
    for number, method in enumerate(others):
        shift = (number - (len(others) - 1) / 2) * 0.012 * span  # side by side, so that whiskers do not hide each other
        points = [(x + shift, d) for x, s in places if (d := findings.difference(method, s)) is not None]
        if points:
            style = _style(findings, method)
            axes.errorbar(
                [x for x, _ in points], [d.mean for _, d in points], yerr=[d.half_width or 0 for _, d in points],
                label=method, color=style["color"], marker=style["marker"], markersize=6, linestyle="none",
                capsize=2.5, elinewidth=1,
            )  # fmt: skip
            drawn = True
    axes.axhline(0, color="black", linewidth=0.8)
    for x, setting in places:
        axes.axvline(x, color="black", alpha=0.08, zorder=0)
        axes.annotate(setting, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -2), textcoords="offset points",
                      rotation=90, va="top", ha="left", fontsize=8)  # fmt: skip
    axes.set_xlabel(f"relative aggregation bias of {baseline} before the correction, mean over rounds and seeds")
    axes.set_ylabel(f"points above {baseline} ({CONFIDENCE:.0%} interval)")
    return drawn


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

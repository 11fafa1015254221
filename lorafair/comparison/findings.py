"""What the finished runs of a comparison say, in sentences: the question, the answer, and what to know with it.

Everything is read from the folders of the runs, so it can be asked at any time, also of half the runs.
"""

from __future__ import annotations

from functools import cached_property

from lorafair.comparison.draws import LEVEL, Draws
from lorafair.comparison.outcomes import CONFIDENCE, Difference, Outcomes, RecordedRun
from lorafair.comparison.plan import Comparison, State, failure_of
from lorafair.console import format_count, some
from lorafair.reporting.run_dir import read_result

_IN_FULL = 3  # methods without a difference that the answer gives with their numbers


class Findings(Outcomes):
    """The finished runs of a comparison and what follows from them."""

    comparison: Comparison

    def __init__(self, comparison: Comparison) -> None:
        self.missing: list[str] = []
        self.not_needed = 0  # runs of draws after a decision
        self.failed: dict[str, list[str]] = {}  # reason -> names of runs
        self.states: dict[int, State] = {}  # of the final runs, by index
        self.choices = {(s, m): comparison.choice(s, m) for s in comparison.settings for m in comparison.methods}
        done = []
        for run in comparison.final_runs:
            state, _ = comparison.state(run)
            self.states[run.index] = state
            choice = self.choices[run.setting, run.method]
            if state == "done" and choice is not None and choice.best is not None:
                done.append(RecordedRun(run, read_result(run.folder), comparison.candidates[choice.best]))
            elif state == "failed":
                reason = failure_of(run) or "; ".join(choice.failures if choice else ())
                self.failed.setdefault(reason, []).append(run.name)
            elif state == "not needed":
                self.not_needed += 1
            else:
                self.missing.append(f"{run.name} ({state})")
        super().__init__(comparison, done)

    def question(self) -> str:
        """What was compared, on what, and how often."""
        comparison = self.comparison
        first = next(iter(self.finished.values()))[0].result
        *some, last = sorted({f.result["rounds"] for runs in self.finished.values() for f in runs})
        rounds = "".join(f"{r} or " for r in some) + format_count(last, "round")
        seeds = f"{format_count(len(comparison.seeds), 'seed')} ({', '.join(map(str, comparison.seeds))})"
        if comparison.draws is not None:
            seeds = _draws_text(comparison.draws)
        images = first.get("data", {}).get("description", "")
        where = f" in {format_count(len(comparison.settings), 'setting')}" if len(comparison.settings) > 1 else ""
        others = self.others()
        asked = f"How accurate is {self.baseline_title}{where}?"
        if others:
            are = "is" if len(others) == 1 else "are"
            asked = f"How accurate {are} {self.titles(others)}, compared with {self.baseline_title}{where}?"
        return f"{asked} {seeds}, {rounds}.{f' Images: {images}.' if images else ''}"

    def answers(self) -> list[tuple[str, str]]:
        """(setting, what can be told there and what cannot); the setting is empty where there is one."""
        settings = self.settings()
        return [(setting if len(self.comparison.settings) > 1 else "", self._answer(setting)) for setting in settings]

    def _answer(self, setting: str) -> str:
        baseline, found = self.baseline_title, self.differences(setting)
        if not self.runs_of(setting, self.comparison.baseline):
            return f"No run of {baseline}, the baseline, is done, so there are no differences."
        if not found:
            return f"No other method has finished with a seed of {baseline}, so there are no differences."
        kinds: dict[str, dict[str, Difference]] = {}
        for method, difference in found.items():
            kinds.setdefault(_kind(difference, self.draws), {})[method] = difference
        parts, margin = [], (self.draws.margin if self.draws else None) or 0
        for kind, text in (
            ("above", f"More accurate than {baseline}"),
            ("below", f"Less accurate than {baseline}"),
            ("near", f"Within {margin:g} points of {baseline}"),
            ("undecided", f"No difference to {baseline} can be told (the interval holds zero)"),
        ):
            methods = kinds.get(kind, {})
            if kind == "undecided" and len(methods) > _IN_FULL:  # the table below has their numbers
                parts.append(f"{text}: {self.titles(methods)}.")
            elif methods:
                listed = ", ".join(f"{self.title(m)} {d} points ({d.interval_text})" for m, d in methods.items())
                parts.append(f"{text}: {listed}.")
        if equal := kinds.get("equal"):
            parts.append(f"As accurate as {baseline} on every {self.unit}: {self.titles(equal)}.")
        if constant := kinds.get("constant"):
            listed = ", ".join(f"{self.title(m)} {d} points" for m, d in constant.items())
            parts.append(f"The same difference on every {self.unit}, so there is no interval: {listed}.")
        if single := kinds.get("one"):
            listed = ", ".join(f"{self.title(m)} {d} points" for m, d in single.items())
            parts.append(
                f"With one {self.unit} there is no interval, and chance may explain each difference: {listed}."
            )
        return " ".join(parts)

    def interval_text(self) -> str:
        """What the intervals cover and how many there are."""
        found = [d for setting in self.settings() for d in self.differences(setting).values()]
        count = sum(len(difference.by_pair) > 1 for difference in found)
        if not count:
            return "Differences are paired by seed. With one seed there is no interval, and a difference says little."
        if self.draws is not None:
            return self._interval_of_draws(self.draws)
        return (
            "Differences are paired by seed. The interval is Student's t over seeds: it covers what a seed draws "
            "(which images are used and how they are dealt out to clients, initial factors, clients of a round, "
            "batches), not other data, models or settings. With few seeds it also rests on the differences being "
            "roughly normal. "
            f"There {'is 1 comparison' if count == 1 else f'are {count} comparisons'}, not corrected for their number: "
            f"if no method differed, about {count * (1 - CONFIDENCE):.1g} of the {count} intervals would leave out "
            "zero by chance."
        )

    def _interval_of_draws(self, draws: Draws) -> str:
        """What intervals over draws cover."""
        if draws.until_decided:
            left = f" {format_count(self.not_needed, 'run')} were not needed." if self.not_needed else ""
            margin = f", or that it is below {draws.margin:g} points" if draws.margin else ""
            return (
                f"Differences are paired by draw. Every {draws.batch} draws it was looked whether a difference is "
                f"decided: its interval leaves out zero{margin}. The intervals are confidence sequences: all of them "
                f"hold at all draws at once with probability {1 - LEVEL:.0%} if differences are about normal, so "
                f"looking and stopping adds no error. A mean at a stop is a little too far from zero.{left}"
            )
        how = {
            "independent": "Student's t over draws",
            "crossed": "Student's t with the mean squares of partition and training, which share cells",
            "nested": "Student's t over partitions",
        }[draws.layout]
        return (
            f"Differences are paired by draw. The interval is {how}: it covers other images, partitions and trainings, "
            "not other data, models or settings, and is not corrected for the number of comparisons (p (Holm) is)."
        )

    def warnings(self) -> list[str]:
        """Failed and missing runs, and tuned options at the edge of their grid."""
        lines = [f"WARNING: failed: {', '.join(names)}: {reason}" for reason, names in self.failed.items()]
        if self.missing:
            lines.append(f"Not in this report: {len(self.missing)} of {len(self.comparison.final_runs)} runs: "
                         + (", ".join(self.missing) if self.draws is None else some(self.missing)))  # fmt: skip
        return lines + [
            f"WARNING: tuning chose {what}, for {', '.join(entries)}; a wider grid may change the comparison"
            for what, entries in self._at_edge.items()
        ]

    @cached_property
    def _at_edge(self) -> dict[str, list[str]]:
        """Tuned options at the edge of their grid -> the settings and methods for which they were chosen."""
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
        return at_edge

    def tuning_text(self) -> str:
        """How the options were chosen; empty without tuning."""
        tuning = self.comparison.tuning
        if tuning is None:
            return ""
        rounds = format_count(tuning.rounds, "round") if tuning.rounds else "as many rounds"
        return (
            f"Tuned options: the best of {len(tuning.candidates)} for each method and setting alike, by mean accuracy "
            f"on {tuning.fraction:.0%} of the training images, held out, with seed {tuning.seed} and {rounds}; the "
            "final runs train on all training images."
        )


def _draws_text(draws: Draws) -> str:
    if draws.is_design:
        kinds = f"{format_count(draws.partitions, 'partition')} × {format_count(draws.trainings, 'training')}"
        return f"{format_count(draws.number, 'draw')} ({kinds}, {draws.layout})"
    return f"{'At most ' if draws.until_decided else ''}{format_count(draws.number, 'draw')}"


def _kind(difference: Difference, draws: Draws | None) -> str:
    """What a difference tells: above, below, near (within the margin), undecided, equal, constant, or one pair."""
    if difference.interval is None:
        if len(difference.by_pair) == 1:
            return "one"
        return "constant" if difference.is_constant else "undecided"
    low, high = difference.interval
    if low == high == 0:
        return "equal"
    if low > 0 or high < 0:
        return "above" if low > 0 else "below"
    margin = draws.margin if draws is not None else None
    return "near" if margin is not None and -margin < low and high < margin else "undecided"

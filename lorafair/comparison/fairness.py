"""Whether the runs that are compared began alike: from the same adapter, weights, images and clients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lorafair.comparison.outcomes import Outcomes, RecordedRun
from lorafair.comparison.tables import Cell, Table
from lorafair.registry import METHODS

# What runs that are compared should have in common, and the options of an entry that explain a difference.
START = {
    "initial_adapter": ("the initial adapter and head", ("model", "data")),
    "images": ("images", ("data",)),
    "frozen_weights": ("frozen weights", ("model",)),
    "clients": ("clients", ("partition", "data")),
}


@dataclass
class StartCheck:
    """One part of what runs begin from, compared by its sha256 sum."""

    name: str
    pairs: int = 0  # of a run and the one that should have begun like it
    exceptions: dict[str, None] = field(default_factory=dict)  # methods for which it is part of what is compared
    differing: list[str] = field(default_factory=list)


def start_checks(outcomes: Outcomes) -> list[StartCheck]:
    """A check for each part of START, over all pairs of finished runs that should have begun alike."""
    pairs = list(_pairs_of_equal_start(outcomes))
    checks = []
    for part, (name, groups) in START.items():
        check = StartCheck(name, len(pairs))
        for mine, other in pairs:
            if mine.result["start"][part] == other.result["start"][part]:
                continue
            method, run = outcomes.title(mine.run.method), mine.run
            if reason := _reason(outcomes, mine, part, groups) or _reason(outcomes, other, part, groups):
                check.exceptions[f"{method} ({reason})"] = None
            else:
                names = f"{method} and {outcomes.title(other.run.method)}"
                check.differing.append(f"{run.setting}, seed {run.seed}: {names} differ in {name}")
        checks.append(check)
    return checks


def start_text(outcomes: Outcomes) -> str:
    """The checks in a sentence."""
    checks = start_checks(outcomes)
    if differing := [line for check in checks for line in check.differing]:
        return f"WARNING: the methods did not begin alike: {'; '.join(differing)}."
    if not any(check.pairs for check in checks):
        return "Whether methods began alike cannot be checked yet: no two of them have finished with the same seed."
    exceptions = list(dict.fromkeys(name for check in checks for name in check.exceptions))
    but = f", except where it is part of what is compared: {', '.join(exceptions)}" if exceptions else ""
    return (
        "Same start: for every seed and setting all methods began from the same initial adapter and head, frozen "
        f"weights, images and clients (checked by their sha256 sums){but}."
    )


def start_table(outcomes: Outcomes) -> Table:
    """The checks, one a row."""
    rows: list[list[Cell]] = [
        [
            check.name,
            str(check.pairs),
            "; ".join(check.differing) or ("equal, except by design" if check.exceptions else "equal"),
            ", ".join(check.exceptions) or "–",
        ]
        for check in start_checks(outcomes)
        if check.pairs
    ]
    caption = "What the runs of a seed and a setting began from, compared with the run of the baseline by sha256 sums"
    return Table(caption, ["what", "pairs of runs", "found", "differs by design"], rows)


def _pairs_of_equal_start(outcomes: Outcomes) -> Iterator[tuple[RecordedRun, RecordedRun]]:
    """Each run with the one of the baseline, or else of the first method, that should have begun like it."""
    for setting, seed in itertools.product(outcomes.settings(), outcomes.comparison.seeds):
        runs = [f for m in outcomes.methods(setting) for f in outcomes.runs_of(setting, m) if f.run.seed == seed]
        if len(runs) > 1:
            reference = next((f for f in runs if f.run.method == outcomes.comparison.baseline), runs[0])
            yield from ((finished, reference) for finished in runs if finished is not reference)


def _reason(outcomes: Outcomes, finished: RecordedRun, part: str, groups: Sequence[str]) -> str:
    """Why this run may differ in a part of its start; empty if nothing explains it."""
    method = outcomes.comparison.methods[finished.run.method]
    name = str(method["method.name"])
    if part == "clients" and METHODS[name].pools_data:
        return "one client has the images of all"
    given = [key for key in (*method, *finished.chosen) if key.partition(".")[0] in groups]
    return f"it sets {', '.join(given)}" if given else ""

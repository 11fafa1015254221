"""Numbers of runs that are stored in docs/data, and what follows from them: used by pages, figures and tests alike."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from lorafair.comparison.draws import difference_of
from lorafair.comparison.statistics import Estimate, estimate, holm, is_constant
from lorafair.registry import METHODS

DATA = Path(__file__).resolve().parents[1] / "data"
CONFIDENCE = 0.95
BASELINE = "fedit"
_CLASS, _PLAIN = "_class", "_plain"
_FOLD = "fair_fold"  # the one label whose plain head is what is marked
_TITLES = {
    _FOLD: "LoRA-FAIR, coded fold",
    "fedex_coded": "FedEx-LoRA, coded fold",
    "fedit_last_heads": "FedIT, mean of the last 4 heads",
    "lora_fair_sgd": "LoRA-FAIR, 1,000 steps of gradient descent",
    "lora_fair_both": "LoRA-FAIR, both factors corrected",
    "lora_fair_columns": "LoRA-FAIR, cosine of columns",
    "lora_fair_1": "LoRA-FAIR, λ = 1",
    "lora_fair_0.0001": "LoRA-FAIR, λ = 0.0001",
    "lora_fair_0": "LoRA-FAIR, λ = 0",
}
_GAP = "\N{NO-BREAK SPACE}"
Place = tuple[str, str]  # setting, method


class Stored:
    """The lines of one file, by setting, method and draw."""

    def __init__(self, file: Path) -> None:
        self.lines: dict[Place, dict[int, dict[str, str]]] = {}
        with file.open(encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                self.lines.setdefault((row["setting"], row["method"]), {})[int(row["draw"])] = row

    def methods(self, setting: str) -> list[str]:
        """In the order of the file."""
        return [method for at, method in self.lines if at == setting]

    def values(self, setting: str, method: str, measure: str = "accuracy") -> dict[int, float]:
        """Of the draws that have it."""
        lines = self.lines[setting, method]
        return {draw: float(line[measure]) for draw, line in sorted(lines.items()) if line[measure]}

    def mean(self, setting: str, method: str, measure: str = "accuracy") -> float | None:
        """Over draws; None where no draw has it."""
        values = self.values(setting, method, measure).values()
        return statistics.fmean(values) if values else None

    def difference(self, setting: str, method: str, baseline: str, measure: str = "accuracy") -> Paired:
        """Draw by draw, of the draws that both have."""
        mine, theirs = self.values(setting, method, measure), self.values(setting, baseline, measure)
        return Paired({draw: difference_of(mine[draw], theirs[draw]) for draw in mine if draw in theirs})

    def draws(self, setting: str) -> int:
        """That the method with the fewest has."""
        return min(len(self.lines[setting, method]) for method in self.methods(setting))


@dataclass(frozen=True)
class Paired:
    """Differences of two methods, by draw."""

    by_draw: dict[int, float]

    @property
    def estimate(self) -> Estimate | None:
        """None for fewer than two draws."""
        return estimate(np.array(list(self.by_draw.values())))

    @property
    def mean(self) -> float:
        """In points."""
        return statistics.fmean(self.by_draw.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """By Student's t, 95 %; None for fewer than two draws, or the same difference on all."""
        return None if self._has_no_spread or self.estimate is None else self.estimate.interval(CONFIDENCE)

    @property
    def p_value(self) -> float | None:
        """Not corrected."""
        return None if self._has_no_spread or self.estimate is None else self.estimate.p_value

    @property
    def _has_no_spread(self) -> bool:
        return is_constant(np.array(list(self.by_draw.values())))

    def __str__(self) -> str:
        if self.interval is None:
            return signed(self.mean)
        return f"{signed(self.mean)} ({signed(self.interval[0])} to {signed(self.interval[1])})"

    def short(self) -> str:
        """The interval as what is added and subtracted: Student's t has it on both sides."""
        if self.interval is None:
            return signed(self.mean)
        return f"{signed(self.mean)} ±{_GAP}{(self.interval[1] - self.interval[0]) / 2:.2f}"


Differences = dict[Place, tuple[Paired, float | None]]  # to FedIT, and the p-value


@dataclass(frozen=True)
class Setting:
    """One line of docs/data/settings.csv."""

    file: str
    setting: str
    page: str  # results: in its figure and map, too; map: in its map; tables: among the tables alone
    title: str
    about: str
    wanted: int
    command: str

    @property
    def stored(self) -> Stored:
        """Its numbers."""
        return stored(self.file)

    @property
    def draws(self) -> int:
        """That all methods have."""
        return self.stored.draws(self.setting)

    @property
    def has_enough(self) -> bool:
        """Draws for a claim."""
        return self.draws >= self.wanted

    def count_text(self) -> str:
        """How many draws there are, and whether that is enough."""
        few = "" if self.has_enough else f"; at least {self.wanted} are wanted"
        return f"{self.draws} draw{'s' * (self.draws != 1)}{few}"


@cache
def stored(file: str) -> Stored:
    """A file of docs/data."""
    return Stored(DATA / file)


def settings(file: str | None = None, page: str | None = None) -> list[Setting]:
    """All that tables are made of, or those of one file or page."""
    with (DATA / "settings.csv").open(encoding="utf-8", newline="") as handle:
        rows = [Setting(**{**row, "wanted": int(row["wanted"])}) for row in csv.DictReader(handle)]  # type: ignore[arg-type]
    return [row for row in rows if file in (None, row.file) and page in (None, row.page)]


def parts_of(label: str) -> tuple[str, bool]:
    """What a label of a comparison says: how A and B are aggregated, and whether the head is averaged by class."""
    if label.endswith(_PLAIN):
        return label.removesuffix(_PLAIN), False
    if (inside := f"{_CLASS}_") in label:
        return label.replace(inside, "_"), True
    return label.removesuffix(_CLASS), label.endswith(_CLASS) or label == _FOLD


def pairs_of(labels: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
    """aggregation -> its label with the plain and with the class-wise head, in the order of the labels."""
    found: dict[str, list[str | None]] = {}
    for label in labels:
        aggregation, by_class = parts_of(label)
        found.setdefault(aggregation, [None, None])[by_class] = label
    return {aggregation: (plain, by_class) for aggregation, (plain, by_class) in found.items()}


def title_of(aggregation: str) -> str:
    """What the aggregation of a label is called."""
    if aggregation in _TITLES:
        return _TITLES[aggregation]
    return METHODS.title(aggregation) if aggregation in METHODS.names else aggregation


def corrected(differences: Iterable[Paired]) -> Iterator[float | None]:
    """Their p-values corrected for their number by Holm; None where there is none."""
    found = [difference.p_value for difference in differences]
    values = iter(holm([p for p in found if p is not None]))
    return (None if p is None else next(values) for p in found)


def differences_of(file: str) -> Differences:
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


def signed(value: float) -> str:
    """A difference in points, with a minus sign."""
    return f"{value:+.2f}".replace("-", "−")

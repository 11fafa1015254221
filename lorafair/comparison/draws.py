"""The draws of a comparison: which seeds each one sets, and when there are enough of them.

    compare:
      draws: 200                                               # draw d is seed d
      until: decided                                           # optional: no more than a decision takes
      batch: 10                                                # it is looked at every 10 draws
      margin: 0.5                                              # or that the difference is below so many points
    compare:
      draws: {partition: 20, training: 3, design: crossed}     # or nested

Nothing heavy is imported, unless a decision is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorafair.config.schema import Config
from lorafair.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from lorafair.comparison.statistics import Values

KEYS = ("draws", "until", "batch", "margin")
DESIGN_SEEDS = ("partition.seed", "model.seed", "federation.seed", "client.seed")  # set by a design
LEVEL = 0.05  # the chance of any wrong decision of a comparison
_DESIGN_KEYS = ("partition", "training", "design")


@dataclass(frozen=True)
class Draws:
    """How many there are and what each one varies."""

    partitions: int
    trainings: int = 1  # of each partition
    layout: Literal["independent", "crossed", "nested"] = "independent"
    until_decided: bool = False
    batch: int = 10
    margin: float | None = None  # points below which a difference does not matter

    @property
    def number(self) -> int:
        """All of them."""
        return self.partitions * self.trainings

    @property
    def is_design(self) -> bool:
        """Whether partition and training vary apart."""
        return self.layout != "independent"

    def seeds(self, draw: int) -> tuple[int, int]:
        """Of the partition and the training."""
        if not self.is_design:
            return draw, draw
        partition, training = divmod(draw, self.trainings)
        return partition, training if self.layout == "crossed" else draw

    def folder_name(self, method: str, draw: int) -> str:
        """Of a run; that of a seed where a draw is a seed, so that three seeds may become 200 draws."""
        return f"{method}-draw{draw}" if self.is_design else f"{method}-seed{draw}"

    def config(self, config: Config, draw: int) -> Config:
        """The configuration of a draw. The images, and frozen weights that are random, go with the partition."""
        partition, training = self.seeds(draw)
        if not self.is_design:
            return dataclasses.replace(config, seed=draw)
        return dataclasses.replace(
            config,
            seed=partition,
            partition=dataclasses.replace(config.partition, seed=partition),
            model=dataclasses.replace(config.model, seed=training),
            federation=dataclasses.replace(config.federation, seed=training),
            client=dataclasses.replace(config.client, seed=training),
        )

    def table(self, by_draw: Mapping[int, float]) -> Values:
        """The numbers in the order of draws; of a design (partitions, trainings), of whole partitions."""
        import numpy as np

        if not self.is_design:
            return np.array([by_draw[draw] for draw in sorted(by_draw)])
        rows = [range(p * self.trainings, (p + 1) * self.trainings) for p in range(self.partitions)]
        whole = [[by_draw[draw] for draw in row] for row in rows if all(draw in by_draw for draw in row)]
        return np.array(whole).reshape(len(whole), self.trainings)

    def decided_after(self, by_draw: Mapping[int, float], level: float) -> int | None:
        """The number of draws with which a difference was decided, looked at batch by batch; None: not yet."""
        from lorafair.comparison.statistics import decided

        for seen in range(self.batch, max(by_draw, default=0) + self.batch + 1, self.batch):
            values = self.table({draw: value for draw, value in by_draw.items() if draw < seen})
            if decided(values, level, self.margin):
                return seen
        return None


def difference_of(accuracy: float, other: float) -> float:
    """In points, without the rounding of binary numbers, which would pass for a spread of equal differences."""
    return round(accuracy - other, 9)


def read_draws(section: Mapping[str, Any], where: str) -> Draws | None:
    """From the keys of a `compare:` section; None where it has seeds. Raises ConfigError that names the key."""
    given = section.get("draws")
    if given is None:
        for option in KEYS:
            if section.get(option) is not None:
                raise ConfigError(
                    f"{where}.{option}={section[option]} needs {where}.draws, the most draws there may be"
                )
        return None
    if section.get("seeds") is not None:
        raise ConfigError(f"{where}.draws and {where}.seeds are both given; keep one of them")
    draws = _design(given, f"{where}.draws") if isinstance(given, dict) else Draws(_count(given, f"{where}.draws"))
    until = section.get("until")
    if until is None:
        if key := next((key for key in ("batch", "margin") if section.get(key) is not None), None):
            raise ConfigError(f"{where}.{key}={section[key]} has no effect without {where}.until: decided")
        return draws
    if until != "decided":
        raise ConfigError(f"{where}.until={until} must be decided, or be left out: then all draws are done")
    if draws.is_design:
        raise ConfigError(
            f"{where}.until=decided needs {where}.draws as a number: draws of a design are not independent"
        )
    batch, margin = section.get("batch", draws.batch), section.get("margin")
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if margin is not None and not (is_number and 0 < margin < math.inf):
        raise ConfigError(f"{where}.margin={margin} must be a number of points above 0")
    batch = _count(batch, f"{where}.batch", 1)
    if batch >= draws.number:
        raise ConfigError(
            f"{where}.until=decided has no effect: it is looked at every {batch} draws ({where}.batch), and "
            f"{where}.draws={draws.number}; set more draws, or a smaller batch"
        )
    return dataclasses.replace(draws, until_decided=True, batch=batch, margin=margin)


def _design(given: Mapping[str, Any], where: str) -> Draws:
    for key in given:
        if key not in _DESIGN_KEYS:
            hint = did_you_mean(str(key), _DESIGN_KEYS)
            raise ConfigError(f"there is no {where}.{key}; {hint}possible: {', '.join(_DESIGN_KEYS)}")
    if missing := [key for key in _DESIGN_KEYS if given.get(key) is None]:
        raise ConfigError(
            f"{where}.{missing[0]} is missing; for example {{partition: 20, training: 3, design: crossed}}"
        )
    layout = given["design"]
    if layout not in ("crossed", "nested"):
        raise ConfigError(f"{where}.design={layout} must be crossed or nested")
    return Draws(
        _count(given["partition"], f"{where}.partition"), _count(given["training"], f"{where}.training"), layout
    )


def _count(value: Any, where: str, least: int = 2) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where}={value} must be a whole number, at least {least}")
    return value

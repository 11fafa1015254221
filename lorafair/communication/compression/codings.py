"""The codings of a run, and what of an adapter gets back in the next round what its coding has lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.aggregation.base import Aggregator
from lorafair.communication.compression.base import RowCoding
from lorafair.communication.compression.downlink import Downlink
from lorafair.config.schema import Config
from lorafair.model.adapter import PARTS, AdapterLayout, Part
from lorafair.registry import COMPRESSIONS


@dataclass(frozen=True)
class Codings:
    """How what travels is coded; None: in float32, or as the method codes it."""

    up: RowCoding | None = None
    down: Downlink | None = None
    folded: RowCoding | None = None
    head: RowCoding | None = None  # of the head, both ways, where it has one of its own


PLAIN = Codings()


def codings_of(config: Config, aggregator: Aggregator, layout: AdapterLayout) -> Codings:
    """The codings that a configuration names."""

    def of(name: str | None, feedback: bool) -> RowCoding | None:
        if name is None:
            return None
        coding: RowCoding = COMPRESSIONS[name].of(config.compression, feedback)
        return coding

    options, corrected = config.compression, corrected_parts(config, aggregator, "down")
    down = of(options.down, "A" in corrected)
    turns, head = turns_towards_last(config, aggregator), of(options.head, feedback=False)
    return Codings(
        up=of(options.up, bool(options.client_error_feedback) and "A" in corrected_parts(config, aggregator, "up")),
        down=None if down is None else Downlink(layout, down, corrected, aggregator.decomposes, turns, head),
        folded=of(options.folded, feedback=False),
        head=head,
    )


def corrected_parts(config: Config, aggregator: Aggregator, way: Literal["up", "down"]) -> tuple[Part, ...]:
    """The parts with error feedback.

    Factors have none where those of the next round are others: drawn anew, or decomposed anew and not turned towards
    those before, which the server does with what it sends down.
    """
    new = config.federation.initialization == "fresh" or aggregator.restarts
    new |= aggregator.decomposes and not (way == "down" and turns_towards_last(config, aggregator))
    return tuple(part for part in PARTS if not (new and part in ("A", "B")))


def turns_towards_last(config: Config, aggregator: Aggregator) -> bool:
    """Whether the server turns new factors towards the last ones before it sends the difference.

    The product of a decomposition stays as it is; with smaller LoRA ranks, or fewer directions, it would not.
    """
    mixed = config.model.lora.client_ranks is not None or aggregator.sends_fewer_directions
    return aggregator.decomposes and not mixed

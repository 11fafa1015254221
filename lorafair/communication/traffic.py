"""What a real federation would send: bytes up and down in a round, of each of its clients.

Letters: K clients of the round, N of the run, R LoRA rank, I in_features, O out_features, L adapted layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from lorafair.aggregation.base import Aggregator, ServerUpdate
from lorafair.aggregation.coded_fold import Coding
from lorafair.communication.coding import start_dtype
from lorafair.communication.collectives import numbers_to_send
from lorafair.communication.compression.codings import PLAIN, Codings
from lorafair.communication.compression.folded import folded_bytes, forms_of
from lorafair.communication.compression.message import MessageFormat
from lorafair.model.adapter import AdapterLayout, Part

BYTES_PER_NUMBER = 4  # adapters travel in float32


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round, of a client or of all of them."""

    up: int = 0
    down: int = 0

    @property
    def total(self) -> int:
        """Both ways."""
        return self.up + self.down

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)


def round_traffic(
    layout: AdapterLayout,
    aggregator: Aggregator,
    update: ServerUpdate,
    round_index: int,
    lora_ranks: Sequence[int],
    codings: Codings = PLAIN,
) -> Traffic:
    """What the clients of a round, of these LoRA ranks, send and receive together: the sum of `client_traffic`."""
    return sum(client_traffic(layout, aggregator, update, round_index, lora_ranks, codings), Traffic())


def client_traffic(
    layout: AdapterLayout,
    aggregator: Aggregator,
    update: ServerUpdate,
    round_index: int,
    lora_ranks: Sequence[int],
    codings: Codings = PLAIN,
) -> list[Traffic]:
    """What clients of these LoRA ranks (K,) send and receive in a round, one by one; nothing where data is pooled.

    A client of LoRA rank r sends and receives r rows of A and columns of B, and no more than the server has to send;
    where a method selects directions, all of them come down. A folded part counts as it is sent between processes: as
    factors, or as a matrix (O, I) where the server keeps that; a coded message counts its bytes. Sketches travel up
    instead of factors, and down beside them. What a client has missed in earlier rounds is not in it: see `catch_up`.
    """
    if aggregator.pools_data:
        return [Traffic() for _ in lora_ranks]
    folded = sum(folded_part_bytes(layout, aggregator, update, codings).values())

    @cache
    def of(lora_rank: int) -> Traffic:
        received = None if aggregator.selects_directions else lora_rank
        return Traffic(
            up=_up(layout, aggregator, round_index, lora_rank, codings),
            down=start_bytes(layout, aggregator, update, round_index, received, codings) + folded,
        )

    return [of(lora_rank) for lora_rank in lora_ranks]


def _up(layout: AdapterLayout, aggregator: Aggregator, round_index: int, lora_rank: int, codings: Codings) -> int:
    sends = aggregator.sends(round_index)
    if codings.up is not None:
        return MessageFormat(layout, sends, codings.up, codings.head).length(lora_rank)
    factors, rest = _numbers(layout, sends, lora_rank, {})
    sketches = _sketch_numbers(layout, aggregator)
    return BYTES_PER_NUMBER * ((factors if sketches is None else sketches[0]) + rest)


def start_bytes(
    layout: AdapterLayout,
    aggregator: Aggregator,
    update: ServerUpdate,
    round_index: int,
    lora_rank: int | None,
    codings: Codings = PLAIN,
) -> int:
    """Of where a client of this LoRA rank starts, None for all directions: factors, cores and head."""
    receives = aggregator.receives(round_index)
    if codings.down is not None:
        rank = largest_rank(layout) if lora_rank is None else lora_rank
        return codings.down.length(receives, rank, update.sent_lora_rank)
    factors, rest = _numbers(layout, receives, lora_rank, update.sent_lora_rank)
    sketches = _sketch_numbers(layout, aggregator)
    return bytes_per_number(aggregator) * factors + BYTES_PER_NUMBER * (rest + (0 if sketches is None else sketches[1]))


def bytes_per_number(aggregator: Aggregator) -> int:
    """Of the factors from which clients start."""
    return BYTES_PER_NUMBER if aggregator.coding is None else start_dtype("A", aggregator.coding).itemsize


def _sketch_numbers(layout: AdapterLayout, aggregator: Aggregator) -> tuple[int, int] | None:
    """Of all layers, up and down; None where factors are sent."""
    of_layers = [aggregator.sketch_numbers(b[0], a[1], a[0]) for a, b in layout.factors.values()]
    sketches = [numbers for numbers in of_layers if numbers is not None]
    return (sum(up for up, _ in sketches), sum(down for _, down in sketches)) if sketches else None


def folded_part_bytes(
    layout: AdapterLayout, aggregator: Aggregator, update: ServerUpdate, codings: Codings = PLAIN
) -> dict[str, int]:
    """Of the folded part of each layer that has one, to one client."""
    coding: Coding | None = aggregator.coding
    if coding is not None:
        return {p: coding.message_bytes(f.rank, f.B.shape[0], f.A.shape[1]) for p, f in update.folded.items()}
    if codings.folded is not None:
        return folded_bytes(layout, forms_of(update.folded), codings.folded)
    return {path: BYTES_PER_NUMBER * numbers_to_send(factors) for path, factors in update.folded.items()}


def with_private_numbers(traffic: Traffic, clients: int, numbers: int) -> Traffic:
    """The same where each client of the round sends so many more numbers, for releases beside the mean."""
    return Traffic(traffic.up + BYTES_PER_NUMBER * clients * numbers, traffic.down)


def with_control_variates(traffic: Traffic) -> Traffic:
    """The same with SCAFFOLD: control variates of what is trained travel both ways, as in its paper."""
    return Traffic(2 * traffic.up, traffic.down + traffic.up)


def with_class_counts(traffic: Traffic, clients: int, classes: int) -> Traffic:
    """The same where each client of the round sends its number of training images of every class, 4 bytes each.

    All processes of a simulation know the partition, so that these numbers are counted and not moved.
    """
    return Traffic(traffic.up + clients * classes * BYTES_PER_NUMBER, traffic.down)


def with_losses(traffic: Traffic, clients: int) -> Traffic:
    """The same where each client of the round sends the loss that its weight follows from, 4 bytes."""
    return Traffic(traffic.up + clients * BYTES_PER_NUMBER, traffic.down)


def largest_rank(layout: AdapterLayout) -> int:
    """R."""
    return max((a[0] for a, _ in layout.factors.values()), default=0)


def part_bytes(layout: AdapterLayout, part: Part, lora_rank: int) -> int:
    """Of one part of an adapter of this LoRA rank, in float32."""
    return BYTES_PER_NUMBER * sum(_numbers(layout, (part,), lora_rank, {}))


def _numbers(
    layout: AdapterLayout, parts: Sequence[Part], lora_rank: int | None, sent_lora_rank: Mapping[str, int]
) -> tuple[int, int]:
    """Numbers in these parts of one client's adapter of this LoRA rank, None for all directions: factors, and the rest.

    The rest is the head and the cores, whose scales stay where they are.
    """
    total, rest = 0, layout.length_of(("head",)) if "head" in parts else 0
    rest += sum(math.prod(H) for H, _ in layout.cores.values()) if "core" in parts else 0
    for path, (a, b) in layout.factors.items():
        rank = a[0] if lora_rank is None else lora_rank
        total += min(rank, sent_lora_rank.get(path, rank)) * (("A" in parts) * a[1] + ("B" in parts) * b[0])
    return total, rest

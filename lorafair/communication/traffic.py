"""What a real federation would send: bytes up and down in a round, over all its clients.

Letters: R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorafair.aggregation.base import Aggregator, ServerUpdate
from lorafair.aggregation.coded_fold import Coding
from lorafair.communication.coding import start_dtype
from lorafair.communication.collectives import numbers_to_send
from lorafair.model.adapter import AdapterLayout, Part

BYTES_PER_NUMBER = 4  # adapters travel in float32


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round."""

    up: int = 0
    down: int = 0

    @property
    def total(self) -> int:
        """Both ways."""
        return self.up + self.down


def round_traffic(
    layout: AdapterLayout,
    aggregator: Aggregator,
    update: ServerUpdate,
    round_index: int,
    lora_ranks: Sequence[int],
) -> Traffic:
    """What the clients of a round, of these LoRA ranks, send and receive; nothing where data is pooled.

    A client of LoRA rank r sends and receives r rows of A and columns of B, and no more than the server has to send;
    where a method selects directions, all of them come down. A folded part counts as it is sent between processes: as
    factors, or as a matrix (O, I) where the server keeps that; a coded message counts its bytes. Sketches travel up
    instead of factors, and down beside them.
    """
    if aggregator.pools_data:
        return Traffic()
    coding = aggregator.coding
    of_factors = BYTES_PER_NUMBER if coding is None else start_dtype("A", coding).itemsize
    folded = _folded_bytes(update, coding)
    sends, receives = aggregator.sends(round_index), aggregator.receives(round_index)
    sketches = _sketch_numbers(layout, aggregator)
    up = down = 0
    for lora_rank, clients in Counter(lora_ranks).items():
        factors, rest = _numbers(layout, sends, lora_rank, {})
        up += clients * BYTES_PER_NUMBER * ((factors if sketches is None else sketches[0]) + rest)
        received = None if aggregator.selects_directions else lora_rank
        factors, rest = _numbers(layout, receives, received, update.sent_lora_rank)
        rest += 0 if sketches is None else sketches[1]
        down += clients * (of_factors * factors + BYTES_PER_NUMBER * rest + folded)
    return Traffic(up, down)


def _sketch_numbers(layout: AdapterLayout, aggregator: Aggregator) -> tuple[int, int] | None:
    """Of all layers, up and down; None where factors are sent."""
    of_layers = [aggregator.sketch_numbers(b[0], a[1], a[0]) for a, b in layout.factors.values()]
    sketches = [numbers for numbers in of_layers if numbers is not None]
    return (sum(up for up, _ in sketches), sum(down for _, down in sketches)) if sketches else None


def _folded_bytes(update: ServerUpdate, coding: Coding | None) -> int:
    """Of the folded parts of all layers, to one client."""
    if coding is None:
        return BYTES_PER_NUMBER * sum(map(numbers_to_send, update.folded.values()))
    return sum(coding.message_bytes(f.rank, f.B.shape[0], f.A.shape[1]) for f in update.folded.values())


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

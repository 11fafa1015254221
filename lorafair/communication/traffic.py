"""What a real federation would send: bytes up and down in a round, over all its clients.

Letters: R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorafair.aggregation.base import Aggregator, ServerUpdate
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
    factors, or as a matrix (O, I) where the server keeps that.
    """
    if aggregator.pools_data:
        return Traffic()
    folded = sum(map(numbers_to_send, update.folded.values()))
    sends, receives = aggregator.sends(round_index), aggregator.receives(round_index)
    up = down = 0
    for lora_rank, clients in Counter(lora_ranks).items():
        up += clients * _numbers(layout, sends, lora_rank, {})
        received = None if aggregator.selects_directions else lora_rank
        down += clients * (_numbers(layout, receives, received, update.sent_lora_rank) + folded)
    return Traffic(up * BYTES_PER_NUMBER, down * BYTES_PER_NUMBER)


def with_control_variates(traffic: Traffic) -> Traffic:
    """The same with SCAFFOLD: control variates of what is trained travel both ways, as in its paper."""
    return Traffic(2 * traffic.up, traffic.down + traffic.up)


def _numbers(
    layout: AdapterLayout, parts: Sequence[Part], lora_rank: int | None, sent_lora_rank: Mapping[str, int]
) -> int:
    """Numbers in these parts of one client's adapter of this LoRA rank; None for all directions."""
    total = layout.length_of(["head"]) if "head" in parts else 0
    total += sum(math.prod(H) for H, _ in layout.cores.values()) if "core" in parts else 0  # scales stay where they are
    for path, (a, b) in layout.factors.items():
        rank = a[0] if lora_rank is None else lora_rank
        total += min(rank, sent_lora_rank.get(path, rank)) * (("A" in parts) * a[1] + ("B" in parts) * b[0])
    return total

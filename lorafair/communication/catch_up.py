"""What clients that miss rounds have to catch up on: bytes down, added when they take part again.

The rule: a client of round t that took part in round s before is charged for all that the server made in the rounds
s + 1 to t. Its own round t is charged in any case (`traffic`); of the rounds between, s + 1 to t − 1, it needs

- of each layer, the folded parts of these rounds, or their sum as a matrix (O, I) in float32, if that is fewer bytes;
  what is merged of the factors themselves, by fresh starts or a reset, counts as a folded part;
- with compression.down, the differences of these rounds, or all that clients hold in float32, if that is fewer bytes;
- without, the newest of every part that is not sent in round t anyway.

A client that takes part for the first time has missed all rounds before. The initial adapter follows from the seed.

Letters: N clients of the run, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, ServerUpdate
from lorafair.communication.compression.codings import Codings
from lorafair.communication.traffic import (
    BYTES_PER_NUMBER,
    Traffic,
    bytes_per_number,
    client_traffic,
    folded_part_bytes,
    largest_rank,
    part_bytes,
    start_bytes,
)
from lorafair.model.adapter import PARTS, AdapterLayout


@dataclass(frozen=True)
class CatchUp:
    """What each client has missed since it last took part, in bytes."""

    layout: AdapterLayout
    aggregator: Aggregator
    codings: Codings
    merges: bool  # the factors that are sent are merged into the frozen weights

    def at_start(self, clients: int) -> Tensor:
        """Nothing is missed yet: (N, L + 1 + parts) int64.

        Of each layer the sum of its folded parts, then the sum of the coded differences, then the newest of every part.
        """
        return torch.zeros(clients, len(self.layout.factors) + 1 + len(PARTS), dtype=torch.int64)

    def traffic_of_round(
        self,
        missed: Tensor,
        update: ServerUpdate,
        round_index: int,
        clients: Sequence[int],
        lora_ranks: Sequence[int],
    ) -> list[Traffic]:
        """What these clients (K,) of the round send and receive, with what they had missed; moves `missed` on.

        `lora_ranks` (N,) are those of all clients of the run.
        """
        mine = [lora_ranks[client] for client in clients]
        of_round = client_traffic(self.layout, self.aggregator, update, round_index, mine, self.codings)
        charged = [
            Traffic(traffic.up, traffic.down + self.owed(missed[client].tolist(), round_index, lora_rank))
            for traffic, client, lora_rank in zip(of_round, clients, mine, strict=True)
        ]
        for lora_rank in set(lora_ranks):
            of_rank = [client for client, other in enumerate(lora_ranks) if other == lora_rank]
            self._note(missed, of_rank, update, round_index, lora_rank)
        missed[list(clients)] = 0
        return charged

    def owed(self, missed: Sequence[int], round_index: int, lora_rank: int) -> int:
        """Bytes for a client that takes part again, which is not charged for its own round here."""
        layers, layout = len(self.layout.factors), self.layout
        whole = [BYTES_PER_NUMBER * b[0] * a[1] for a, b in layout.factors.values()]
        owed = sum(map(min, missed[:layers], whole))
        if self.codings.down is not None:
            held = {part for earlier in range(round_index + 1) for part in self.aggregator.receives(earlier)}
            state = sum(part_bytes(layout, part, self._received(lora_rank)) for part in held)
            return owed + min(missed[layers], state + (sum(whole) if self.merges else 0))
        now = self.aggregator.receives(round_index)
        return owed + sum(n for part, n in zip(PARTS, missed[layers + 1 :], strict=True) if part not in now)

    def _note(
        self, missed: Tensor, clients: Sequence[int], update: ServerUpdate, round_index: int, lora_rank: int
    ) -> None:
        """What clients of this LoRA rank would have been sent in the round."""
        layout, receives, rank = self.layout, self.aggregator.receives(round_index), self._received(lora_rank)
        folded = folded_part_bytes(layout, self.aggregator, update, self.codings)
        made = [folded.get(path, 0) for path in layout.factors]
        if self.merges and self.codings.down is None:  # else the differences say what is merged
            sides = [("A" in receives) * a[1] + ("B" in receives) * b[0] for a, b in layout.factors.values()]
            of_number = bytes_per_number(self.aggregator)
            made = [m + of_number * rank * side for m, side in zip(made, sides, strict=True)]
        difference = 0
        if self.codings.down is not None:
            difference = start_bytes(layout, self.aggregator, update, round_index, rank, self.codings)
        missed[clients, : len(made) + 1] += torch.tensor([*made, difference])
        for place, part in enumerate(PARTS, start=len(made) + 1):
            if part in receives:
                missed[clients, place] = part_bytes(layout, part, rank)

    def _received(self, lora_rank: int) -> int:
        """Directions that come down to a client of this LoRA rank."""
        return largest_rank(self.layout) if self.aggregator.selects_directions else lora_rank


def has_to_catch_up(aggregator: Aggregator, *, merges: bool, coded: bool) -> bool:
    """Whether a client that has missed rounds needs more than what is sent in its round."""
    return aggregator.folds or merges or coded or len({aggregator.receives(index) for index in range(4)}) > 1

"""What clients send with compression.up: their way from the start, coded, and the server goes on with what it decodes.

With error feedback a client adds what the coding lost of its last update, e, and keeps what it loses of this one:
m = Q(x − x_start + e), the server gets x_start + m, and e becomes x − x_start + e − m.

Letters: C clients of a cohort, N clients of the run, P packed length, q numbers with error feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorafair.client.directions import directions_of
from lorafair.communication.compression.message import MessageFormat
from lorafair.experiment import Experiment
from lorafair.model.adapter import AdapterLayout, put_columns, take_columns
from lorafair.seeding import seeded_key
from lorafair.server.state import ServerState, client_residual_parts


@dataclass
class CodedUploads:
    """The rule of a round that codes what clients send."""

    experiment: Experiment
    state: ServerState
    _lost: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # by cohort, until they are taken

    def __call__(self, round_index: int, clients: Sequence[int], start: Tensor, rows: Tensor) -> Tensor:
        """What the server gets, (C, P). A client whose numbers are not finite is left as it is, and left out later."""
        sends, layout = self.experiment.aggregator.sends(round_index), self.experiment.layout
        sent, wanted = with_scaled_cores(layout, rows) if "core" in sends else rows, torch.zeros_like(rows)
        columns = layout.spans(sends)
        put_columns(wanted, columns, take_columns(sent, columns) - take_columns(start, columns))
        residuals, corrected = self.state.client_residuals, layout.spans(client_residual_parts(self.experiment))
        if residuals is not None:
            before = torch.zeros_like(rows)
            put_columns(before, corrected, residuals[torch.tensor(clients)].to(rows.device, non_blocking=True))
            wanted += before
        decoded = self._decoded(round_index, clients, wanted)
        result = sent.clone()
        put_columns(result, columns, take_columns(start, columns) + take_columns(decoded, columns))
        finite = wanted.isfinite().all(1, keepdim=True)
        if residuals is not None:
            self._lost[tuple(clients)] = take_columns(wanted - decoded, corrected)
        return torch.where(finite, result, rows)

    def take_lost(self, clients: Sequence[int]) -> Tensor | None:
        """What the coding has lost of these clients' updates, (C, q), once; None without error feedback."""
        return self._lost.pop(tuple(clients), None)

    def _decoded(self, round_index: int, clients: Sequence[int], wanted: Tensor) -> Tensor:
        """Messages and back, (C, P): clients of one LoRA rank side by side, because their messages have one length."""
        experiment, codings = self.experiment, self.experiment.codings
        coding = codings.up
        assert coding is not None
        message = MessageFormat(experiment.layout, experiment.aggregator.sends(round_index), coding, codings.head)
        seed, result = experiment.config.seed_of("client"), torch.zeros_like(wanted)
        chosen = [directions_of(experiment, self.state, client) for client in clients]
        for rank in {len(directions) for directions in chosen}:
            places = [place for place, directions in enumerate(chosen) if len(directions) == rank]
            keys = [seeded_key(seed, round_index, clients[place], "compression") for place in places]
            index = torch.tensor(places, device=wanted.device)
            of_rank = torch.stack([chosen[place] for place in places]).to(wanted.device)
            coded = message.encode(wanted[index].nan_to_num(), of_rank, torch.tensor(keys, device=wanted.device))
            result[index] = message.decode(coded, of_rank)
        return result


def with_scaled_cores(layout: AdapterLayout, rows: Tensor) -> Tensor:
    """Packed adapters (C, P) with the same cores s_i H_i, as they are sent: H times scale, and all scales 1."""
    result = rows.clone()
    for core in layout.unpack(result).cores.values():
        core.H.copy_(core.scaled)
        core.scales.fill_(1)
    return result

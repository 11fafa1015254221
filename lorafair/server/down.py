"""The server's update on its way to the clients: coded where compression says so, and the same on every rank.

Letters: p numbers sent, P packed length.
"""

from __future__ import annotations

from torch import Tensor

from lorafair.aggregation.base import ServerUpdate
from lorafair.communication.collectives import broadcast_update
from lorafair.communication.compression.folded import broadcast_folded
from lorafair.experiment import Experiment
from lorafair.model.adapter import LoRAFactors
from lorafair.seeding import seeded_key
from lorafair.server.state import ServerState


def send_down(
    experiment: Experiment, state: ServerState, update: ServerUpdate | None
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """What clients are sent of where they start, (p,), and what is folded; `update` is given on rank 0.

    As `broadcast_update`; what compression.down loses is kept in the state of rank 0. Call on every rank.
    """
    fabric, layout, aggregator = experiment.fabric, experiment.layout, experiment.aggregator
    codings, round_index = experiment.codings, state.completed_rounds
    seed, parts = experiment.config.seed_of("federation"), aggregator.receives(round_index)
    received, folded = broadcast_update(
        fabric,
        update,
        layout,
        parts=parts if codings.down is None else (),
        folds=aggregator.folds and codings.folded is None,
        coding=aggregator.coding,
    )
    if codings.down is not None:
        assert state.residual is not None
        key = seeded_key(seed, round_index, "compression")
        received = codings.down.broadcast(fabric, update, state.adapter, state.residual, parts, key)
    if codings.folded is not None:
        of_rank_0 = None if update is None else update.folded
        key = seeded_key(seed, round_index, "compression of what is folded")
        folded = broadcast_folded(fabric, of_rank_0, layout, codings.folded, key)
    return received, folded

"""Weights that favour clients whose loss is high: q-FedAvg (arXiv 1905.10497) and agnostic federated learning
(AFL, arXiv 1902.00146).

The loss F_k of a client is that of its first batch of the round, at the parameters that it was sent: the whole of its
images where they fit into a batch, else an estimate of their mean.

Letters: K clients of the round, N clients of the run, n clients of this rank, p numbers trained, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lorafair.aggregation.base import ServerUpdate
from lorafair.communication.collectives import ClientResults, gather_clients
from lorafair.config.schema import ClientConfig
from lorafair.experiment import Experiment
from lorafair.model.adapter import AdapterLayout, Part
from lorafair.schedule import RoundPlan, with_scheduled_learning_rate
from lorafair.server.state import ServerState, initial_adapters

_SMALLEST_LOSS = 1e-10  # as in the code of q-FedAvg's authors: F^(q-1) has to be finite


def weighted_by_losses(
    experiment: Experiment, state: ServerState, plan: RoundPlan, results: ClientResults
) -> ClientResults:
    """The results of a round with the weights that federation.weighting makes of the losses; `state` moves on.

    Call on every rank; all of them come to the same weights.
    """
    federation = experiment.config.federation
    if federation.weighting == "afl":
        assert state.mixture is not None
        assert federation.weighting_rate is not None
        index = list(results.clients)
        mixture = state.mixture[index].tolist()
        moved = afl_mixture(mixture, results.first_losses, federation.weighting_rate)
        state.mixture[index] = torch.tensor(moved, dtype=state.mixture.dtype)
        mass = math.fsum(mixture)
        return replace(results, weights=tuple(part / mass for part in mixture)) if mass > 0 else results
    if federation.weighting == "q":
        assert federation.weighting_q is not None
        q, shares, losses = federation.weighting_q, results.weights, results.first_losses
        results = replace(results, weights=q_weights(shares, losses, q))
        if federation.weighting_step == "qfedavg":
            distances = _squared_distances(experiment, state, plan, results)
            local = with_scheduled_learning_rate(experiment.local, state.completed_rounds)
            return replace(results, step=q_step(shares, losses, distances, q, lipschitz(local)))
    return results


def q_weights(shares: Sequence[float], losses: Sequence[float], q: float) -> tuple[float, ...]:
    """Weights ∝ p_k·F_k^q (K,), from p_k (K,) and F_k (K,); they sum to 1."""
    powers = _powers(losses, q)
    total = math.fsum(share * power for share, power in zip(shares, powers, strict=True))
    return tuple(share * power / total for share, power in zip(shares, powers, strict=True))


def q_step(
    shares: Sequence[float], losses: Sequence[float], distances: Sequence[float], q: float, lipschitz: float
) -> float:
    """The part S of the way to the weighted mean that q-FedAvg goes (algorithm 2), at most 1.

    With Δw_k = L·(w − w_k), Δ_k = F_k^q·Δw_k and h_k = q·F_k^(q−1)·‖Δw_k‖² + L·F_k^q, the paper's step is
    w − Σ_k p_k·Δ_k / Σ_k p_k·h_k = w + S·(Σ_k v_k·w_k − w): v_k are the `q_weights`, and
    S = Σ_k p_k·L·F_k^q / Σ_k p_k·h_k. `distances` (K,) are ‖w − w_k‖².
    """
    powers, largest = _powers(losses, q), max(_SMALLEST_LOSS, *losses)
    ahead = math.fsum(share * power for share, power in zip(shares, powers, strict=True))
    beside = math.fsum(
        share * q * power / (max(_SMALLEST_LOSS, loss) / largest) / largest * lipschitz * distance
        for share, power, loss, distance in zip(shares, powers, losses, distances, strict=True)
    )
    return ahead / (ahead + beside)


def _powers(losses: Sequence[float], q: float) -> list[float]:
    """(F_k / the largest)^q: the largest power is 1, whatever q is."""
    largest = max(_SMALLEST_LOSS, *losses)
    return [(max(_SMALLEST_LOSS, loss) / largest) ** q for loss in losses]


def lipschitz(config: ClientConfig) -> float:
    """L = 1/η of q-FedAvg; with momentum m, a constant gradient moves a parameter by η/(1 − m) a step in the end."""
    return (1 - (config.momentum or 0.0)) / config.learning_rate


def afl_mixture(mixture: Sequence[float], losses: Sequence[float], rate: float) -> list[float]:
    """AFL's step on λ (K,) of the clients of a round: λ + γ·F, projected onto λ_k >= 0 with the sum that it had.

    With all clients in every round that is the paper's projection onto the simplex. Else clients compete with those of
    the same round, and the λ of all others stay: nobody gains or loses by being drawn.
    """
    moved = project(np.array(mixture) + rate * np.array(losses), math.fsum(mixture))
    return [float(part) for part in moved]


def project(values: np.ndarray, mass: float) -> np.ndarray:
    """The nearest point to `values` (K,) with no negative number and the sum `mass` (Duchi et al., ICML 2008)."""
    descending = np.sort(values)[::-1]
    thresholds = (np.cumsum(descending) - mass) / np.arange(1, len(values) + 1)
    if not (above := np.flatnonzero(descending > thresholds)).size:  # mass is 0
        return np.zeros_like(values)
    nearest: np.ndarray = np.maximum(values - thresholds[above[-1]], 0.0)
    return nearest


def _squared_distances(
    experiment: Experiment, state: ServerState, plan: RoundPlan, results: ClientResults
) -> list[float]:
    """‖w − w_k‖² (K,) of what clients send, on every rank: each is computed on the rank that has the client's row."""
    fabric, layout, kept = experiment.fabric, experiment.layout, set(results.clients)
    trained, sent = (
        parts(state.completed_rounds) for parts in (experiment.aggregator.trains, experiment.aggregator.sends)
    )
    clients_of_rank = [[client for client in clients if client in kept] for clients in plan.clients_of_rank]
    mine = [
        _squared_distance(layout, initial_adapters(experiment, state, (client,)), row, trained, sent)
        for client, row in zip(clients_of_rank[fabric.global_rank], results.rows, strict=True)
    ]
    rows = torch.tensor(mine, dtype=torch.float64, device=fabric.device).view(-1, 1)
    return [float(distance) for distance in gather_clients(fabric, rows, clients_of_rank).squeeze(1).tolist()]


def _squared_distance(
    layout: AdapterLayout, start: Tensor, row: Tensor, trained: Sequence[Part], sent: Sequence[Part]
) -> float:
    """Of one client: from its start (1, P) to the numbers trained (p,), over the parts that it sends."""
    after = layout.replaced(start, trained, row.unsqueeze(0))
    moved = layout.select(after, sent).double() - layout.select(start, sent).double()
    return float(np.square(moved.cpu().numpy()).sum())  # by NumPy, whose sums do not depend on the number of threads


def stepped(
    layout: AdapterLayout, update: ServerUpdate, start: Tensor, step: float, received: Sequence[Part]
) -> ServerUpdate:
    """The update that goes a part of the way from `start` (P,) to what the method returns, in the parts it sends."""
    proposed = layout.pack(update.adapter)
    moved = proposed.clone()
    for span in layout.spans(received):
        moved[span] = start[span] + step * (proposed[span] - start[span])
    adapter = layout.unpack(moved)
    return replace(update, factors=adapter.factors, head=adapter.head, cores=adapter.cores)

"""The federation: clients train, the server corrects, the next round starts. Start reading at `run_federation`.

Letters: W ranks, K clients of the round, n clients of this rank, N clients of the run, M adapters, P packed length.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NoReturn

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lorafair.adapter import AdapterState, LoRAFactors
from lorafair.aggregation import ServerUpdate, aggregate
from lorafair.assembly import Federation, assemble
from lorafair.checkpoint import Checkpoint, save_checkpoint
from lorafair.client import train_cohort
from lorafair.config import Config
from lorafair.data.loading import cohort_steps, local_batches
from lorafair.evaluation import Evaluation
from lorafair.exchange import (
    Returned,
    broadcast_update,
    finite_clients,
    gather_clients,
    same_error_on_all_ranks,
    stop_all_ranks,
)
from lorafair.report import Report
from lorafair.schedule import RoundPlan
from lorafair.seeding import seeded
from lorafair.tracking import Clock


@dataclass
class ServerState:
    """What one round hands to the next; the same on every rank."""

    completed_rounds: int
    adapter: Tensor  # (P,) where clients start
    own: Tensor | None  # (N, P) what each client keeps: initialization=local, and personal methods
    folded: bool = False  # the frozen weights have changed
    totals: dict[str, float] = field(default_factory=dict)  # counted since round 1


def run_federation(fabric: Fabric, config: Config) -> None:
    """Run the rounds that are not done yet and leave the results in config.run_dir. Call on every rank."""
    federation, found = assemble(fabric, config)
    state = start_or_resume(federation, found)
    report = Report(federation, state.completed_rounds) if fabric.is_global_zero else None
    evaluation = None
    while state.completed_rounds < config.rounds:
        clock = Clock(fabric.device)
        plan = federation.plan(state.completed_rounds)
        with clock("train"), same_error_on_all_ranks(fabric):
            rows = train_clients(federation, state, plan)
        with clock("gather"):
            returned = finite_clients(gather_clients(fabric, rows, plan), plan)
        if not returned.clients:
            give_up(federation, state)
        with clock("server"), same_error_on_all_ranks(fabric):
            update = serve(federation, returned) if fabric.is_global_zero else None
        with clock("broadcast"):
            start, folded = send_update(federation, update, returned)
        apply_update(federation, state, returned, start, folded)
        with clock("evaluate"):
            evaluation = evaluate(federation, state)
        with same_error_on_all_ranks(fabric):
            if report is not None:
                report.round(state.completed_rounds, state.totals, plan, returned, update, evaluation, clock)
            save(federation, state)
    if evaluation is None:  # nothing was left to do
        evaluation = evaluate(federation, state, always=True)
    if report is not None and evaluation is not None:
        report.finish(state.totals, evaluation)


def start_or_resume(federation: Federation, found: Checkpoint | None) -> ServerState:
    """The state after a checkpoint, or that before the first round."""
    fabric, config, adapters = federation.fabric, federation.config, federation.model.adapters
    adapter = adapters.draw(config.seed, 0).to(fabric.device)
    keeps_own = federation.aggregator.personal or config.federation.initialization == "local"
    own = adapter.repeat(len(federation.clients), 1) if keeps_own else None
    if found is None:
        return ServerState(completed_rounds=0, adapter=adapter, own=own)
    base = {name.removeprefix("base."): t for name, t in found.tensors.items() if name.startswith("base.")}
    adapters.load_base_weights(base)
    return ServerState(
        completed_rounds=found.completed_rounds,
        adapter=found.tensors["adapter"].to(fabric.device),
        own=found.tensors["own"].to(fabric.device) if keeps_own else None,
        folded=bool(base),
        totals=dict(found.totals),
    )


def train_clients(federation: Federation, state: ServerState, plan: RoundPlan) -> Tensor:
    """Train this rank's clients; returns (n, P + 2): packed adapter, mean loss and seconds of each."""
    fabric, config, round_index = federation.fabric, federation.config, state.completed_rounds
    cohorts = plan.cohorts_of_rank[fabric.global_rank]
    seed = config.seed
    steps_of = [
        cohort_steps(
            [
                local_batches(federation.clients[c].indices, federation.local, seeded(seed, round_index, c))
                for c in cohort
            ]
        )
        for cohort in cohorts
    ]
    stream = federation.train_source.batches([step.indices.reshape(-1) for steps in steps_of for step in steps])
    rows = []
    for cohort, steps in zip(cohorts, steps_of, strict=True):
        began = time.perf_counter()
        result = train_cohort(
            federation.model,
            starts(federation, state, cohort),
            steps,
            (batch.to(fabric.device, non_blocking=True) for batch in islice(stream, len(steps))),
            federation.labels,
            federation.local,
            generators=[seeded(seed, round_index, c, "dropout", device=fabric.device) for c in cohort],
            autocast=fabric.autocast,
        )
        losses = result.losses.cpu()  # waits for the device, so that the seconds are the cohort's
        seconds = torch.full_like(losses, (time.perf_counter() - began) / len(cohort))
        rows.append(torch.cat([result.rows, torch.stack([losses, seconds], dim=1).to(result.rows)], dim=1))
    return torch.cat(rows) if rows else torch.empty(0, len(state.adapter) + 2, device=fabric.device)


def starts(federation: Federation, state: ServerState, clients: tuple[int, ...]) -> Tensor:
    """Packed adapters (C, P) these clients start the round from."""
    if state.own is None:
        return state.adapter.expand(len(clients), -1)
    own = state.own[list(clients)]
    if not federation.aggregator.personal:  # initialization=local: own factors, everybody's head
        length = federation.model.adapters.layout.adapter_length
        own[:, length:] = state.adapter[length:]
    return own


def give_up(federation: Federation, state: ServerState) -> NoReturn:
    """End the run, with the last good state saved, when no client returned finite numbers. Call on every rank."""
    save(federation, state, always=True)
    local = federation.config.client
    stop_all_ranks(
        federation.fabric,
        f"round {state.completed_rounds + 1}: every client returned NaN or infinite adapters; lower "
        f"client.learning_rate ({local.learning_rate:g}) or set client.clip_norm ({local.clip_norm}). "
        f"The state after round {state.completed_rounds} is kept in {federation.config.folder}",
    )


def serve(federation: Federation, returned: Returned) -> ServerUpdate:
    """The server step, on rank 0."""
    clients = federation.model.adapters.layout.unpack(returned.rows)
    weights = torch.tensor(returned.weights, dtype=torch.float64, device=returned.rows.device)
    return aggregate(federation.aggregator, clients, weights)


def send_update(
    federation: Federation, update: ServerUpdate | None, returned: Returned
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """The update of rank 0 on every rank: packed start (P,), or (K, P) where personal, and what to fold."""
    return broadcast_update(
        federation.fabric,
        update,
        federation.model.adapters.layout,
        rows=len(returned.clients) if federation.aggregator.personal else None,
        folds=federation.aggregator.folds,
    )


def apply_update(
    federation: Federation,
    state: ServerState,
    returned: Returned,
    start: Tensor,
    folded: Mapping[str, LoRAFactors],
) -> None:
    """Move the state to the next round: fold into the frozen weights first, then set where clients start."""
    adapters, config = federation.model.adapters, federation.config
    state.completed_rounds += 1
    adapters.fold_into_base(folded)
    state.folded |= bool(folded)
    if federation.aggregator.personal:
        assert state.own is not None
        state.own[list(returned.clients)] = start
        return
    if config.federation.initialization == "fresh":
        received = adapters.layout.unpack(start)
        adapters.fold_into_base(received.factors)
        fresh = adapters.layout.unpack(adapters.draw(config.seed, state.completed_rounds).to(start.device))
        start = adapters.layout.pack(AdapterState(factors=fresh.factors, head=received.head))
        state.folded = True
    elif config.federation.initialization == "local":
        assert state.own is not None
        state.own[list(returned.clients)] = returned.rows
    state.adapter = start


def evaluate(federation: Federation, state: ServerState, *, always: bool = False) -> Evaluation | None:
    """Accuracy of the global adapter, or of every client's own one; None between the rounds that evaluate."""
    config = federation.config
    due = state.completed_rounds % config.evaluation.every == 0 or state.completed_rounds == config.rounds
    if not (due or always):
        return None
    personal = federation.aggregator.personal and state.own is not None
    adapters = state.own if personal else state.adapter.unsqueeze(0)
    assert adapters is not None
    return federation.evaluator(federation.model, adapters)


def save(federation: Federation, state: ServerState, *, always: bool = False) -> None:
    """Write a checkpoint on rank 0, where it is due."""
    config = federation.config
    due = state.completed_rounds % config.checkpoint.every == 0 or state.completed_rounds == config.rounds
    if not federation.fabric.is_global_zero or not (due or always):
        return
    tensors = {"adapter": state.adapter} | ({"own": state.own} if state.own is not None else {})
    if state.folded:
        tensors |= {f"base.{path}": w for path, w in federation.model.adapters.base_weights().items()}
    checkpoint = Checkpoint(
        completed_rounds=state.completed_rounds,
        tensors={name: tensor.cpu() for name, tensor in tensors.items()},
        identity=federation.identity,
        totals=state.totals,
    )
    save_checkpoint(config.folder, checkpoint, config.checkpoint.keep)

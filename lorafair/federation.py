"""The federation: clients train, the server corrects, the next round starts. Start reading at `run_federation`.

Letters: W ranks, K clients of the round, n clients of this rank, N clients of the run, M adapters, P packed length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NoReturn

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lorafair.adapter import AdapterState, LoRAFactors
from lorafair.aggregation import ServerUpdate, aggregate
from lorafair.assembly import Federation, assemble
from lorafair.checkpoint import Checkpoint, save_checkpoint
from lorafair.client import in_round, reach, train_cohort
from lorafair.config import Config
from lorafair.control_variates import ControlVariates
from lorafair.data.augmentation import augmented
from lorafair.data.loading import cohort_steps, local_batches, number_of_batches
from lorafair.evaluation import Evaluation
from lorafair.exchange import (
    Returned,
    StopSign,
    broadcast_update,
    finite_clients,
    gather_clients,
    same_error_on_all_ranks,
    stop_all_ranks,
    sum_over_ranks,
)
from lorafair.interruption import Interrupted
from lorafair.partial_round import PartialRound, drop_unfinished, list_unfinished, start_of_round
from lorafair.report import Report
from lorafair.schedule import RoundPlan
from lorafair.seeding import seeded
from lorafair.server_optimizer import Moments, server_step
from lorafair.tracking import Clock, say


@dataclass
class ServerState:
    """What one round hands to the next; the same on every rank."""

    completed_rounds: int
    adapter: Tensor  # (P,) where clients start
    own: Tensor | None = None  # (N, P) what each client keeps: `kept_parts` of its row
    moments: Moments | None = None  # of the server optimiser, where there is one; moved on by rank 0 alone
    controls: ControlVariates | None = None  # of SCAFFOLD
    folded: bool = False  # the frozen weights have changed
    left_unfinished: frozenset[int] = frozenset()  # rounds, from 0, of which some clients' results are on disk
    totals: dict[str, float] = field(default_factory=dict)  # counted since round 1


def run_federation(fabric: Fabric, config: Config) -> None:
    """Run the rounds that are not done yet and leave the results in config.run_dir. Call on every rank.

    Raises Interrupted on every rank, after all that is done is saved, where a signal or the job's time limit asks to
    stop.
    """
    federation, found = assemble(fabric, config)
    state = start_or_resume(federation, found)
    report = Report(federation, state.completed_rounds) if fabric.is_global_zero else None
    evaluation, sign = None, StopSign(fabric)
    while state.completed_rounds < config.rounds:
        clock = Clock(fabric.device)
        partial, plan = begin_round(federation, state)
        with partial.kept_on_failure():
            with clock("train"), same_error_on_all_ranks(fabric) as agreed:
                trained = train_clients(federation, state, plan, partial, sign)
            if agreed.stop:
                stop(federation, state, plan, partial, len(trained), agreed.stop)
            with sign.measured("rest of the round"):
                with clock("gather"):
                    returned = finite_clients(gather_clients(fabric, trained, plan), plan)
                if not returned.clients:
                    give_up(federation, state)
                rows = rows_of(federation, state, returned)
                with clock("server"), same_error_on_all_ranks(fabric):
                    update = serve(federation, state, returned, rows) if fabric.is_global_zero else None
                with clock("broadcast"):
                    received, folded = send_update(federation, state, update)
                update_controls(federation, state, returned, rows)
                apply_update(federation, state, returned, rows, received, folded)
                with clock("evaluate"):
                    evaluation = evaluate(federation, state)
                with same_error_on_all_ranks(fabric):
                    if report is not None:
                        report.round(
                            state.completed_rounds, state.totals, plan, returned, rows, update, evaluation, clock
                        )
                    save(federation, state)
    if evaluation is None:  # nothing was left to do
        evaluation = evaluate(federation, state, always=True)
    if report is not None and evaluation is not None:
        report.finish(state.totals, evaluation)


def start_or_resume(federation: Federation, found: Checkpoint | None) -> ServerState:
    """The state after a checkpoint, or that before the first round."""
    fabric, config, adapters = federation.fabric, federation.config, federation.model.adapters
    adapter = adapters.draw(config.seed, 0).to(fabric.device)
    clients = len(federation.clients)
    state = ServerState(
        completed_rounds=0,
        adapter=adapter,
        own=adapter.repeat(clients, 1) if federation.kept_parts else None,
        moments=Moments.at_start(config.server, adapter) if config.server.optimizer != "none" else None,
        controls=ControlVariates.at_start(clients, adapter) if config.client.scaffold else None,
    )
    if found is not None:
        base = {name.removeprefix("base."): t for name, t in found.tensors.items() if name.startswith("base.")}
        adapters.load_base_weights(base)
        for name, tensor in tensors_of(state).items():
            tensor.copy_(found.tensors[name])
        state.completed_rounds, state.totals, state.folded = found.completed_rounds, dict(found.totals), bool(base)
    # Rank 0 looks: file systems lag between nodes.
    state.left_unfinished = fabric.broadcast(frozenset(list_unfinished(config.folder) if fabric.is_global_zero else ()))
    return state


def tensors_of(state: ServerState) -> dict[str, Tensor]:
    """The state's own tensors by the names they have in a checkpoint."""
    tensors = {"adapter": state.adapter}
    if state.own is not None:
        tensors["own"] = state.own
    if state.moments is not None:
        tensors |= {"moments.first": state.moments.first, "moments.second": state.moments.second}
    if state.controls is not None:
        tensors |= {"controls.server": state.controls.server, "controls.clients": state.controls.clients}
    return tensors


def begin_round(federation: Federation, state: ServerState) -> tuple[PartialRound, RoundPlan]:
    """What an interrupted attempt has left of the round, on rank 0, and who trains the rest, on every rank."""
    config, round_index = federation.config, state.completed_rounds
    partial = PartialRound(
        config.folder,
        round_index,
        start=lambda: start_of_round(federation.identity, round_index, state.adapter),
        seconds=config.checkpoint.seconds,
    )
    if round_index not in state.left_unfinished:
        return partial, federation.plan(round_index)
    if federation.fabric.is_global_zero:
        partial.read()
    plan = federation.plan(round_index, finished=federation.fabric.broadcast(list(partial.found)))
    if federation.fabric.is_global_zero and partial.found:
        done = sum(len(cohort) for cohort in plan.cohorts_of_rank[0] if cohort in partial.found)
        say(f"round {round_index + 1}: {done} clients were done before the interruption")
    return partial, plan


def train_clients(
    federation: Federation, state: ServerState, plan: RoundPlan, partial: PartialRound, sign: StopSign
) -> Tensor:
    """Train this rank's clients; returns (n, p + 2): the numbers trained, mean loss and seconds of each.

    Those that are done already are taken from `partial`, and what is trained is added to it. Fewer are returned if the
    stop sign goes up.
    """
    fabric, seed, round_index = federation.fabric, federation.config.seed, state.completed_rounds
    parts, layout = federation.aggregator.trains(round_index), federation.model.adapters.layout
    local = in_round(federation.local, round_index)
    rows = [partial.found[c].to(fabric.device) for c in plan.cohorts_of_rank[fabric.global_rank] if c in partial.found]
    cohorts = [cohort for cohort in plan.cohorts_of_rank[fabric.global_rank] if cohort not in partial.found]
    steps_of = [
        cohort_steps(
            [local_batches(federation.clients[c].indices, local, seeded(seed, round_index, c)) for c in cohort]
        )
        for cohort in cohorts
    ]
    stream = federation.train_source.batches([step.indices.reshape(-1) for steps in steps_of for step in steps])
    augmentation = federation.config.data.augmentation
    for cohort, steps in zip(cohorts, steps_of, strict=True):
        if sign.is_up("cohort"):
            break
        with sign.measured("cohort"):
            began = time.perf_counter()
            batches = islice(stream, len(steps))
            inputs: Iterator[Tensor] = (batch.to(fabric.device, non_blocking=True) for batch in batches)
            if augmentation != "none":
                crop = augmentation == "crop_flip"
                inputs = augmented(inputs, steps, cohort, seed=seed, round_index=round_index, crop=crop)
            result = train_cohort(
                federation.model,
                starts(federation, state, cohort),
                steps,
                inputs,
                federation.labels,
                local,
                generators=[seeded(seed, round_index, c, "dropout", device=fabric.device) for c in cohort],
                autocast=fabric.autocast,
                parts=parts,
                corrections=None if state.controls is None else state.controls.corrections(cohort),
            )
            losses = result.losses.cpu()  # waits for the device, so that the seconds are the cohort's
            seconds = torch.full_like(losses, (time.perf_counter() - began) / len(cohort))
        measured = torch.stack([losses, seconds], dim=1).to(result.rows)
        rows.append(torch.cat([layout.select(result.rows, parts), measured], dim=1))
        partial.add(cohort, rows[-1])
    sign.is_up("rest of the round")
    width = layout.length_of(parts) + 2
    return torch.cat(rows) if rows else torch.empty(0, width, device=fabric.device)


def stop(
    federation: Federation, state: ServerState, plan: RoundPlan, partial: PartialRound, done: int, reason: int
) -> NoReturn:
    """End the run where it can go on, with `done` clients of this rank's saved. Call on every rank."""
    fabric, config = federation.fabric, federation.config
    with same_error_on_all_ranks(fabric):
        partial.write()
        if state.completed_rounds % config.checkpoint.every:
            save(federation, state, always=True)
    total = int(sum_over_ranks(fabric, torch.tensor(done, device=fabric.device)))
    raise Interrupted(
        reason,
        f"in round {state.completed_rounds + 1} of {config.rounds}, with {total} of its {len(plan.clients)} clients "
        f"done; all of it is kept in {config.folder}",
    )


def starts(federation: Federation, state: ServerState, clients: tuple[int, ...]) -> Tensor:
    """Packed adapters (C, P) these clients start the round from."""
    layout, kept = federation.model.adapters.layout, federation.kept_parts
    if state.own is None:
        rows = state.adapter.expand(len(clients), -1)
    else:
        rows = layout.replaced(state.adapter, kept, layout.select(state.own[list(clients)], kept))
    ranks = torch.tensor([federation.ranks[client] for client in clients], device=rows.device)
    return rows if bool((ranks == federation.config.model.lora.rank).all()) else layout.truncated(rows, ranks)


def rows_of(federation: Federation, state: ServerState, returned: Returned) -> Tensor:
    """Packed adapters (K, P) after training: what was trained, and the rest as the clients started."""
    parts = federation.aggregator.trains(state.completed_rounds)
    return federation.model.adapters.layout.replaced(
        starts(federation, state, returned.clients), parts, returned.trained
    )


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


def serve(federation: Federation, state: ServerState, returned: Returned, rows: Tensor) -> ServerUpdate:
    """The server step, on rank 0."""
    layout, aggregator = federation.model.adapters.layout, federation.aggregator
    weights = torch.tensor(returned.weights, dtype=torch.float64, device=rows.device)
    update = aggregate(aggregator, layout.unpack(rows), weights, layout.unpack(state.adapter))
    if state.moments is None:
        return update
    proposed = layout.pack(AdapterState(factors=update.factors, head=update.head))
    columns = layout.spans(aggregator.receives(state.completed_rounds))
    moved = layout.unpack(server_step(federation.config.server, state.moments, state.adapter, proposed, columns))
    return replace(update, factors=moved.factors, head=moved.head)


def update_controls(federation: Federation, state: ServerState, returned: Returned, rows: Tensor) -> None:
    """Move SCAFFOLD's control variates on, from where the clients started and ended; before the state moves on."""
    if state.controls is None:
        return
    local = in_round(federation.local, state.completed_rounds)
    parts = federation.aggregator.trains(state.completed_rounds)
    sizes = [len(client.indices) for client in federation.clients]
    shares = sizes if federation.config.federation.weighting == "size" else [1] * len(sizes)
    steps = [number_of_batches(sizes[client], local) for client in returned.clients]
    state.controls.update(
        returned.clients,
        [shares[client] / sum(shares) for client in returned.clients],
        starts(federation, state, returned.clients) - rows,
        {part: federation.model.adapters.layout.slices[part] for part in parts},
        {part: [reach(local, part, count) for count in steps] for part in parts},
    )


def send_update(
    federation: Federation, state: ServerState, update: ServerUpdate | None
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """The update of rank 0 on every rank: the numbers of the parts that are sent, and what to fold."""
    aggregator = federation.aggregator
    return broadcast_update(
        federation.fabric,
        update,
        federation.model.adapters.layout,
        parts=aggregator.receives(state.completed_rounds),
        folds=aggregator.folds,
    )


def apply_update(
    federation: Federation,
    state: ServerState,
    returned: Returned,
    rows: Tensor,
    received: Tensor,
    folded: Mapping[str, LoRAFactors],
) -> None:
    """Move the state to the next round: fold into the frozen weights first, then set where clients start."""
    adapters, config, aggregator = federation.model.adapters, federation.config, federation.aggregator
    layout = adapters.layout
    state.adapter = layout.replaced(state.adapter, aggregator.receives(state.completed_rounds), received)
    state.completed_rounds += 1
    adapters.fold_into_base(folded)
    state.folded |= bool(folded)
    if config.federation.initialization == "fresh":
        adapters.fold_into_base(layout.unpack(state.adapter).factors)
        state.folded = True
    if config.federation.initialization == "fresh" or aggregator.restarts:
        fresh = adapters.draw(config.seed, state.completed_rounds).to(received.device)
        state.adapter = layout.replaced(state.adapter, ("A", "B"), layout.select(fresh, ("A", "B")))
    if state.own is not None:
        state.own[list(returned.clients)] = rows


def evaluate(federation: Federation, state: ServerState, *, always: bool = False) -> Evaluation | None:
    """Accuracy of the global adapter, or of every client's own one; None between the rounds that evaluate."""
    config = federation.config
    due = state.completed_rounds % config.evaluation.every == 0 or state.completed_rounds == config.rounds
    if not (due or always):
        return None
    everyone = tuple(range(len(federation.clients)))
    adapters = starts(federation, state, everyone) if federation.aggregator.keeps else state.adapter.unsqueeze(0)
    return federation.evaluator(federation.model, adapters)


def save(federation: Federation, state: ServerState, *, always: bool = False) -> None:
    """Write a checkpoint on rank 0, where it is due."""
    config = federation.config
    due = state.completed_rounds % config.checkpoint.every == 0 or state.completed_rounds == config.rounds
    if not federation.fabric.is_global_zero or not (due or always):
        return
    tensors = tensors_of(state)
    if state.folded:
        tensors |= {f"base.{path}": w for path, w in federation.model.adapters.base_weights().items()}
    checkpoint = Checkpoint(
        completed_rounds=state.completed_rounds,
        tensors={name: tensor.cpu() for name, tensor in tensors.items()},
        identity=federation.identity,
        totals=state.totals,
    )
    save_checkpoint(config.folder, checkpoint, config.checkpoint.keep)
    drop_unfinished(config.folder, state.completed_rounds)

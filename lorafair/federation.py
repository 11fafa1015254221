"""The federation: clients train, the server corrects, the next round starts. Start reading at `run_federation`.

Letters: W ranks, K clients of the round, n clients of this rank, N clients of the run, M adapters, P packed length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NoReturn

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lorafair.adapter import PARTS, AdapterLayout, AdapterState, LoRAFactors, put_columns, take_columns
from lorafair.aggregation import ServerUpdate, aggregate, bias_metrics
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
    exchange_columns,
    finite_clients,
    gather_clients,
    gather_objects,
    same_error_on_all_ranks,
    stop_all_ranks,
    sum_over_ranks,
)
from lorafair.interruption import Interrupted
from lorafair.partial_round import PartialRound, drop_unfinished, list_unfinished, start_of_round
from lorafair.report import Report
from lorafair.schedule import RoundPlan, learn_seconds
from lorafair.seeding import seeded
from lorafair.server_optimizer import Moments, server_step
from lorafair.tracking import Clock, say
from lorafair.watchdog import expecting, saving, step

SHORTEST_INTERVAL = 1.0  # seconds between checkpoints: one takes some milliseconds, as does a round of a tiny model
HALF_PRECISION_SCALE = 4096.0  # lifts gradients over half precision's smallest number, 6e-8


@dataclass
class ServerState:
    """What one round hands to the next; the same on every rank but for `moments`."""

    completed_rounds: int
    adapter: Tensor  # (P,) where clients start
    own: Tensor | None = None  # (N, P) what each client keeps: `kept_parts` of its row
    moments: Moments | None = None  # of the server optimiser; of use for the layers a rank serves, on rank 0 for all
    controls: ControlVariates | None = None  # of SCAFFOLD
    folded: bool = False  # the frozen weights have changed
    left_unfinished: frozenset[int] = frozenset()  # rounds, from 0, of which some clients' results are on disk
    totals: dict[str, float] = field(default_factory=dict)  # counted since round 1
    seconds: dict[int, float] = field(default_factory=dict)  # that clients took lately; decides who trains where
    saved_rounds: int = 0  # completed rounds of the last checkpoint
    saved_at: float = field(default_factory=time.monotonic)


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
        with partial.kept_on_failure(), saving(partial.write):
            with clock("train"), same_error_on_all_ranks(fabric) as agreed:
                trained = train_clients(federation, state, plan, partial, sign)
            if agreed.stop:
                stop(federation, state, plan, partial, len(trained), agreed.stop)
            with sign.measured("rest of the round"):
                with clock("gather"):
                    returned = finite_clients(fabric, trained, plan)
                    if not returned.clients:
                        give_up(federation, state)
                    learn_seconds(state.seconds, plan.clients, returned.seconds)
                    rows = rows_of(federation, state, plan, returned, trained)
                    del trained  # as large as the rows
                with clock("server"):
                    with same_error_on_all_ranks(fabric):
                        share = serve(federation, state, returned, rows)
                    joined = join_shares(federation, state, share)
                with clock("broadcast"):
                    received, folded = send_update(federation, state, None if joined is None else joined.update)
                update_controls(federation, state, returned, rows)
                apply_update(federation, state, returned, rows, received, folded)
                with clock("evaluate"):
                    evaluation = evaluate(federation, state)
                with same_error_on_all_ranks(fabric):
                    if report is not None and joined is not None:
                        update, bias = joined.update, joined.bias
                        report.round(
                            state.completed_rounds, state.totals, plan, returned, update, bias, evaluation, clock
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
        state.seconds, state.saved_rounds = dict(found.seconds), found.completed_rounds
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
        return partial, federation.plan(round_index, state.seconds)
    if federation.fabric.is_global_zero:
        partial.read()
    plan = federation.plan(round_index, state.seconds, federation.fabric.broadcast(list(partial.found)))
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
        names = " or ".join(federation.clients[client].name for client in cohort)
        limit = _seconds(local.timeout_minutes)
        with sign.measured("cohort"), expecting(f"round {round_index + 1}: client {names}", limit):
            began = time.perf_counter()
            batches = _stepwise(islice(stream, len(steps)))
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
                loss_scale=HALF_PRECISION_SCALE if federation.config.fabric.precision == "16-mixed" else 1.0,
            )
            losses = result.losses.cpu()  # waits for the device, so that the seconds are the cohort's
            seconds = torch.full_like(losses, (time.perf_counter() - began) / len(cohort))
        measured = torch.stack([losses, seconds], dim=1).to(result.rows)
        rows.append(torch.cat([layout.select(result.rows, parts), measured], dim=1))
        partial.add(cohort, rows[-1])
    sign.is_up("rest of the round")
    width = layout.length_of(parts) + 2
    return torch.cat(rows) if rows else torch.empty(0, width, device=fabric.device)


def _stepwise(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches; each that is asked for is a sign that the client gets on."""
    for batch in batches:
        step()
        yield batch


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else 60 * minutes


def stop(
    federation: Federation, state: ServerState, plan: RoundPlan, partial: PartialRound, done: int, reason: int
) -> NoReturn:
    """End the run where it can go on, with `done` clients of this rank's saved. Call on every rank."""
    fabric, config = federation.fabric, federation.config
    with same_error_on_all_ranks(fabric):
        partial.write()
        if state.completed_rounds != state.saved_rounds:
            save(federation, state, always=True)
    total = int(sum_over_ranks(fabric, torch.tensor(done, device=fabric.device)))
    raise Interrupted(
        reason,
        f"in round {state.completed_rounds + 1} of {config.rounds}, with {total} of its {len(plan.clients)} clients "
        f"done; all of it is kept in {config.folder}",
    )


def starts(
    federation: Federation, state: ServerState, clients: tuple[int, ...], shard: AdapterLayout | None = None
) -> Tensor:
    """Packed adapters (C, P) these clients start the round from, or the layers of a shard of them."""
    layout, kept = federation.model.adapters.layout, federation.kept_parts
    if state.own is not None:
        rows = layout.replaced(state.adapter, kept, layout.select(state.own[list(clients)], kept))
    elif shard is None:
        rows = state.adapter.expand(len(clients), -1)
    else:
        rows = take_columns(state.adapter, layout.columns_of(shard, PARTS)).expand(len(clients), -1)
    ranks = [federation.ranks[client] for client in clients]
    if all(rank == federation.config.model.lora.rank for rank in ranks):
        return rows
    return (shard or layout).truncated(rows, torch.tensor(ranks, device=rows.device))


def shards_of(federation: Federation) -> list[AdapterLayout]:
    """The layers that each rank aggregates; without fabric.server=sharded all of them on rank 0."""
    layout, count = federation.model.adapters.layout, federation.fabric.world_size
    if federation.config.fabric.server == "sharded":
        return layout.split(count)
    return [layout, *[AdapterLayout(factors={}, head={})] * (count - 1)]


def rows_of(federation: Federation, state: ServerState, plan: RoundPlan, returned: Returned, trained: Tensor) -> Tensor:
    """Packed adapters (K, P) after training: what was trained, and the rest as the clients started.

    Of the layers that this rank aggregates; of all where each rank goes on with what clients keep or their control
    variates. `trained` (n, p + 2) are this rank's rows.
    """
    fabric, layout = federation.fabric, federation.model.adapters.layout
    parts, mine = federation.aggregator.trains(state.completed_rounds), plan.clients_of_rank[fabric.global_rank]
    kept = set(returned.clients)
    clients_of_rank = [[client for client in clients if client in kept] for clients in plan.clients_of_rank]
    if returned.dropped:
        trained = trained[[index for index, client in enumerate(mine) if client in kept]]
    if state.own is not None or state.controls is not None:
        shard = layout
        rows = gather_clients(fabric, trained[:, :-2], clients_of_rank)
    else:
        shards = shards_of(federation)
        shard = shards[fabric.global_rank]
        columns = [layout.columns_of(other, parts) for other in shards]
        rows = exchange_columns(fabric, trained, clients_of_rank, columns)
    if rows.shape[1] == shard.length:  # all of it was trained
        return rows
    return shard.replaced(starts(federation, state, returned.clients, shard), parts, rows)


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


@dataclass(frozen=True)
class Share:
    """What a rank makes of its layers."""

    update: ServerUpdate
    bias: dict[str, Tensor]  # metrics of what is left in every layer (L,), where adapters are averaged
    moments: Moments | None  # of the server optimiser, moved on

    def to(self, device: torch.device | str) -> Share:
        """The same on another device."""
        moments = self.moments
        return Share(
            update=self.update.to(device),
            bias={name: values.to(device) for name, values in self.bias.items()},
            moments=None if moments is None else Moments(moments.first.to(device), moments.second.to(device)),
        )


def serve(federation: Federation, state: ServerState, returned: Returned, rows: Tensor) -> Share:
    """The server step on the layers of this rank; none of the numbers depends on how the layers are dealt out."""
    layout, aggregator = federation.model.adapters.layout, federation.aggregator
    shard = shards_of(federation)[federation.fabric.global_rank]
    if not shard.length:
        return Share(ServerUpdate(factors={}, folded={}, head={}, sent_rank={}), bias={}, moments=None)
    weights = torch.tensor(returned.weights, dtype=torch.float64, device=rows.device)
    columns = layout.columns_of(shard, PARTS)
    clients, start = shard.unpack(rows), take_columns(state.adapter, columns)
    update, moments = aggregate(aggregator, clients, weights, shard.unpack(start)), None
    if state.moments is not None:
        moments = Moments(*(take_columns(moment, columns).clone() for moment in state.moments.tensors))
        proposed = shard.pack(AdapterState(factors=update.factors, head=update.head))
        spans = shard.spans(aggregator.receives(state.completed_rounds))
        moved = shard.unpack(server_step(federation.config.server, moments, start, proposed, spans))
        update = replace(update, factors=moved.factors, head=moved.head)
        remember(federation, state, shard, moments)
    bias = {} if aggregator.keeps or aggregator.pools_data else bias_metrics(clients, weights, update)
    return Share(update, bias, moments)


def remember(federation: Federation, state: ServerState, shard: AdapterLayout, moments: Moments | None) -> None:
    """Keep the moments of some layers: rank 0 those of all, other ranks at least their own."""
    if state.moments is not None and moments is not None:
        columns = federation.model.adapters.layout.columns_of(shard, PARTS)
        for whole, some in zip(state.moments.tensors, moments.tensors, strict=True):
            put_columns(whole, columns, some)


def join_shares(federation: Federation, state: ServerState, share: Share) -> Share | None:
    """What all ranks have made of their layers, on rank 0. Call on every rank."""
    layout, fabric, shards = federation.model.adapters.layout, federation.fabric, shards_of(federation)
    if federation.config.fabric.server == "rank0":
        return share if fabric.is_global_zero else None
    gathered = gather_objects(fabric, share.to("cpu"))
    if gathered is None:
        return None
    shares = [share.to(fabric.device) for share in gathered]
    for shard, other in zip(shards, shares, strict=True):
        remember(federation, state, shard, other.moments)
    position = {path: index for index, path in enumerate(path for share in shares for path in share.update.factors)}
    order = [position[path] for path in layout.factors]
    return Share(
        update=ServerUpdate.joined([share.update for share in shares], list(layout.factors)),
        bias={
            name: torch.cat([share.bias[name] for share in shares if share.bias])[order]
            for name in dict.fromkeys(name for share in shares for name in share.bias)
        },
        moments=state.moments,
    )


def update_controls(federation: Federation, state: ServerState, returned: Returned, rows: Tensor) -> None:
    """Move SCAFFOLD's control variates on, from where the clients started and ended; before the state moves on."""
    if state.controls is None:
        return
    local = in_round(federation.local, state.completed_rounds)
    parts = federation.aggregator.trains(state.completed_rounds)
    sizes = federation.sizes
    shares = sizes if federation.config.federation.weighting == "size" else [1] * len(sizes)
    whole = sum(shares)
    steps = [number_of_batches(sizes[client], local) for client in returned.clients]
    state.controls.update(
        returned.clients,
        [shares[client] / whole for client in returned.clients],
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
    federation.model.adapters.resize(1)
    adapters = starts(federation, state, everyone) if federation.aggregator.keeps else state.adapter.unsqueeze(0)
    with expecting(f"the evaluation after round {state.completed_rounds}", _seconds(config.client.timeout_minutes)):
        return federation.evaluator(federation.model, adapters)


def save(federation: Federation, state: ServerState, *, always: bool = False) -> None:
    """Write a checkpoint on rank 0, where it is due."""
    config = federation.config
    every = config.checkpoint.every
    if every == "auto":
        due = time.monotonic() - state.saved_at >= SHORTEST_INTERVAL
    else:
        due = state.completed_rounds % every == 0
    due |= state.completed_rounds == config.rounds
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
        seconds=state.seconds,
    )
    save_checkpoint(config.folder, checkpoint, config.checkpoint.keep)
    drop_unfinished(config.folder, state.completed_rounds)
    state.saved_rounds, state.saved_at = state.completed_rounds, time.monotonic()

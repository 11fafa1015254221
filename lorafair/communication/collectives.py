"""The collectives that move adapters: clients' rows to the server, its update to all.

What they keep to, so that they run over NCCL as over gloo; tests/communication/test_nccl_rules.py checks it:

- All ranks join every collective, in the same order, with the same count and dtype; else NCCL hangs or mixes up data
  (docs.nvidia.com, NCCL user guide, "Collective Operations"). So all_reduce and broadcast are all that is used, and
  what has another size on every rank moves between those two that it concerns.
- Such sends may leave out ranks, because they are never a group's first operation (pytorch.org, torch.distributed,
  batch_isend_irecv). all_to_all_single would not: since NCCL 2.14 PyTorch sends messages of zero bytes, too
  (pytorch#103140), so that every rank connects to every other one. Nothing empty is sent here.
- Tensors are on the rank's device and contiguous, of a dtype that NCCL has: not int16, not complex (getNcclDataType in
  PyTorch's ProcessGroupNCCL.cpp). Objects travel as bytes on the device (docs of gather_object).
- One group, one thread, one stream: operations of several communicators could wait for each other on the device (NCCL
  user guide, "Using multiple NCCL communicators concurrently"). Progress and heartbeats use the store instead.

Letters: W ranks, K clients of the round, n clients of this rank, L adapted layers, P packed length.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.coded_fold import Coding
from lorafair.aggregation.factor_algebra import clients_at_a_time, is_identity
from lorafair.communication.coding import decode, encode, folded_ranks, message_length
from lorafair.model.adapter import AdapterLayout, LoRAFactors, Part, take_columns
from lorafair.schedule import RoundPlan

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
# Of all clients, that a rank sends or receives at a time: 1 MB of float32, which stays in a CPU's cache and is twice as
# fast as 64 MB. On a GPU it is 64 MB, because each message costs 15 microseconds before it is on its way. For the same
# reason columns move in so many steps at most.
_NUMBERS_AT_A_TIME = 2**18
_MORE_ON_GPUS = 64
_MOST_STEPS = {"cpu": 64, "gpu": 16}
BOTH, ONLY_A, ONLY_B = range(3)  # which factors of a folded product are sent


def gather_clients(fabric: Fabric, rows: Tensor, clients_of_rank: Sequence[Sequence[int]]) -> Tensor:
    """All clients' rows (K, P), clients ascending, on every rank, from each rank's own (n, P). Call on every rank.

    A rank's rows are in the order of `clients_of_rank`; ranks may have different numbers of clients, also none. An
    all-gather would need equal numbers, so W times the largest: all K where one rank has the clients of an interrupted
    round. Here rows are added up with the zeros of the other ranks, as integers, which keeps every bit.
    """
    order = _ascending(clients_of_rank).to(rows.device)
    if fabric.world_size == 1 or not len(order):
        return rows.index_select(0, order)
    begin = sum(map(len, clients_of_rank[: fabric.global_rank]))
    mine = order.argsort()[begin : begin + len(rows)]  # where the rows of this rank belong
    gathered = rows.new_zeros(len(order), rows.shape[1]).index_copy_(0, mine, rows)
    for block in gathered.split(max(1, _at_a_time(rows) // max(1, rows.shape[1]))):
        sum_over_ranks(fabric, block.view(torch.int32))
    return gathered


def _at_a_time(rows: Tensor) -> int:
    return _NUMBERS_AT_A_TIME * (1 if rows.device.type == "cpu" else _MORE_ON_GPUS)


def _ascending(clients_of_rank: Sequence[Sequence[int]]) -> Tensor:
    """Where the rows of the clients, ascending, are among those of all ranks, one rank's after the other's: (K,)."""
    return torch.tensor(list(chain.from_iterable(clients_of_rank)), dtype=torch.int64).argsort()


def exchange_columns(
    fabric: Fabric, rows: Tensor, clients_of_rank: Sequence[Sequence[int]], columns_of_rank: Sequence[Sequence[slice]]
) -> Tensor:
    """Some columns of all clients' rows, those that are this rank's, (K, p) with clients ascending. Call on every rank.

    Each rank gives its own clients' rows (n, P) in the order of `clients_of_rank`. Columns move some at a time, so that
    beyond what is given and returned little memory is used, on the rank that sends most and the one that receives most.
    """
    if fabric.world_size == 1 and list(clients_of_rank[0]) == sorted(clients_of_rank[0]):
        return take_columns(rows, columns_of_rank[0])
    counts = [len(clients) for clients in clients_of_rank]
    order = _ascending(clients_of_rank).to(rows.device)
    spans_of_rank = {rank: columns for rank, columns in enumerate(columns_of_rank) if columns}
    moved_together = max(1, sum(counts), max(counts) * len(spans_of_rank))  # for each column
    longest = max(map(_length, spans_of_rank.values()), default=0)
    steps = _MOST_STEPS["cpu" if rows.device.type == "cpu" else "gpu"]
    width = max(1, _at_a_time(rows) // moved_together, -(-longest // steps))
    pieces_of_rank = {rank: _pieces(columns, width) for rank, columns in spans_of_rank.items()}
    mine = pieces_of_rank.get(fabric.global_rank, [])
    result = rows.new_empty(len(order), _length(columns_of_rank[fabric.global_rank]))
    done = 0
    for step in range(max(map(len, pieces_of_rank.values()), default=0)):
        sent = {
            rank: take_columns(rows, pieces[step]).contiguous()
            for rank, pieces in pieces_of_rank.items()
            if step < len(pieces)
        }
        size = _length(mine[step]) if step < len(mine) else 0
        received = rows.new_empty(len(order), size)
        _send(fabric, sent, dict(enumerate(received.split(counts))) if size else {})
        result[:, done : done + size] = received.index_select(0, order)
        done += size
    return result


def _length(columns: Sequence[slice]) -> int:
    return sum(span.stop - span.start for span in columns)


def _pieces(columns: Sequence[slice], width: int) -> list[list[slice]]:
    """The same columns, so many at a time."""
    pieces: list[list[slice]] = []
    room = 0
    for span in columns:
        start = span.start
        while start < span.stop:
            if not room:
                pieces.append([])
                room = width
            stop = min(span.stop, start + room)
            pieces[-1].append(slice(start, stop))
            start, room = stop, room - (stop - start)
    return pieces


def _send(fabric: Fabric, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
    """Send to some ranks, and receive from some, contiguous tensors whose sizes both sides know; empty ones stay."""
    me = fabric.global_rank
    if me in received:
        received[me].copy_(sent[me])
    operations = [dist.P2POp(dist.irecv, t, rank) for rank, t in received.items() if rank != me and t.numel()]
    operations += [dist.P2POp(dist.isend, t, rank) for rank, t in sent.items() if rank != me and t.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def gather_objects(fabric: Fabric, mine: T) -> list[T] | None:
    """What every rank gives, in the order of the ranks, on rank 0. Tensors should be on the CPU. Call on every rank.

    PyTorch's gather_object pads all of them to the largest, and holds W of that on the device of rank 0.
    """
    if fabric.world_size == 1:
        return [mine]
    packed = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8).to(fabric.device)
    sizes = torch.zeros(fabric.world_size, dtype=torch.int64, device=fabric.device)
    sizes[fabric.global_rank] = len(packed)
    sum_over_ranks(fabric, sizes)
    if not fabric.is_global_zero:
        _send(fabric, {0: packed}, {})
        return None
    lengths = sizes.tolist()
    pieces = torch.empty(sum(lengths), dtype=torch.uint8, device=fabric.device).split(lengths)
    _send(fabric, {0: packed}, dict(enumerate(pieces)))
    return [pickle.loads(piece.cpu().numpy()) for piece in pieces]


@dataclass(frozen=True)
class ClientResults:
    """What the server works with: the clients of a round that returned finite numbers."""

    clients: tuple[int, ...]  # ascending
    weights: tuple[float, ...]  # (K,) renormalised to sum 1
    losses: tuple[float, ...]  # (K,) mean training loss
    seconds: tuple[float, ...]  # of all clients of the plan, in plan order: training time
    dropped: tuple[int, ...]  # clients left out
    rows: Tensor  # (n, p) numbers trained by this rank's clients; once the server has gathered them, adapters (K, P)
    metrics: Mapping[str, float] = field(default_factory=dict)  # what rules tell of the round, by name in metrics.csv
    first_losses: tuple[float, ...] = ()  # (K,) of each client's first batch, where weights follow from them
    step: float = 1.0  # the part of the way that the server goes to what the method returns
    row_weights: tuple[float, ...] | None = None  # where the server has put other rows in their place
    counts: Mapping[str, float] = field(default_factory=dict)  # what is added to the totals since round 1
    measures: Tensor | None = None  # (K', M) of all clients of the plan, in plan order, where they measure something


def drop_nonfinite(
    fabric: Fabric, trained: Tensor, plan: RoundPlan, measured: int = 2, measures: int = 0
) -> ClientResults:
    """Leave out clients whose adapter holds NaN or infinity and renormalise the weights of the others.

    `trained` (n, p + M + 2) are this rank's numbers trained, M `measures`, mean loss and seconds, in the order of
    `plan.clients_of_rank`; all but the first and one more number a client are gathered. With three numbers `measured`,
    the loss of the first batch stands before the mean one, and has to be finite, too. Call on every rank.
    """
    # Some rows at a time, because the mask of all of them would be as large as a quarter of them.
    blocks, beside_rows = trained.split(clients_at_a_time(trained.shape[1])), measures + measured
    finite_here = torch.cat([block[:, :-2].isfinite().all(1, keepdim=True) for block in blocks])  # (n, 1)
    beside = torch.cat([trained[:, -beside_rows:], finite_here.to(trained)], dim=1)
    table = gather_clients(fabric, beside, plan.clients_of_rank)
    *first, losses, seconds, finite = table[:, measures:].T.tolist()
    kept = [index for index, ok in enumerate(finite) if ok]
    total = sum(plan.weights[index] for index in kept)
    dropped = tuple(client for client, ok in zip(plan.clients, finite, strict=True) if not ok)
    rows = trained[:, :-beside_rows]
    return ClientResults(
        clients=tuple(plan.clients[index] for index in kept),
        weights=tuple(plan.weights[index] / total for index in kept),
        losses=tuple(losses[index] for index in kept),
        seconds=tuple(seconds),
        dropped=dropped,
        rows=rows[finite_here.squeeze(1)] if dropped else rows,
        first_losses=tuple(of_client[index] for of_client in first for index in kept),
        measures=table[:, :measures] if measures else None,
    )


def broadcast_update(
    fabric: Fabric,
    update: ServerUpdate | None,
    layout: AdapterLayout,
    *,
    parts: Sequence[Part],
    folds: bool,
    coding: Coding | None = None,
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """The server's update on every rank; `update` is given on rank 0. Call on every rank.

    Returns the numbers of `parts` in the order of a packed row, and the factors to fold into the frozen weights. One
    broadcast of one tensor; where the method folds (`folds`), the forms of the folded factors are sent first, because
    the other processes do not know them. With a `coding` the message is coded, and so many bytes.
    """
    if coding is not None:
        return _broadcast_coded(fabric, update, layout, parts, coding)
    device = fabric.device
    rows = [(0, BOTH)] * len(layout.factors)  # (L, LoRA rank and what is sent)
    numbers: list[Tensor] = []
    if update is not None:
        numbers.append(layout.select(layout.pack(update.adapter), parts))
        for index, path in enumerate(layout.factors):
            if folds and path in update.folded:
                factors = update.folded[path]
                sent = which_factors(factors)
                rows[index] = factors.rank, sent
                numbers += [factor.flatten() for factor in _sent(factors, sent)]
    forms = torch.tensor(rows, dtype=torch.int64).view(-1, 2).to(device)
    if folds and fabric.world_size > 1:
        dist.broadcast(forms, src=0)
    shapes = {
        path: (((lora_rank, a[1]), (b[0], lora_rank)), sent)
        for (path, (a, b)), (lora_rank, sent) in zip(
            layout.factors.items(), forms.tolist() if folds else [(0, BOTH)] * len(forms), strict=True
        )
        if lora_rank
    }
    start_length = layout.length_of(parts)
    folded_length = sum(
        (sent != ONLY_B) * math.prod(a) + (sent != ONLY_A) * math.prod(b) for (a, b), sent in shapes.values()
    )
    message = torch.empty(start_length + folded_length, device=device) if update is None else torch.cat(numbers).float()
    if fabric.world_size > 1 and message.numel():
        dist.broadcast(message, src=0)
    return message[:start_length], _received_factors(message[start_length:], shapes)


def _broadcast_coded(
    fabric: Fabric, update: ServerUpdate | None, layout: AdapterLayout, parts: Sequence[Part], coding: Coding
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """As `broadcast_update`: rank 0, too, goes on with what the message says."""
    folded = {} if update is None else update.folded
    ranks = torch.tensor(folded_ranks(folded, layout), dtype=torch.int64).to(fabric.device)
    if fabric.world_size > 1:
        dist.broadcast(ranks, src=0)
    of_layers = ranks.tolist()
    if update is None:
        length = message_length(layout, parts, of_layers, coding)
        message = torch.empty(length, dtype=torch.uint8, device=fabric.device)
    else:
        message = encode(update, layout, parts, coding)
    if fabric.world_size > 1:
        dist.broadcast(message, src=0)
    return decode(message, layout, parts, of_layers, coding)


def which_factors(factors: LoRAFactors) -> int:
    """A product that is kept as a matrix has an identity for its other factor, which need not be sent."""
    if factors.rank != min(factors.A.shape[1], factors.B.shape[0]):
        return BOTH
    if is_identity(factors.B):
        return ONLY_A
    return ONLY_B if is_identity(factors.A) else BOTH


def _sent(factors: LoRAFactors, sent: int) -> list[Tensor]:
    return [factors.A] * (sent != ONLY_B) + [factors.B] * (sent != ONLY_A)


def numbers_to_send(factors: LoRAFactors) -> int:
    """How many numbers of a folded product `broadcast_update` sends."""
    return sum(factor.numel() for factor in _sent(factors, which_factors(factors)))


def _received_factors(
    message: Tensor, shapes: Mapping[str, tuple[tuple[tuple[int, int], tuple[int, int]], int]]
) -> dict[str, LoRAFactors]:
    """Factors by path from their numbers; `shapes` are those of A and B, and which of them were sent."""
    offset, found = 0, {}

    def take(shape: tuple[int, int], is_sent: bool) -> Tensor:
        nonlocal offset
        if not is_sent:
            return torch.eye(*shape, dtype=message.dtype, device=message.device)
        start, offset = offset, offset + math.prod(shape)
        return message[start:offset].view(shape)

    for path, ((a, b), sent) in shapes.items():
        A = take(a, sent != ONLY_B)
        found[path] = LoRAFactors(A=A, B=take(b, sent != ONLY_A))
    return found


def sum_over_ranks(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place. Call on every rank."""
    if fabric.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def smallest_over_ranks(fabric: Fabric, number: int) -> int:
    """The smallest of the ranks' numbers, on every rank. Call on every rank."""
    if fabric.world_size == 1:
        return number
    smallest = torch.tensor(number, device=fabric.device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def on_all_ranks(fabric: Fabric, holds: bool) -> bool:
    """Whether something holds on every rank; the same answer on all of them. Call on every rank."""
    return bool(smallest_over_ranks(fabric, int(holds)))

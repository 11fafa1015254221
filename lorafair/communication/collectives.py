"""The collectives that move adapters: clients' rows to the server, its update to all.

Letters: W ranks, K clients of the round, n clients of this rank, L adapted layers, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.factor_algebra import clients_at_a_time, is_identity
from lorafair.model.adapter import AdapterLayout, AdapterState, LoRAFactors, Part, take_columns
from lorafair.schedule import RoundPlan

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
_NUMBERS_AT_A_TIME = 2**24  # of all clients, that a rank receives at a time: 64 MB of float32
_BOTH, _ONLY_A, _ONLY_B = range(3)  # which factors of a folded product are sent


def gather_clients(fabric: Fabric, rows: Tensor, clients_of_rank: Sequence[Sequence[int]]) -> Tensor:
    """All clients' rows (K, P), clients ascending, on every rank, from each rank's own (n, P). Call on every rank.

    A rank's rows are in the order of `clients_of_rank`; ranks may have different numbers of clients, also none.
    """
    if fabric.world_size > 1:
        width = max(len(clients) for clients in clients_of_rank)
        padded = torch.zeros(width, rows.shape[1], dtype=rows.dtype, device=rows.device)
        padded[: len(rows)] = rows
        gathered = torch.empty(fabric.world_size * width, rows.shape[1], dtype=rows.dtype, device=rows.device)
        dist.all_gather(list(gathered.chunk(fabric.world_size)), padded)
    else:
        width, gathered = len(rows), rows
    return gathered[_ascending(clients_of_rank, [rank * width for rank in range(fabric.world_size)])]


def _ascending(clients_of_rank: Sequence[Sequence[int]], offsets: Sequence[int]) -> list[int]:
    """Where the rows of the clients, ascending, are among those that each rank's `offsets` are the first of."""
    position = {
        client: offset + index
        for clients, offset in zip(clients_of_rank, offsets, strict=True)
        for index, client in enumerate(clients)
    }
    return [position[client] for client in sorted(position)]


def exchange_columns(
    fabric: Fabric, rows: Tensor, clients_of_rank: Sequence[Sequence[int]], columns_of_rank: Sequence[Sequence[slice]]
) -> Tensor:
    """Some columns of all clients' rows, those that are this rank's, (K, p) with clients ascending. Call on every rank.

    Each rank gives its own clients' rows (n, P) in the order of `clients_of_rank`. Columns move a fixed number at a
    time, so that beyond what is given and returned little memory is used.
    """
    if fabric.world_size == 1 and list(clients_of_rank[0]) == sorted(clients_of_rank[0]):
        return take_columns(rows, columns_of_rank[0])
    counts = [len(clients) for clients in clients_of_rank]
    order = _ascending(clients_of_rank, [sum(counts[:rank]) for rank in range(len(counts))])
    width = max(1, _NUMBERS_AT_A_TIME // max(1, sum(counts)))
    pieces_of_rank = [_pieces(columns, width) for columns in columns_of_rank]
    mine = pieces_of_rank[fabric.global_rank]
    result = rows.new_empty(sum(counts), sum(piece.stop - piece.start for piece in mine))
    done = 0
    for step in range(max(map(len, pieces_of_rank))):
        sent = [rows[:, pieces[step] if step < len(pieces) else slice(0, 0)] for pieces in pieces_of_rank]
        size = mine[step].stop - mine[step].start if step < len(mine) else 0
        received = rows.new_empty(sum(counts) * size)
        if fabric.world_size > 1:
            dist.all_to_all_single(
                received,
                torch.cat([piece.flatten() for piece in sent]),
                [count * size for count in counts],
                [piece.numel() for piece in sent],
            )
        else:
            received.copy_(sent[0].flatten())
        result[:, done : done + size] = received.view(sum(counts), size)[order]
        done += size
    return result


def _pieces(columns: Sequence[slice], width: int) -> list[slice]:
    """The same columns in slices of at most this width."""
    return [
        slice(start, min(start + width, span.stop)) for span in columns for start in range(span.start, span.stop, width)
    ]


def gather_objects(fabric: Fabric, mine: T) -> list[T] | None:
    """What every rank gives, in the order of the ranks, on rank 0. Tensors should be on the CPU. Call on every rank."""
    if fabric.world_size == 1:
        return [mine]
    gathered: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
    dist.gather_object(mine, gathered)
    return gathered


@dataclass(frozen=True)
class ClientResults:
    """What the server works with: the clients of a round that returned finite numbers."""

    clients: tuple[int, ...]  # ascending
    weights: tuple[float, ...]  # (K,) renormalised to sum 1
    losses: tuple[float, ...]  # (K,) mean training loss
    seconds: tuple[float, ...]  # of all clients of the plan, in plan order: training time
    dropped: tuple[int, ...]  # clients left out
    rows: Tensor  # (n, p) numbers trained by this rank's clients; once the server has gathered them, adapters (K, P)


def drop_nonfinite(fabric: Fabric, trained: Tensor, plan: RoundPlan) -> ClientResults:
    """Leave out clients whose adapter holds NaN or infinity and renormalise the weights of the others.

    `trained` (n, p + 2) are this rank's numbers trained, mean loss and seconds, in the order of `plan.clients_of_rank`;
    three numbers a client are gathered. Call on every rank.
    """
    # Some rows at a time, because the mask of all of them would be as large as a quarter of them.
    blocks = trained.split(clients_at_a_time(trained.shape[1]))
    finite_here = torch.cat([block[:, :-2].isfinite().all(1, keepdim=True) for block in blocks])  # (n, 1)
    table = gather_clients(fabric, torch.cat([trained[:, -2:], finite_here.to(trained)], dim=1), plan.clients_of_rank)
    losses, seconds, finite = table.T.tolist()
    kept = [index for index, ok in enumerate(finite) if ok]
    total = sum(plan.weights[index] for index in kept)
    dropped = tuple(client for client, ok in zip(plan.clients, finite, strict=True) if not ok)
    rows = trained[:, :-2]
    return ClientResults(
        clients=tuple(plan.clients[index] for index in kept),
        weights=tuple(plan.weights[index] / total for index in kept),
        losses=tuple(losses[index] for index in kept),
        seconds=tuple(seconds),
        dropped=dropped,
        rows=rows[finite_here.squeeze(1)] if dropped else rows,
    )


def broadcast_update(
    fabric: Fabric, update: ServerUpdate | None, layout: AdapterLayout, *, parts: Sequence[Part], folds: bool
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """The server's update on every rank; `update` is given on rank 0. Call on every rank.

    Returns the numbers of `parts` in the order of a packed row, and the factors to fold into the frozen weights. One
    broadcast of one tensor; where the method folds (`folds`), the forms of the folded factors are sent first, because
    the other processes do not know them.
    """
    device = fabric.device
    forms = torch.zeros(len(layout.factors), 2, dtype=torch.int64, device=device)  # (L, LoRA rank and what is sent)
    numbers: list[Tensor] = []
    if update is not None:
        numbers.append(layout.select(layout.pack(AdapterState(factors=update.factors, head=update.head)), parts))
        for index, path in enumerate(layout.factors):
            if path in update.folded:
                factors = update.folded[path]
                sent = _factors_to_send(factors)
                forms[index] = torch.tensor([factors.rank, sent])
                numbers += [factors.A.flatten()] if sent != _ONLY_B else []
                numbers += [factors.B.flatten()] if sent != _ONLY_A else []
    if folds and fabric.world_size > 1:
        dist.broadcast(forms, src=0)
    shapes = {
        path: (((lora_rank, a[1]), (b[0], lora_rank)), sent)
        for (path, (a, b)), (lora_rank, sent) in zip(
            layout.factors.items(), forms.tolist() if folds else [(0, _BOTH)] * len(forms), strict=True
        )
        if lora_rank
    }
    start_length = layout.length_of(parts)
    folded_length = sum(
        (sent != _ONLY_B) * math.prod(a) + (sent != _ONLY_A) * math.prod(b) for (a, b), sent in shapes.values()
    )
    message = torch.empty(start_length + folded_length, device=device) if update is None else torch.cat(numbers).float()
    if fabric.world_size > 1 and message.numel():
        dist.broadcast(message, src=0)
    return message[:start_length], _received_factors(message[start_length:], shapes)


def _factors_to_send(factors: LoRAFactors) -> int:
    """A product that is kept as a matrix has an identity for its other factor, which need not be sent."""
    if factors.rank != min(factors.A.shape[1], factors.B.shape[0]):
        return _BOTH
    if is_identity(factors.B):
        return _ONLY_A
    return _ONLY_B if is_identity(factors.A) else _BOTH


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
        A = take(a, sent != _ONLY_B)
        found[path] = LoRAFactors(A=A, B=take(b, sent != _ONLY_A))
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

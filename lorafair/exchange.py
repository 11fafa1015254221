"""Every collective of a federation: clients' rows to the server, its update to all, and agreement on errors.

Letters: W ranks, K clients of the round, n clients of this rank, L adapted layers, P packed length.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor

from lorafair.adapter import AdapterLayout, AdapterState, LoRAFactors, Part, take_columns
from lorafair.aggregation import ServerUpdate
from lorafair.aggregation.factor_algebra import clients_at_a_time
from lorafair.cluster import Placement, detect
from lorafair.config import ConfigError, FabricConfig
from lorafair.errors import LorafairError
from lorafair.interruption import ANOTHER_RANK, NOTHING, ask, ask_unless_it_fits, asked
from lorafair.schedule import RoundPlan
from lorafair.watchdog import Watch

MEETING_MINUTES = 10.0
# Of malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD with bytes. What is larger still goes back at once.
_MALLOC_OPTIONS = ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26))
# By which users choose themselves.
_MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
# What gloo, NCCL and PyTorch's store say when a process is gone.
_SIGNS_OF_LOSS = (
    "losed by peer", "eset by peer", "roken pipe", "imed out", "imeout", "NCCL", "got 0 bytes", "likely closed",
    "refused",
)  # fmt: skip

T = TypeVar("T")
_NUMBERS_AT_A_TIME = 2**24  # of all clients, that a rank receives at a time: 64 MB of float32


def make_fabric(config: FabricConfig, placement: Placement | None = None) -> Fabric:
    """A Fabric whose ranks share nothing but the collectives of this module; call `launch()` on it.

    Fabric's "ddp" strategy brings launcher and process group; where the processes are, `cluster.detect` has found out
    unless it is given. The model is never passed to `fabric.setup`, which would average the gradients of different
    clients.
    """
    placement = placement or detect(os.environ, config, [sys.executable, *sys.argv])
    cuda = torch.cuda.is_available()
    if config.accelerator == "cuda" and not cuda:
        raise ConfigError("fabric.accelerator=cuda: no CUDA device is visible; use fabric.accelerator=cpu or auto")
    accelerator = "cpu" if config.accelerator == "cpu" or not cuda else "cuda"
    devices = placement.devices or (torch.cuda.device_count() if accelerator == "cuda" else 1)
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(f"fabric.devices={devices}: this node shows {torch.cuda.device_count()} CUDA devices")
    if accelerator == "cuda" and config.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported():
        raise ConfigError("fabric.precision=bf16-mixed: this GPU has no bfloat16; use fabric.precision=32-true")
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise ConfigError("fabric.precision=16-mixed is for GPUs; use fabric.precision=bf16-mixed or 32-true")
    # Given explicitly: Lightning's own look at Slurm's variables is wrong for jobs named bash, for steps, ...
    alone = devices * placement.num_nodes == 1
    environments = {"own": _Alone if alone else LightningEnvironment, "torchrun": TorchElasticEnvironment}
    kind = environments.get(placement.launcher)
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=placement.num_nodes,
        strategy=_Strategy(timeout=timedelta(minutes=config.timeout_minutes)),
        precision=config.precision,
        plugins=[kind() if kind is not None else _SlurmStep(placement)],
    )


class _Strategy(DDPStrategy):
    """Lightning's, but for the thread that ends this process by SIGKILL when one that it has started fails.

    `watchdog.Watch` looks after them, tells why, saves what is done and leaves with a status that says what happened.
    """

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class _Launcher(_SubprocessScriptLauncher):
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        return function(*args, **kwargs)


class _Alone(LightningEnvironment):
    """A single process, which meets nobody: the system chooses its port, so that runs side by side do not collide."""

    @property
    def main_port(self) -> int:
        return 0


class _SlurmStep(ClusterEnvironment):
    """The processes that srun has started, as `cluster.detect` has found them."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._placement.address

    @property
    def main_port(self) -> int:
        return self._placement.port

    @staticmethod
    def detect() -> bool:
        return False  # lorafair.cluster does

    def world_size(self) -> int:
        return (self._placement.devices or 1) * self._placement.num_nodes

    def set_world_size(self, size: int) -> None:
        """Slurm has decided."""

    def global_rank(self) -> int:
        return self._placement.rank

    def set_global_rank(self, rank: int) -> None:
        """Slurm has decided; with --distribution=cyclic neighbouring ranks are on different nodes."""

    def local_rank(self) -> int:
        return self._placement.local_rank

    def node_rank(self) -> int:
        return self._placement.node_rank


def meet(fabric: Fabric, config: FabricConfig, watch: Watch) -> None:
    """Start the processes, or meet those that are started, and have them watch one another. Bounded in time."""
    with watch.expecting("the start of all processes of the run", 60 * min(MEETING_MINUTES, config.timeout_minutes)):
        fabric.launch()
    if fabric.world_size > 1:
        watch.follow(_store(), fabric.global_rank, fabric.world_size, config.heartbeat_seconds)


def children_of(fabric: Fabric) -> Sequence[Any]:
    """The processes that this one starts at launch; filled by then."""
    strategy: Any = fabric.strategy
    return getattr(strategy.launcher, "procs", ())


def is_loss(error: Exception) -> bool:
    """Whether an error of a collective says that another process is gone, or does not answer."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # PyTorch has no public name for it


def set_threads(fabric: Fabric, threads: int | None) -> int:
    """Give this process its share of the node's cores and return it; call before `launch`.

    More threads than cores cost far more than they give: spinning threads of two processes on one core made single
    operations 100 times slower.
    """
    if threads is None:
        given = os.environ.get("OMP_NUM_THREADS", "")
        of_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
        strategy: Any = fabric.strategy
        share = len(os.sched_getaffinity(0)) // int(strategy.num_processes)
        threads = next((int(value) for value in (given, of_task) if value.isdigit()), max(1, share))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that Fabric starts, and so that it sets no other
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones; whether it can (glibc).

    It would give memory of more than some megabytes back to the system at once. Each activation of a training step then
    came as fresh pages, which the system clears and maps one by one: a tenth of a step on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    chosen = any(name in os.environ for name in _MALLOC_VARIABLES)
    if mallopt is None or chosen or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return all(mallopt(option, value) for option, value in _MALLOC_OPTIONS)


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
class Returned:
    """What the server works with: the clients of a round that returned finite numbers."""

    clients: tuple[int, ...]  # ascending
    weights: tuple[float, ...]  # (K,) renormalised to sum 1
    losses: tuple[float, ...]  # (K,) mean training loss
    seconds: tuple[float, ...]  # of all clients of the plan, in plan order: training time
    dropped: tuple[int, ...]  # clients left out


def finite_clients(fabric: Fabric, rows: Tensor, plan: RoundPlan) -> Returned:
    """Leave out clients whose adapter holds NaN or infinity and renormalise the weights of the others.

    `rows` (n, p + 2) are this rank's numbers trained, mean loss and seconds, in the order of `plan.clients_of_rank`;
    three numbers a client are gathered. Call on every rank.
    """
    # Some rows at a time, because the mask of all of them would be as large as a quarter of them.
    blocks = rows.split(clients_at_a_time(rows.shape[1]))
    finite_here = torch.cat([block[:, :-2].isfinite().all(1, keepdim=True) for block in blocks])  # (n, 1)
    table = gather_clients(fabric, torch.cat([rows[:, -2:], finite_here.to(rows)], dim=1), plan.clients_of_rank)
    losses, seconds, finite = table.T.tolist()
    kept = [index for index, ok in enumerate(finite) if ok]
    total = sum(plan.weights[index] for index in kept)
    return Returned(
        clients=tuple(plan.clients[index] for index in kept),
        weights=tuple(plan.weights[index] / total for index in kept),
        losses=tuple(losses[index] for index in kept),
        seconds=tuple(seconds),
        dropped=tuple(client for client, ok in zip(plan.clients, finite, strict=True) if not ok),
    )


def broadcast_update(
    fabric: Fabric, update: ServerUpdate | None, layout: AdapterLayout, *, parts: Sequence[Part], folds: bool
) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """The server's update on every rank; `update` is given on rank 0. Call on every rank.

    Returns the numbers of `parts` in the order of a packed row, and the factors to fold into the frozen weights. One
    broadcast of one tensor; where the method folds (`folds`), the ranks of the folded factors go ahead, because nobody
    else knows them.
    """
    device = fabric.device
    ranks = torch.zeros(len(layout.factors), dtype=torch.int64, device=device)  # (L,)
    numbers: list[Tensor] = []
    if update is not None:
        numbers.append(layout.select(layout.pack(AdapterState(factors=update.factors, head=update.head)), parts))
        for index, path in enumerate(layout.factors):
            if path in update.folded:
                ranks[index] = update.folded[path].rank
        numbers += [update.folded[path].A.flatten() for path in layout.factors if path in update.folded]
        numbers += [update.folded[path].B.flatten() for path in layout.factors if path in update.folded]
    if folds and fabric.world_size > 1:
        dist.broadcast(ranks, src=0)
    folded_shapes = {
        path: ((rank, a[1]), (b[0], rank))
        for (path, (a, b)), rank in zip(
            layout.factors.items(), ranks.tolist() if folds else [0] * len(ranks), strict=True
        )
        if rank
    }
    folded_layout = AdapterLayout(factors=folded_shapes, head={})
    start_length = layout.length_of(parts)
    if update is not None:
        message = torch.cat(numbers).float()
    else:
        message = torch.empty(start_length + folded_layout.length, device=device)
    if fabric.world_size > 1 and message.numel():
        dist.broadcast(message, src=0)
    return message[:start_length], folded_layout.unpack(message[start_length:]).factors


def sum_over_ranks(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place. Call on every rank."""
    if fabric.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


@dataclass
class Agreement:
    """What the ranks have agreed on at the end of a block."""

    stop: int = NOTHING  # what asks for a stop, see interruption.py


@contextmanager
def same_error_on_all_ranks(fabric: Fabric) -> Iterator[Agreement]:
    """Let an error of one rank end all of them, instead of leaving the others waiting. Use on every rank.

    Rank 0 raises the first error as LorafairError; the other ranks leave quietly with the same exit status. Costs two
    numbers to reduce where all went well; the second says on all ranks alike whether one of them was asked to stop. No
    other collective belongs inside: a rank with an error would miss it.
    """
    agreement = Agreement()
    mine: str | None = None
    try:
        yield agreement
    except (LorafairError, OSError) as error:
        mine = str(error)
    errors: list[str | None] = [mine] * fabric.world_size
    failed, agreement.stop = int(mine is not None), asked()
    if fabric.world_size > 1:
        numbers = torch.tensor([failed, agreement.stop], device=fabric.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        failed, agreement.stop = numbers.tolist()
        if failed:
            dist.all_gather_object(errors, mine)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        stop_all_ranks(fabric, first)


def close(fabric: Fabric) -> None:
    """Take the process group down together. Call on every rank, as the last thing.

    A process that ends with the group open may abort, its threads still running, and then fails a run that is done.
    """
    if fabric.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


class StopSign:
    """Whether any rank was asked to stop, for looking at between two clients: no rank waits for another.

    A rank that was asked puts up the sign in the process group's store; one that sees it is asked thereby. The next
    `same_error_on_all_ranks` then makes all of them stop. Where the job has a time limit, what is not expected to end
    before it asks to stop, too, judged by the longest one so far of its kind.
    """

    _KEY = "lorafair/stop"
    _SECONDS = 0.05  # between two looks at the store, so that tiny clients cost nothing

    def __init__(self, fabric: Fabric) -> None:
        self._store: Any = None
        if fabric.world_size > 1:
            self._store = _store()
            if fabric.is_global_zero:
                self._store.delete_key(self._KEY)  # of a run before this one on the same processes
        self._looked = 0.0
        self._longest: dict[str, float] = {}

    def is_up(self, next_kind: str) -> bool:
        """Whether this rank should stop instead of beginning something of this kind."""
        ask_unless_it_fits(self._longest.get(next_kind, 0.0))
        if self._store is not None and asked() != NOTHING:
            self._store.set(self._KEY, "")
        elif self._store is not None and time.monotonic() - self._looked > self._SECONDS:
            self._looked = time.monotonic()
            if self._store.check([self._KEY]):
                ask(ANOTHER_RANK)
        return asked() != NOTHING

    @contextmanager
    def measured(self, kind: str) -> Iterator[None]:
        """Remember how long the block takes, if it is the longest of its kind."""
        began = time.monotonic()
        yield
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - began)


def stop_all_ranks(fabric: Fabric, message: str) -> NoReturn:
    """End a run for a reason that every rank knows: rank 0 raises it as LorafairError, the others leave quietly."""
    raise LorafairError(message) if fabric.is_global_zero else SystemExit(2)

"""What the processes of a job find on their nodes, how fast their collectives are, and what would go wrong.

Letters: W ranks, P packed length.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lorafair.communication.agreement import close_process_group
from lorafair.config.schema import Config
from lorafair.console import format_count, log, table
from lorafair.files.cache import cache_dir
from lorafair.launch import launch, resolve_placement
from lorafair.model.backbone import build_model
from lorafair.reporting.results import versions

if TYPE_CHECKING:
    from lightning_fabric import Fabric

REPEATS = 7  # of a collective; the median counts
SKEW_SECONDS = 5.0  # clocks further apart than that confuse file times


@dataclass(frozen=True)
class RankReport:
    """What one rank sees."""

    host: str
    address: str  # what the host's name resolves to: where gloo listens
    gpus: int  # visible
    threads: int
    cores: int  # this process may use
    node_cores: int
    versions: str
    free: dict[str, float]  # gigabytes by folder
    clock: float  # seconds since the epoch
    sees_run_dir: bool  # what rank 0 has written into it
    passive: bool  # OMP_WAIT_POLICY


def doctor_command(config: Config) -> int:
    """Examine the processes as a run would start them; returns 0, or 1 if a run would not work."""
    placement = resolve_placement(config.fabric)
    fabric = launch(config.fabric, placement, "examination")
    healthy = examine(fabric, config)
    close_process_group(fabric)
    return 0 if healthy or placement.is_child else 1


def examine(fabric: Fabric, config: Config) -> bool:
    """Print a table of all ranks, the seconds of the collectives, and warnings. Call on every rank.

    Returns, on all of them, whether a run would work.
    """
    mine = inspect_rank(fabric, config)
    everyone: list[Any] = [mine] * fabric.world_size
    if fabric.world_size > 1:
        dist.all_gather_object(everyone, mine)
    problems, warnings = diagnose(everyone, gpus_needed=fabric.device.type == "cuda")
    times = collectives(fabric, config)
    if fabric.is_global_zero:
        header = ["rank", "host", "address", "GPUs", "threads", "cores", "free GB " + ", ".join(mine.free)]
        rows = [
            [str(rank), f.host, f.address, str(f.gpus), str(f.threads), str(f.cores),
             ", ".join(f"{free:.0f}" for free in f.free.values())]
            for rank, f in enumerate(everyone)
        ]  # fmt: skip
        log.info(table(header, rows, left=3))
        log.info(f"\n{mine.versions}; {_backend(fabric)}")
        if times:
            rows = [[name, f"{1000 * seconds:.2f}"] for name, seconds in times.items()]
            log.info(table(["collective", "median ms"], rows))
        for line in [*(f"PROBLEM: {text}" for text in problems), *(f"warning: {text}" for text in warnings)]:
            log.info(line)
        log.info("" if problems or warnings else "no problem found")
    return not problems


def inspect_rank(fabric: Fabric, config: Config) -> RankReport:
    """What this rank sees. Call on every rank: rank 0 writes a file that the others look for."""
    token = fabric.broadcast(uuid.uuid4().hex)
    mark = config.folder.parent / f".doctor-{token}"
    if fabric.is_global_zero:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    fabric.barrier()
    os.listdir(mark.parent)  # makes a network file system read the folder again
    sees = mark.exists()
    fabric.barrier()
    if fabric.is_global_zero:
        mark.unlink()
    host = socket.gethostname()
    return RankReport(
        host=host,
        address=_address_of(host),
        gpus=torch.cuda.device_count(),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        node_cores=os.cpu_count() or 1,
        versions=", ".join(f"{name} {number}" for name, number in versions().items())
        + f" on Python {platform.python_version()}",
        free={
            name: shutil.disk_usage(_existing(folder)).free / 1e9
            for name, folder in (
                ("run_dir", config.folder), ("cache", cache_dir()), ("temp", Path(os.environ.get("TMPDIR", "/tmp"))),
            )
        },
        clock=time.time(),
        sees_run_dir=sees,
        passive=os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE",
    )  # fmt: skip


def diagnose(everyone: Sequence[RankReport], *, gpus_needed: bool) -> tuple[list[str], list[str]]:
    """What would make a run fail, and what would make it slow or odd."""
    problems, warnings = [], []
    hosts: dict[str, list[RankReport]] = {}
    for report in everyone:
        hosts.setdefault(report.host, []).append(report)
    for host, tasks in hosts.items():
        threads = sum(f.threads for f in tasks)
        if threads > tasks[0].node_cores or any(f.threads > f.cores for f in tasks):
            cores = min(tasks[0].node_cores, tasks[0].cores * len(tasks))
            warnings.append(f"{host}: {threads} threads on {cores} cores; set fabric.threads, or ask for more cores")
        if tasks[0].cores == 1 and tasks[0].threads == 1 and gpus_needed:
            warnings.append(f"{host}: one core a process; export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun")
        if len(hosts) > 1 and tasks[0].address.startswith("127."):
            problems.append(
                f"{host} resolves to {tasks[0].address}, where other nodes do not reach it; set GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME to the cluster's interface"
            )
        gpus = min(f.gpus for f in tasks)
        if gpus_needed and gpus < len(tasks):
            problems.append(
                f"{host}: {format_count(len(tasks), 'process', 'processes')} and {gpus} GPUs; ask with --gpus-per-node"
            )
        for name, free in tasks[0].free.items():
            if free < 1:
                warnings.append(f"{host}: {name} has {free:.2f} GB free")
    blind = sorted({f.host for f in everyone if not f.sees_run_dir})
    if blind:
        problems.append(f"run_dir is not shared: {', '.join(blind)} does not see what rank 0 writes there")
    if len({f.versions for f in everyone}) > 1:
        problems.append("the nodes have different versions: " + "; ".join(sorted({f.versions for f in everyone})))
    clocks = [f.clock for f in everyone]
    if max(clocks) - min(clocks) > SKEW_SECONDS:
        warnings.append(f"the nodes' clocks are {max(clocks) - min(clocks):.0f} s apart")
    if not all(f.passive for f in everyone):
        warnings.append("OMP_WAIT_POLICY is not PASSIVE: waiting threads take cores from other processes")
    return problems, warnings


def collectives(fabric: Fabric, config: Config) -> dict[str, float]:
    """Median seconds of the round's collectives with an adapter of the configuration's size. Call on every rank."""
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config.model, weights="random"), classes=100, seed=0).attach("meta")
    numbers = model.adapters.layout.length
    mine = torch.zeros(numbers, device=fabric.device)
    all_ = torch.zeros(fabric.world_size, numbers, device=fabric.device)

    def gather() -> None:
        dist.all_gather(list(all_), mine)

    megabytes = 4 * numbers / 1e6
    actions: dict[str, Callable[[], Any]] = {
        "barrier": fabric.barrier,
        f"all-gather, {megabytes:.1f} MB a rank": gather,
        f"broadcast, {megabytes:.1f} MB": lambda: dist.broadcast(mine, src=0),
    }
    if fabric.world_size == 1:
        return {}
    return {
        name: statistics.median(_seconds(fabric, action) for _ in range(REPEATS)) for name, action in actions.items()
    }


def _seconds(fabric: Fabric, action: Callable[[], Any]) -> float:
    fabric.barrier()
    began = time.perf_counter()
    action()
    if fabric.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _backend(fabric: Fabric) -> str:
    if fabric.world_size == 1:
        return f"1 rank on {fabric.device.type}, no process group"
    where = f"rank 0 at {os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return f"{fabric.world_size} ranks on {fabric.device.type}, {dist.get_backend()}, {where}"


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        return f"? ({error.strerror or error})"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())

"""From a configuration to the processes of a run on Lightning Fabric, and what happens when they are stopped.

Fabric brings the devices, the launcher and the process group. The model is never passed to `fabric.setup`, which would
average the gradients of different clients. Nothing heavy is imported before `launch`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lorafair import __version__, console, third_party
from lorafair.cluster.arithmetic import keep_freed_memory, set_matmul_precision, set_threads, warn_of_slow_bfloat16
from lorafair.cluster.leftovers import without_leftovers
from lorafair.cluster.placement import Placement, detect
from lorafair.cluster.saved import begin_start, continues, outlook, saved_before, saved_now
from lorafair.cluster.signals import (
    FAILED,
    INTERRUPTED,
    SAVED,
    TIME_LIMIT,
    Interrupted,
    handle_only,
    set_time_limit,
)
from lorafair.cluster.slurm import Job, is_near, requeue, seconds_left, slurm_job, state_of_job, time_limit_of
from lorafair.cluster.watchdog import current_watchdog, places_of_others, start_watchdog, stop_watchdog
from lorafair.config.schema import FabricConfig
from lorafair.console import duration_text, format_count, log
from lorafair.errors import ConfigError, one_line

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning_fabric.strategies.strategy import Strategy

RENDEZVOUS_MINUTES = 10.0
SECONDS_UNTIL_KILLED = 120.0
SECONDS_FOR_THE_REASON = 1.0  # srun -K ends all processes of a step once one has exited with an error


def let_idle_threads_sleep() -> None:
    """Keep torch's idle threads from spinning on cores that others need; before torch is imported for the first time.

    An OMP_WAIT_POLICY that is set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def resolve_placement(config: FabricConfig) -> Placement:
    """Find out where this process runs and print it, before anything heavy is imported. Raises ConfigError.

    A watchdog watches it from now on (cluster/watchdog.py).
    """
    handle_only(config.signals)
    command = [sys.executable, *sys.argv]
    environ = without_leftovers(os.environ, config, command)
    dropped = sorted(os.environ.keys() - environ.keys())
    for name in dropped:
        del os.environ[name]
    placement = detect(environ, config, command)
    console.set_rank(placement.rank)
    begin_start()
    start_watchdog(process_name(), is_child=placement.is_child)
    log.info(f"lorafair {__version__}: {placement.description}")
    if dropped:
        log.info(f"ignored, left over from another launcher: {', '.join(dropped)}")
    return placement


def launch(config: FabricConfig, placement: Placement, purpose: str) -> Fabric:
    """Start the processes of a command, print what they run on, and return their Fabric. Call on every process."""
    fabric = make_fabric(config, placement)  # imports lightning, which sets the levels of its loggers
    set_matmul_precision(config.matmul_precision)
    for name in ("lightning_fabric", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the lines here say what their banners say
    threads = set_threads(fabric, config.threads)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    rendezvous(fabric, config)
    console.set_rank(fabric.global_rank)
    log.info(
        f"lorafair {__version__}: {format_count(fabric.world_size, 'process', 'processes')} on {fabric.device.type}, "
        f"{format_count(threads, 'thread')} each, "
        f"{config.precision}; {purpose}"
    )
    warn_of_slow_bfloat16(config.precision, fabric.device.type)
    job, left = slurm_job(os.environ), None
    if fabric.is_global_zero and job is not None:
        left = seconds_left(job)
    set_time_limit(fabric.broadcast(left))
    return fabric


@contextmanager
def in_place(config: FabricConfig) -> Iterator[Fabric]:
    """A Fabric of this process alone, for a notebook or script: no process group, no watchdog, nothing left behind."""
    with third_party.lightning_logging():
        import torch

        fabric = make_fabric(config, Placement("local", "this process alone", devices=1, num_nodes=1))
        threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
        set_threads(fabric, config.threads)
        set_precision_back = set_matmul_precision(config.matmul_precision)
        try:
            fabric.launch()
            warn_of_slow_bfloat16(config.precision, fabric.device.type)
            yield fabric
        finally:
            set_precision_back()
            torch.set_num_threads(threads)
            if variable is None:
                os.environ.pop("OMP_NUM_THREADS", None)
            else:
                os.environ["OMP_NUM_THREADS"] = variable


def make_fabric(config: FabricConfig, placement: Placement | None = None) -> Fabric:
    """A Fabric whose ranks share nothing but the collectives of `communication`; call `launch()` on it.

    Where the processes are, `cluster.placement.detect` has found out unless it is given. One process alone needs no
    process group and gets none. Raises ConfigError for devices that are not there.
    """
    third_party.import_fabric()
    import torch
    from lightning_fabric import Fabric

    placement = placement or detect(os.environ, config, [sys.executable, *sys.argv])
    cuda = torch.cuda.is_available()
    if config.accelerator == "cuda" and not cuda:
        raise ConfigError("fabric.accelerator=cuda: no CUDA device is visible; use fabric.accelerator=cpu or auto")
    accelerator = "cpu" if config.accelerator == "cpu" or not cuda else "cuda"
    devices = placement.devices or (torch.cuda.device_count() if accelerator == "cuda" else 1)
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(f"fabric.devices={devices}: this node shows {torch.cuda.device_count()} CUDA devices")
    if accelerator == "cuda" and config.precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"fabric.precision={config.precision}: this GPU has no bfloat16; use fabric.precision=32-true"
        )
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise ConfigError("fabric.precision=16-mixed is for GPUs; use fabric.precision=bf16-mixed or 32-true")
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=placement.num_nodes,
        strategy=_strategy(config, accelerator, alone=devices * placement.num_nodes == 1),
        precision=None if config.precision == "bf16-true" else config.precision,
        # Given explicitly: Lightning's own look at Slurm's variables is wrong for jobs named bash, for steps, ...
        plugins=[_environment(placement), *([_bf16_true()] if config.precision == "bf16-true" else [])],
    )


def _bf16_true() -> Any:
    """Lightning's plugin, which leaves PyTorch's default type alone: the model holds and casts what it computes in.

    Positions that a backbone computes anew in every pass, such as rotary ones, would be rounded otherwise.
    """
    from lightning_fabric.plugins.precision.half import HalfPrecision

    class FrozenInHalf(HalfPrecision):
        def forward_context(self) -> AbstractContextManager[Any]:
            return nullcontext()

    return FrozenInHalf("bf16-true")


def _strategy(config: FabricConfig, accelerator: str, *, alone: bool) -> Strategy:
    if alone:
        from lightning_fabric.strategies.single_device import SingleDeviceStrategy

        return SingleDeviceStrategy(device="cpu" if accelerator == "cpu" else "cuda:0")
    # Over gloo a collective that waits longer is an error in Python. Over NCCL a thread of PyTorch ends the process by
    # SIGABRT (TORCH_NCCL_ASYNC_ERROR_HANDLING=3, its default), so clients that are not on disk yet are lost;
    # TORCH_NCCL_BLOCKING_WAIT=1 makes it an error, too, for some milliseconds a round (docs.pytorch.org, "PYTORCH
    # ProcessGroupNCCL Environment Variables"). The watchdog's heartbeats find a lost process long before either.
    return third_party.quiet_ddp_strategy(timedelta(minutes=config.timeout_minutes))


def _environment(placement: Placement) -> ClusterEnvironment:
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if placement.launcher == "torchrun":
        return TorchElasticEnvironment()
    if placement.launcher == "local":
        return LightningEnvironment()

    class SlurmStep(ClusterEnvironment):
        """The processes that srun has started, as `detect` has found them."""

        creates_processes_externally = True  # type: ignore[assignment]
        main_address = placement.address  # type: ignore[assignment]
        main_port = placement.port  # type: ignore[assignment]

        @staticmethod
        def detect() -> bool:
            return False  # cluster.placement does

        def world_size(self) -> int:
            return (placement.devices or 1) * placement.num_nodes

        def set_world_size(self, size: int) -> None:
            """Fixed by Slurm."""

        def global_rank(self) -> int:
            return placement.rank

        def set_global_rank(self, rank: int) -> None:
            """Fixed by Slurm; with --distribution=cyclic neighbouring ranks are on different nodes."""

        def local_rank(self) -> int:
            return placement.local_rank

        def node_rank(self) -> int:
            return placement.node_rank

    return SlurmStep()


def rendezvous(fabric: Fabric, config: FabricConfig) -> None:
    """Start the processes, or connect to those already started, and start their heartbeats. Bounded in time."""
    watchdog = current_watchdog()
    watchdog.children = third_party.child_processes(fabric.strategy)
    watchdog.seconds_for_others = 60 * (config.timeout_minutes + 1)  # the collective's own error comes first
    seconds = 60 * min(RENDEZVOUS_MINUTES, config.timeout_minutes)
    outside = slurm_job(os.environ) is None  # a job that is stopped now starts, and is then requeued
    what, key = "the start of all processes of the run", f"fabric.timeout_minutes, at most {RENDEZVOUS_MINUTES:g}"
    with watchdog.deadline(what, seconds, key=key, stoppable=outside):
        fabric.launch()  # it names the device, so NCCL's communicator, which takes seconds on many nodes, is made here
    if fabric.world_size > 1:
        store = third_party.default_store()
        watchdog.watch_peers(store, fabric.global_rank, fabric.world_size, config.heartbeat_seconds)


def run_until_stopped(fabric: Fabric, config: FabricConfig, placement: Placement, work: Callable[[], object]) -> int:
    """Do the work; if it was stopped, requeue the job where that is due; returns the exit status, on every rank."""
    from lorafair.communication.agreement import close_process_group
    from lorafair.communication.collectives import on_all_ranks

    try:
        work()
        close_process_group(fabric)
    except Interrupted as stop:
        status, gained = None, not on_all_ranks(fabric, not saved_now())
        if fabric.is_global_zero:
            status, line = after_stop(stop, slurm_job(os.environ), config.max_requeues, gained=gained)
            log.info(f"{stop}; {line}")
        status = fabric.broadcast(status)  # the others wait: srun ends all processes once one has exited with an error
        assert status is not None
        close_process_group(fabric)
        # The process that has started this one prints the message; to it this one has not failed.
        return 0 if placement.is_child else status
    except SystemExit:  # rank 0 prints the message
        if placement.is_child:
            return 0
        time.sleep(SECONDS_FOR_THE_REASON)
        raise
    return 0


def after_stop(stop: Interrupted, job: Job | None, max_requeues: int, *, gained: bool = True) -> tuple[int, str]:
    """Have the job requeued where that is due; returns the exit status and what to say.

    `gained`: this start has saved something, so that the next one gets further.
    """
    if stop.reason == signal.SIGINT:
        return INTERRUPTED, continues()
    if job is None:
        return SAVED, continues()
    state, why = state_of_job(job)
    at_limit = (state, why) == ("COMPLETING", "TimeLimit")
    # A job that was cancelled, and one that Slurm requeues by itself, are COMPLETING, too: do not start it again.
    if state and state != "RUNNING" and not at_limit:
        return SAVED, f"Slurm ends job {job.name} ({state}) by itself; {continues()}"
    if job.restarts >= max_requeues:
        return FAILED, (
            f"job {job.name} was requeued {job.restarts} times, and fabric.max_requeues={max_requeues} ends that; "
            f"{continues()}"
        )
    if not gained and (futile := why_futile(job, at_limit=at_limit or stop.reason == TIME_LIMIT)):
        return FAILED, futile
    problem = requeue(job)
    if not problem:
        return SAVED, f"job {job.name} is requeued and continues"
    # Slurm ends a batch job soon; only a preempted one that lasts until then is requeued.
    if stop.reason == signal.SIGTERM and not job.is_interactive:
        log.info(f"{stop}; scontrol cannot requeue job {job.name} ({problem}); waiting for Slurm to end it")
        time.sleep(SECONDS_UNTIL_KILLED)
    return SAVED, f"job {job.name} could not be requeued ({problem}); {continues()}"


def why_futile(job: Job, *, at_limit: bool) -> str:
    """Why the job is not requeued after a start that has saved nothing; empty where the next start may get further.

    The time limit, which the next start has as well, or the second such start where Slurm says nothing of the limit.
    """
    limit = time_limit_of(job)
    near = at_limit or is_near(limit)
    if near is False or (near is None and (job.restarts == 0 or saved_before())):
        return ""
    of = "" if limit.limit is None else f" of {duration_text(limit.limit)}"
    lead = "" if limit.lead is None else f", {limit.lead:g} seconds before which its --signal asks to stop,"
    return (
        f"job {job.name} is not requeued: the time limit{of}{lead} leaves no time for anything to be finished, and the "
        "next start would stop at the same place; ask for more (--time), or for a signal closer to the limit "
        "(--signal=USR1@<seconds>), compute tokens before (lorafair prepare), or make a client shorter (client.steps, "
        "client.epochs, client.cohort)"
    )


def report_failure(error: Exception) -> int:
    """Print what has ended this process: one line where another process is lost, else the traceback."""
    from lorafair.communication.agreement import is_peer_loss

    what = one_line(f"{type(error).__name__}: {error}")
    if is_peer_loss(error):
        time.sleep(SECONDS_FOR_THE_REASON)  # until the failed process is known to be lost
        places = places_of_others()
        lost = stop_watchdog(failed=True)
        if not lost:
            lost = "another process of the run is gone or has not answered for fabric.timeout_minutes"
            lost += f"; {places}" if places else ""
        what = f"{lost} ({what[:200]})"
    else:
        console.write_error("".join(traceback.format_exception(error)).rstrip())
    console.write_error(f"error: {process_name()}: {what}{outlook()}")
    stop_watchdog(failed=True)
    return FAILED


def process_name() -> str:
    """This process, for messages."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    return f"process {rank} on {socket.gethostname()}"

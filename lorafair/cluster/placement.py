"""Where this process runs: in a Slurm step, under torchrun, or on a node where it starts the other processes itself.

Everything follows from the variables of the environment, which `detect` reads like any mapping. Nothing heavy is
imported.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafair.cluster.slurm import slurm_job
from lorafair.config.schema import FabricConfig
from lorafair.errors import ConfigError

# Steps that Slurm makes by itself have ids from here on: batch script, interactive shell of salloc, ...
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_OF_A_STEP = (
    "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_NODEID",
)  # fmt: skip
# Rendezvous ports: a prime number of them, below 32768, where Linux begins to give ports to outgoing connections.
_FIRST_PORT, _PORTS = 10007, 21991

PARENT = "LORAFAIR_STARTED_BY"  # the number of a process, for those that it starts
# From which Lightning and PyTorch read a process's rank and address.
_OF_A_LAUNCH = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_SIZES_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # processes that mpirun has started


@dataclass(frozen=True)
class Placement:
    """What has started the processes, how many there are and which one this is."""

    launcher: Literal["local", "slurm", "torchrun"]
    description: str  # one line for the user
    devices: int | None  # processes a node; None: as many as there are GPUs, or 1
    num_nodes: int
    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    address: str = ""  # of the rendezvous; empty where Slurm does not decide it
    port: int = 0

    @property
    def is_child(self) -> bool:
        """Whether another process of the run has started this one."""
        return self.launcher == "local" and self.local_rank != 0


def detect(environ: Mapping[str, str], config: FabricConfig, command: Sequence[str]) -> Placement:
    """Where this process runs, from the environment's variables; `command` is what the user typed.

    Raises ConfigError, with the line to type, where the processes would wait for each other for ever.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _from_torchrun(environ, config)
    if in_step_of_several(environ):
        return _from_slurm_step(environ, config, command)
    if variable := _started_by_mpi(environ):
        raise ConfigError(
            f"mpirun is not supported; type: {_srun(command)}; without Slurm, start one process and give "
            f"fabric.devices={environ[variable]}. Where {variable}={environ[variable]} is left over from another "
            f"launcher, type: env -u {variable} {shlex.join(command)}"
        )
    return _local(environ, config, command)


def processes_started(environ: Mapping[str, str]) -> int:
    """How many processes srun, torchrun or mpirun has started, of which this is one; 1 where none of them has."""
    if "TORCHELASTIC_RUN_ID" in environ and environ.get("WORLD_SIZE", "").isdigit():
        return int(environ["WORLD_SIZE"])
    if _in_step(environ):
        return int(environ["SLURM_STEP_NUM_TASKS"])
    variable = _started_by_mpi(environ)
    return int(environ[variable]) if variable else 1


def is_of_a_launch(name: str) -> bool:
    """Whether a variable says which of several processes this one is, or where they meet."""
    return name in _OF_A_LAUNCH or name.startswith("TORCHELASTIC_")


def without_launch(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process that starts others itself: without those of a process group here."""
    return {name: value for name, value in environ.items() if not is_of_a_launch(name) and name != PARENT}


def in_step_of_several(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process and others."""
    return _in_step(environ) and int(environ["SLURM_STEP_NUM_TASKS"]) > 1


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it: cn01 of cn[01-02,07],gpu3."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else nodes)


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks of each node from Slurm's short form: [2, 2, 1] from 2(x2),1."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def port_of(job: int, step: int) -> int:
    """The rendezvous port of a step: another one for each step of a job, and for jobs close to each other."""
    return _FIRST_PORT + (97 * job + step) % _PORTS


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process; variables may be left over from a step that submitted this job."""
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP or not environ.keys() >= set(_OF_A_STEP):
        return False
    of_step = environ.get("SLURM_STEP_TASKS_PER_NODE")
    return environ.get("SLURM_TASKS_PER_NODE", of_step) == of_step


def _started_by_mpi(environ: Mapping[str, str]) -> str:
    """The variable that says that mpirun has started this process and others; empty if none does."""
    return next((name for name in _SIZES_OF_MPI if environ.get(name, "").isdigit() and int(environ[name]) > 1), "")


def _from_slurm_step(environ: Mapping[str, str], config: FabricConfig, command: Sequence[str]) -> Placement:
    tasks = tasks_of_nodes(environ["SLURM_STEP_TASKS_PER_NODE"])
    nodes, per_node = len(tasks), tasks[0]
    if len(set(tasks)) > 1:
        options = f"--nodes={nodes} --ntasks={nodes * min(tasks)} --ntasks-per-node={min(tasks)}"
        raise ConfigError(
            f"Slurm has put {environ['SLURM_STEP_TASKS_PER_NODE']} tasks on {nodes} nodes, and every node needs as "
            f"many; type: {_srun(command, options)}"
        )
    _check_agreement(config, per_node, nodes, "this Slurm step")
    gpus = environ.get("CUDA_VISIBLE_DEVICES")
    if config.accelerator != "cpu" and gpus and len(gpus.split(",")) < per_node:
        raise ConfigError(
            f"each of the {per_node} tasks of a node sees {len(gpus.split(','))} GPU, and has to see those of all: ask "
            f"for --gpus-per-node={per_node} instead of --gpus-per-task; in this job type: env -u SLURM_GPUS_PER_TASK "
            f"{_srun(command, f'--gpus-per-node={per_node}')}"
        )
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    address = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
    port = int(environ.get("MASTER_PORT") or port_of(job, step))
    return Placement(
        launcher="slurm",
        description=f"{_job_text(environ)}, step {step}: srun has started {per_node} on each of {nodes} nodes "
        f"({environ['SLURM_STEP_NODELIST']}); rendezvous at {address}:{port}",
        devices=per_node,
        num_nodes=nodes,
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        node_rank=int(environ["SLURM_NODEID"]),
        address=address,
        port=port,
    )


def _from_torchrun(environ: Mapping[str, str], config: FabricConfig) -> Placement:
    world, per_node = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
    if world % per_node:
        raise ConfigError(f"torchrun has started {world} processes, {per_node} of them here: every node needs as many")
    _check_agreement(config, per_node, world // per_node, "torchrun")
    description = f"torchrun has started {per_node} processes on each of {world // per_node} nodes"
    return Placement(
        "torchrun",
        description,
        devices=per_node,
        num_nodes=world // per_node,
        rank=int(environ.get("RANK", "0")),
        local_rank=int(environ.get("LOCAL_RANK", "0")),
    )


def _local(environ: Mapping[str, str], config: FabricConfig, command: Sequence[str]) -> Placement:
    local_rank = environ.get("LOCAL_RANK", "")
    nodes, rank = config.num_nodes or 1, int(local_rank) if local_rank.isdigit() else 0
    description = "no Slurm; starts its processes on this node itself"
    local = Placement("local", description, config.devices, nodes, rank=rank, local_rank=rank)
    if not environ.get("SLURM_JOB_ID"):
        if nodes > 1 and not environ.keys() & {"NODE_RANK", "GROUP_RANK"}:  # by which Lightning tells nodes apart
            each = config.devices or 1
            raise ConfigError(
                f"fabric.num_nodes={nodes}: this is one node without Slurm, and nothing would start processes on the "
                f"others; on each node type: torchrun --nnodes={nodes} --nproc-per-node={each} "
                f"--rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 {shlex.join(command[1:])}; or use "
                "fabric.num_nodes=1"
            )
        return local
    if _in_step(environ):
        kind, tasks, has_nodes = "a step of one task", 1, 1
    else:
        kind = "its batch script or shell, without srun"
        tasks = int(environ.get("SLURM_NTASKS") or 1)
        has_nodes = int(environ.get("SLURM_JOB_NUM_NODES") or 1)
        if sum(tasks_of_nodes(environ.get("SLURM_TASKS_PER_NODE", ""))) == 1:
            tasks = 1  # the number of tasks is left over from the job that submitted this one
    if tasks > 1 or has_nodes > 1:
        raise ConfigError(
            f"{_job_text(environ)} has {tasks} tasks on {has_nodes} nodes, and this is {kind}: nothing would start the "
            f"other processes; type: {_srun(command)}; where SLURM_JOB_ID={environ['SLURM_JOB_ID']} is left over from "
            f"a job that has ended: env -u SLURM_JOB_ID {shlex.join(command)}"
        )
    if nodes > 1:
        raise ConfigError(
            f"fabric.num_nodes={nodes}: {_job_text(environ)}, {kind}, has 1 node; add fabric.num_nodes=1, or ask for "
            f"more and type: {_srun(command, f'--nodes={nodes} --ntasks-per-node={config.devices or 1}')}"
        )
    description = f"{_job_text(environ)}, {kind}; starts its processes on this node itself"
    return Placement("local", description, config.devices, nodes, rank=rank, local_rank=rank)


def _check_agreement(config: FabricConfig, per_node: int, nodes: int, started_by: str) -> None:
    """Raise ConfigError where the configuration contradicts what has started the processes."""
    for key, given, found in (("devices", config.devices, per_node), ("num_nodes", config.num_nodes, nodes)):
        if given not in (None, found):
            what = "processes a node" if key == "devices" else "nodes"
            raise ConfigError(
                f"fabric.{key}={given}, but {started_by} has {found} {what}; leave fabric.{key} out, or add "
                f"fabric.{key}={found}"
            )


def _job_text(environ: Mapping[str, str]) -> str:
    job = slurm_job(environ)
    return f"Slurm job {job.name if job else '?'}"


def _srun(command: Sequence[str], options: str = "") -> str:
    return " ".join(part for part in ("srun --kill-on-bad-exit=1", options, shlex.join(command)) if part)

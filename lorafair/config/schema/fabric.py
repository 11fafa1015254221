"""The options of processes and devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.config.options import option

SIGNALS = ("USR1", "USR2", "TERM")


@dataclass(frozen=True)
class FabricConfig:
    """Processes and devices, with the names of Lightning Fabric."""

    accelerator: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Kind of device. auto: cuda if there is a GPU.", identity=False, spellings={"gpu": "cuda"}
    )
    devices: int | None = option(
        None,
        """Processes per node, each with its own GPU or some of the CPU cores (as srun or torchrun has started them;
        else all GPUs of the node, or 1 on the CPU).""",
        at_least=1,
        identity=False,
        spellings={"auto": None, -1: None},
    )
    num_nodes: int | None = option(
        None,
        "Nodes of the job (as srun or torchrun has started the processes; else 1).",
        at_least=1,
        identity=False,
    )
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = option(
        "32-true",
        """Arithmetic of the forward and backward passes; the factors and the server stay in float32 and float64.
        bf16-mixed: products are bfloat16, what flows between the layers is float32. bf16-true: that is bfloat16, too,
        which is faster on a GPU and takes less memory; the head, the loss and the optimiser are float32. 16-mixed is
        for GPUs without bfloat16: losses are scaled by a constant, and a gradient that overflows counts as zero.""",
        spellings={32: "32-true", "32": "32-true", 16: "16-mixed", "16": "16-mixed", "bf16": "bf16-mixed"},
    )
    matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest",
        """Precision of float32 matrix products and convolutions on a GPU, with the names of
        torch.set_float32_matmul_precision. highest: float32. high: TF32, with a mantissa of 10 instead of 23 bits and
        several times as fast. medium: bfloat16 if PyTorch supports it. The server step is not affected.""",
    )
    server: Literal["rank0", "sharded"] = option(
        "rank0",
        """Where the server step runs. rank0: one process holds all clients' adapters. sharded: every process holds and
        aggregates some of the layers, if the clients' adapters do not fit into one process. The results are the
        same.""",
        identity=False,
    )
    threads: int | None = option(
        None,
        "CPU threads per process (cores / processes of the node; OMP_NUM_THREADS if it is set).",
        at_least=1,
        identity=False,
    )
    timeout_minutes: float = option(
        30.0,
        "A rank waits this long for the others in a collective before the run ends with an error.",
        above=0,
        at_most=525600,
        reason="a year",
        identity=False,
    )
    heartbeat_seconds: float = option(
        120.0,
        "A process without a heartbeat for this time counts as lost, and the run ends with an error.",
        above=0,
        identity=False,
    )
    signals: tuple[str, ...] = option(
        ("USR1", "TERM"),
        """Signals of the scheduler (USR1, USR2, TERM) at which the run saves the finished work, also within a round,
        and requeues its Slurm job. Without Slurm, or if requeueing fails, the exit status is 75 and the same command
        continues.""",
        identity=False,
    )
    max_requeues: int = option(
        100, "A Slurm job that was requeued this many times is not requeued again.", at_least=0, identity=False
    )

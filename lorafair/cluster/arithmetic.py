"""How a process computes: its threads, the memory of its tensors, and the formats of numbers in products."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lorafair.console import log

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Of malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD with bytes. What is larger still goes back at once.
_MALLOC_OPTIONS = ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26))
# With one of these set, nothing is changed.
_MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def processes_of_node(fabric: Fabric) -> int:
    """How many processes of the run are on this node."""
    return int(getattr(fabric.strategy, "num_processes", 1))


def set_threads(fabric: Fabric, threads: int | None) -> int:
    """Give this process its part of the node's cores and return their number; call before `launch`.

    More threads than cores cost far more than they give: spinning threads of two processes on one core made single
    operations 100 times slower.
    """
    import torch

    if threads is None:
        given = os.environ.get("OMP_NUM_THREADS", "")
        of_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
        mine = len(os.sched_getaffinity(0)) // processes_of_node(fabric)
        threads = next((int(value) for value in (given, of_task) if value.isdecimal() and int(value)), max(1, mine))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that Fabric starts, and so that it sets no other
    torch.set_num_threads(threads)
    return threads


def set_matmul_precision(precision: str) -> Callable[[], None]:
    """Set how exact float32 products on a GPU are, of matrices and in convolutions; what is returned sets it back.

    PyTorch's own default is float32 for the first and TF32 for the second. It has two ways to say this, the second
    since 2.9, and reading by the first is an error where somebody has chosen by the second.
    """
    import torch

    if not torch.cuda.is_available():  # on a CPU the same setting would choose bfloat16 for some products
        return lambda: None
    of_matrices, in_convolutions = "highest", True
    with suppress(RuntimeError):
        of_matrices = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        in_convolutions = torch.backends.cudnn.allow_tf32
    convolutions = [getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn")]
    kinds: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None), *convolutions]
    before = [(kind, kind.fp32_precision) for kind in kinds if hasattr(kind, "fp32_precision")]

    def set_all(of_matrices: str, in_convolutions: bool) -> None:
        torch.set_float32_matmul_precision(of_matrices)
        torch.backends.cudnn.allow_tf32 = in_convolutions

    def set_back() -> None:
        set_all(of_matrices, in_convolutions)
        for kind, value in before:
            for choice in ("none", value):  # none follows the setting for everything, if there is one
                if kind.fp32_precision != value:
                    kind.fp32_precision = choice

    set_all(precision, precision != "highest")
    for kind, _ in before:
        if kind in convolutions and precision == "highest":
            kind.fp32_precision = "ieee"  # allow_tf32=False leaves it to torch.backends.fp32_precision
    return set_back


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


def warn_of_slow_bfloat16(precision: str, device: str) -> None:
    """Warn where products in bfloat16 take many times as long as in float32: on a CPU without instructions for them.

    A round of conf/compare/which_method_rounds.yaml took 66 s instead of 3 s on an AMD EPYC with AVX2 alone
    (docs/performance.md).
    """
    import torch

    can = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # a build without oneDNN cannot say it
    if device == "cpu" and precision.startswith("bf16") and not can():
        log.warning(
            f"fabric.precision={precision}: this CPU has no instructions for bfloat16 (AVX-512 or AMX), and products "
            "may take 20 times as long as in float32; set fabric.precision=32-true"
        )

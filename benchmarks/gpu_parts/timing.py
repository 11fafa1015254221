"""Time, memory and arithmetic of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.lora import LoRALinear


def seconds_of(device: torch.device, action: Callable[[], Any]) -> float:
    """From an idle device until the action's work is done: by CUDA events on a GPU, else by the clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        action()
        return time.perf_counter() - began
    began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began_at.record()
    action()
    ended_at.record()
    ended_at.synchronize()
    return float(began_at.elapsed_time(ended_at)) / 1000  # it gives milliseconds


def interleaved(
    device: torch.device, ways: Mapping[str, Callable[[], Any]], repeats: int, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of every way, in turns, so that clocks that fall and rise are the same for all of them."""
    names = list(ways)
    for _ in range(warm_ups):
        for way in ways.values():
            way()
    found: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(seconds_of(device, ways[name]))
    return found


def peak_gib(device: torch.device, action: Callable[[], Any]) -> float | None:
    """The most memory that an action needs beyond what lies on the GPU before, in GiB; None on the CPU."""
    if device.type != "cuda":
        action()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def kernels_of(action: Callable[[], Any], most: int = 14) -> list[tuple[str, int, float]]:
    """What the GPU works on longest in an action: kernel, calls and milliseconds; the last line is the sum."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    found = [(e.key, e.count, e.self_device_time_total / 1000) for e in profiler.key_averages()]
    found = sorted((line for line in found if line[2] > 0), key=lambda line: -line[2])
    return [*found[:most], ("all kernels", sum(calls for _, calls, _ in found), sum(ms for *_, ms in found))]


def use_tf32(allowed: bool) -> None:
    """TF32 in products and convolutions of float32; both are off or both are on."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@torch.no_grad()
def flop_of_an_image(model: AdaptedModel, size: int) -> float:
    """Of a training step: 2 F + L, where F is a forward pass with all adapters and L the adapters' part of it.

    Frozen layers have no gradients of weights, so that their backward pass costs as much as the forward pass; adapters
    cost twice as much. Products alone are counted, those of attention among them; a product of two is 2 flop. ViT-B/16
    at 224 pixels with LoRA rank 16 on attn.proj and mlp.fc2: 71.5 GFLOP. The model must not be on a GPU, where adapted
    layers may count otherwise.
    """
    adapters = [0]

    def count(layer: LoRALinear, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].numel() // inputs[0].shape[-1]
        adapters[0] += 2 * rows * (layer.A[0].numel() + layer.B[0].numel())

    hooks = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, LoRALinear)]
    # The counter knows not every fused attention; this one is made of products.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=model.mean.device))
    for hook in hooks:
        hook.remove()
    return float(2 * counter.get_total_flops() + adapters[0])

"""Attention on a CPU, forward and backward: PyTorch's fused kernel beside the same numbers as products.

    python benchmarks/attention.py

The ratios say which precision `lorafair.model.attention` is for. One thread, 6 heads of 64 features, about 1,600
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS = (10, 17, 50, 197, 257)
HEADS, FEATURES, SECONDS = 6, 64, 0.3


def as_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As timm's attention does without `fused_attn`."""
    weights = (queries * FEATURES**-0.5) @ keys.transpose(-2, -1)
    return weights.softmax(-1) @ values


def milliseconds(attention: Callable[..., Tensor], tokens: int, dtype: torch.dtype) -> float:
    """The fastest of all repetitions of forward and backward."""
    shape = (max(1, 1600 // tokens), HEADS, tokens, FEATURES)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, dtype=dtype)
    attention(*inputs).backward(gradient)  # the first call chooses kernels
    fastest, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        attention(*inputs).backward(gradient)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest * 1000


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'tokens':>6}  {'type':8}  {'fused ms':>8}  {'products ms':>11}  {'fused / products':>16}")
    for tokens in TOKENS:
        for dtype in (torch.float32, torch.bfloat16):
            fused = milliseconds(F.scaled_dot_product_attention, tokens, dtype)
            products = milliseconds(as_products, tokens, dtype)
            name = str(dtype).removeprefix("torch.")
            print(f"{tokens:6}  {name:8}  {fused:8.1f}  {products:11.1f}  {fused / products:16.2f}")


if __name__ == "__main__":
    main()

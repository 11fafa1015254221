"""Attention written as products, where the fused kernel is the slower one.

PyTorch's fused attention has a slow backward pass in bfloat16 on a CPU. One core of an AMD EPYC with AVX-512, forward
and backward of about 1,600 tokens in 6 heads: 54 ms fused and 5.3 ms as products at 10 tokens an image, 34 and 13 ms
at 197. In float32 the fused kernel is as fast, and it needs less memory (`benchmarks/attention.py`).
"""

from __future__ import annotations

from typing import Any

from torch import nn


def attend_by_products(backbone: nn.Module) -> None:
    """Let timm's attention layers multiply queries, keys and values one after the other; weights and names stay."""
    attention: Any
    for attention in backbone.modules():
        if getattr(attention, "fused_attn", False) is True:
            attention.fused_attn = False

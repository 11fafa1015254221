"""What travels between clients and server: LoRA factors and the head, as plain tensors and as one flat row.

Letters: K clients (rows), R rank, I in_features, O out_features, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoRAFactors:
    """The two factors of one layer's update s·B·A, optionally stacked over clients along leading axes."""

    A: Tensor  # (..., R, I)
    B: Tensor  # (..., O, R)

    @property
    def rank(self) -> int:
        """R, the inner dimension of the product."""
        return self.A.shape[-2]

    def to(self, dtype: torch.dtype) -> LoRAFactors:
        """Both factors in another dtype."""
        return LoRAFactors(A=self.A.to(dtype), B=self.B.to(dtype))


@dataclass(frozen=True)
class AdapterState:
    """All trained tensors of one model, or of K clients where every tensor has a leading K."""

    factors: dict[str, LoRAFactors]  # by module path: "blocks.0.attn.proj"
    head: dict[str, Tensor]  # other trained parameters, by parameter name: "head.weight"


@dataclass(frozen=True)
class AdapterLayout:
    """Where each trained tensor of a model lies in the packed row of P numbers.

    The order is the model's own; A before B in a layer, the head last. All ranks build the same layout from the same
    model, so rows can be exchanged without names or shapes.
    """

    factors: dict[str, tuple[tuple[int, int], tuple[int, int]]]  # path -> ((R, I), (O, R))
    head: dict[str, tuple[int, ...]]  # parameter name -> shape

    @classmethod
    def of(
        cls, factors: Mapping[str, tuple[Sequence[int], Sequence[int]]], head: Mapping[str, Sequence[int]]
    ) -> AdapterLayout:
        """The layout of these shapes: of A and B by module path, and of the head by parameter name."""
        return cls(
            factors={path: ((a[0], a[1]), (b[0], b[1])) for path, (a, b) in factors.items()},
            head={name: tuple(shape) for name, shape in head.items()},
        )

    @property
    def adapter_length(self) -> int:
        """Numbers in all LoRA factors."""
        return sum(math.prod(shape) for shapes in self.factors.values() for shape in shapes)

    @property
    def length(self) -> int:
        """P: numbers in all factors and the head."""
        return self.adapter_length + sum(math.prod(shape) for shape in self.head.values())

    def unpack(self, flat: Tensor) -> AdapterState:
        """Views into `flat` (..., P), no copy; writing to them writes to `flat`."""
        if flat.shape[-1] != self.length:
            raise ValueError(f"a packed adapter of this model has {self.length} numbers, not {flat.shape[-1]}")
        offset = 0

        def take(shape: tuple[int, ...]) -> Tensor:
            nonlocal offset
            start, offset = offset, offset + math.prod(shape)
            return flat.narrow(-1, start, offset - start).view(*flat.shape[:-1], *shape)

        factors = {path: LoRAFactors(A=take(a), B=take(b)) for path, (a, b) in self.factors.items()}
        return AdapterState(factors=factors, head={name: take(shape) for name, shape in self.head.items()})

    def pack(self, state: AdapterState) -> Tensor:
        """One row (..., P) from the tensors of `state`; the inverse of `unpack`."""
        given = {path: (f.A.shape[-2:], f.B.shape[-2:]) for path, f in state.factors.items()}
        if (
            given != self.factors
            or {n: t.shape[t.ndim - len(self.head[n]) :] for n, t in state.head.items()} != self.head
        ):
            raise ValueError("the adapter does not have this model's layers and shapes")
        parts = [t.flatten(-2) for path in self.factors for t in (state.factors[path].A, state.factors[path].B)]
        parts += [state.head[name].flatten(-len(shape)) for name, shape in self.head.items()]
        return torch.cat(parts, dim=-1)


def row(state: AdapterState, index: int) -> AdapterState:
    """The adapter of one client out of a state stacked over K clients."""
    factors = {path: LoRAFactors(A=f.A[index], B=f.B[index]) for path, f in state.factors.items()}
    return AdapterState(factors=factors, head={name: t[index] for name, t in state.head.items()})

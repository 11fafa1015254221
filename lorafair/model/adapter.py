"""What travels between clients and server: LoRA factors and the head, as plain tensors and as one flat row.

Letters: K clients (rows), R LoRA rank, I in_features, O out_features, h heads of a core, P packed length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Part: TypeAlias = Literal["A", "B", "core", "head"]
"""What of an adapter a method trains, sends or keeps: all A factors, all B factors, cores between them, the head."""
PARTS: tuple[Part, ...] = ("A", "B", "core", "head")


@dataclass(frozen=True)
class LoRAFactors:
    """The two factors of one layer's update s·B·A, optionally stacked over clients along leading axes.

    Example:
        >>> lorafair.LoRAFactors(A=torch.ones(2, 6), B=torch.zeros(5, 2)).rank
        2
    """

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
class CoreShape:
    """The shape of a core: how many heads share the R directions, and whether each has a scale to train.

    Each client has its own scales: they are 1 at the start of a round, and the client sends s_i H_i.

    Example:
        >>> lorafair.CoreShape(heads=4, scaled=True).of_rank(16)
        ((4, 4, 4), (4,))
    """

    heads: int = 1
    scaled: bool = False

    def of_rank(self, lora_rank: int) -> tuple[tuple[int, int, int], tuple[int]]:
        """The shapes of H and of the scales."""
        size = lora_rank // self.heads
        return (self.heads, size, size), (self.heads if self.scaled else 0,)


@dataclass(frozen=True)
class Core:
    """A square matrix between the factors of one layer, s·B·M·A, with M = diag(s_1 H_1, ..., s_h H_h)."""

    H: Tensor  # (..., h, R/h, R/h)
    scales: Tensor  # (..., h); (..., 0) where all are 1

    @property
    def scaled(self) -> Tensor:
        """s_i H_i, in the shape of H."""
        return self.scales[..., None, None] * self.H if self.scales.shape[-1] else self.H

    def after(self, B: Tensor) -> Tensor:
        """B·M for B (..., O, R)."""
        heads = self.H.shape[-3]
        of_heads = B.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (..., h, O, R/h)
        product: Tensor = of_heads @ self.scaled.to(B.dtype)
        return product.transpose(-3, -2).flatten(-2)


@dataclass(frozen=True)
class AdapterState:
    """All trained tensors of one model, or of K clients where every tensor has a leading K."""

    factors: dict[str, LoRAFactors]  # by module path: "blocks.0.attn.proj"
    head: dict[str, Tensor]  # other trained parameters, by parameter name: "head.weight"
    cores: dict[str, Core] = field(default_factory=dict)  # by module path, where a method has them

    def with_cores_in_b(self) -> AdapterState:
        """The same updates without cores: these are part of B."""
        return replace(self, factors=cores_in_b(self.factors, self.cores), cores={})


def cores_in_b(factors: Mapping[str, LoRAFactors], cores: Mapping[str, Core]) -> dict[str, LoRAFactors]:
    """Factors (A, B·M) of the same products."""
    return {p: LoRAFactors(A=f.A, B=cores[p].after(f.B)) if p in cores else f for p, f in factors.items()}


@dataclass(frozen=True)
class AdapterLayout:
    """Where each trained tensor of a model lies in the packed row of P numbers.

    First A of all layers in the order of the model, then B of all layers, the cores if there are some, the head last:
    every part is one slice. All ranks build the same layout from the same model, so rows can be exchanged without names
    or shapes.
    """

    factors: dict[str, tuple[tuple[int, int], tuple[int, int]]]  # path -> ((R, I), (O, R))
    head: dict[str, tuple[int, ...]]  # parameter name -> shape
    cores: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # path -> H, scales

    @classmethod
    def of(
        cls,
        factors: Mapping[str, tuple[Sequence[int], Sequence[int]]],
        head: Mapping[str, Sequence[int]],
        core: CoreShape | None = None,
    ) -> AdapterLayout:
        """The layout of these shapes: of A and B by module path, and of the head by parameter name."""
        return cls(
            factors={path: ((a[0], a[1]), (b[0], b[1])) for path, (a, b) in factors.items()},
            head={name: tuple(shape) for name, shape in head.items()},
            cores={} if core is None else {path: core.of_rank(a[0]) for path, (a, _) in factors.items()},
        )

    @cached_property
    def slices(self) -> dict[Part, slice]:
        """Where each part lies in a packed row."""
        a = sum(math.prod(shape) for shape, _ in self.factors.values())
        b = a + sum(math.prod(shape) for _, shape in self.factors.values())
        core = b + sum(math.prod(H) + math.prod(scales) for H, scales in self.cores.values())
        head = core + sum(map(math.prod, self.head.values()))
        return {"A": slice(0, a), "B": slice(a, b), "core": slice(b, core), "head": slice(core, head)}

    def spans(self, parts: Sequence[Part]) -> list[slice]:
        """The columns of some parts, neighbours in one slice."""
        spans: list[slice] = []
        for span in (self.slices[part] for part in PARTS if part in parts):
            if spans and spans[-1].stop == span.start:
                spans[-1] = slice(spans[-1].start, span.stop)
            else:
                spans.append(span)
        return spans

    def length_of(self, parts: Sequence[Part]) -> int:
        """Numbers in some parts."""
        return sum(span.stop - span.start for span in self.spans(parts))

    @property
    def adapter_length(self) -> int:
        """Numbers in all LoRA factors and cores."""
        return int(self.slices["core"].stop)

    @property
    def length(self) -> int:
        """P: numbers in all factors, cores and the head."""
        return int(self.slices["head"].stop)

    def select(self, flat: Tensor, parts: Sequence[Part]) -> Tensor:
        """The numbers of some parts of `flat` (..., P), in the order of the row; a view where they are neighbours."""
        return take_columns(flat, self.spans(parts))

    def replaced(self, flat: Tensor, parts: Sequence[Part], values: Tensor) -> Tensor:
        """A copy of `flat` (..., P) with some parts taken from `values`, as `select` gives them."""
        result = flat.expand(*values.shape[:-1], self.length).clone()
        put_columns(result, self.spans(parts), values)
        return result

    def truncated(self, flat: Tensor, lora_ranks: Tensor) -> Tensor:
        """Copies of packed adapters `flat` (C, P) of LoRA ranks (C,): zero beyond, which local training leaves zero."""
        result = flat.clone()
        for factors in self.unpack(result).factors.values():
            beyond = torch.arange(factors.rank, device=flat.device) >= lora_ranks.unsqueeze(1)  # (C, R)
            factors.A.masked_fill_(beyond.unsqueeze(2), 0)
            factors.B.masked_fill_(beyond.unsqueeze(1), 0)
        return result

    def outside(self, chosen: Tensor) -> Tensor:
        """Where packed adapters (C, P) of clients hold directions that are not among those chosen, (C, R); bool."""
        found = torch.zeros(len(chosen), self.length, dtype=torch.bool, device=chosen.device)
        for factors in self.unpack(found).factors.values():
            factors.A.copy_(~chosen.unsqueeze(2))
            factors.B.copy_(~chosen.unsqueeze(1))
        return found

    def split(self, count: int) -> list[AdapterLayout]:
        """The layers, and the head as one, dealt out to `count` layouts of about equal length; some may be empty.

        The largest come first, each to the shortest layout so far, so the same layout is dealt out the same everywhere.
        """
        of_core = self.sizes_of("core")
        sizes = {path: math.prod(a) + math.prod(b) + of_core.get(path, 0) for path, (a, b) in self.factors.items()}
        sizes |= {"": sum(map(math.prod, self.head.values()))}  # no layer has this path
        lengths, owner = [0] * count, {}
        for path in sorted(sizes, key=lambda path: -sizes[path]):
            owner[path] = lengths.index(min(lengths))
            lengths[owner[path]] += sizes[path]
        return [
            AdapterLayout(
                factors={path: shapes for path, shapes in self.factors.items() if owner[path] == index},
                head=self.head if owner[""] == index else {},
                cores={path: shapes for path, shapes in self.cores.items() if owner[path] == index},
            )
            for index in range(count)
        ]

    def columns_of(self, some: AdapterLayout, parts: Sequence[Part]) -> list[slice]:
        """Where `some` of the layers lie in a row of `parts`, as `select` gives it; neighbours in one slice."""
        spans: list[slice] = []
        start = 0
        for part in (part for part in PARTS if part in parts):
            places = self._places[part]
            for begin, size in sorted(places[name] for name in some._named(part) if name in places):
                if spans and spans[-1].stop == start + begin:
                    spans[-1] = slice(spans[-1].start, start + begin + size)
                else:
                    spans.append(slice(start + begin, start + begin + size))
            start += self.slices[part].stop - self.slices[part].start
        return spans

    @cached_property
    def _places(self) -> dict[Part, dict[str, tuple[int, int]]]:
        """Where each layer, or parameter of the head, begins in its part, and its size; asked for every shard."""
        places: dict[Part, dict[str, tuple[int, int]]] = {}
        for part in PARTS:
            sizes = self.sizes_of(part)
            begins = itertools.accumulate(sizes.values(), initial=0)
            places[part] = dict(zip(sizes, zip(begins, sizes.values(), strict=False), strict=True))
        return places

    def _named(self, part: Part) -> Mapping[str, object]:
        """What has numbers in a part: layers by their paths, or parameters of the head."""
        return self.head if part == "head" else self.cores if part == "core" else self.factors

    def sizes_of(self, part: Part) -> dict[str, int]:
        """Numbers of a part in each layer by its path, or in each parameter of the head, in the order of a row."""
        if part == "head":
            return {name: math.prod(shape) for name, shape in self.head.items()}
        if part == "core":
            return {path: math.prod(H) + math.prod(scales) for path, (H, scales) in self.cores.items()}
        return {path: math.prod(a if part == "A" else b) for path, (a, b) in self.factors.items()}

    def unpack(self, flat: Tensor) -> AdapterState:
        """Views into `flat` (..., P), no copy; writing to them writes to `flat`."""
        if flat.shape[-1] != self.length:
            raise ValueError(f"a packed adapter of this model has {self.length} numbers, not {flat.shape[-1]}")
        offset = 0

        def take(shape: tuple[int, ...]) -> Tensor:
            nonlocal offset
            start, offset = offset, offset + math.prod(shape)
            return flat.narrow(-1, start, offset - start).view(*flat.shape[:-1], *shape)

        of_a = {path: take(a) for path, (a, _) in self.factors.items()}
        factors = {path: LoRAFactors(A=of_a[path], B=take(b)) for path, (_, b) in self.factors.items()}
        cores = {path: Core(H=take(H), scales=take(scales)) for path, (H, scales) in self.cores.items()}
        return AdapterState(factors, {name: take(shape) for name, shape in self.head.items()}, cores)

    def pack(self, state: AdapterState) -> Tensor:
        """One row (..., P) from the tensors of `state`; the inverse of `unpack`."""
        given = {path: (f.A.shape[-2:], f.B.shape[-2:]) for path, f in state.factors.items()}
        if (
            given != self.factors
            or {path: (c.H.shape[-3:], c.scales.shape[-1:]) for path, c in state.cores.items()} != self.cores
            or {n: t.shape[t.ndim - len(self.head[n]) :] for n, t in state.head.items()} != self.head
        ):
            raise ValueError("the adapter does not have this model's layers and shapes")
        parts = [state.factors[path].A.flatten(-2) for path in self.factors]
        parts += [state.factors[path].B.flatten(-2) for path in self.factors]
        for path in self.cores:
            parts += [state.cores[path].H.flatten(-3), state.cores[path].scales]
        parts += [state.head[name].flatten(-len(shape)) for name, shape in self.head.items()]
        return torch.cat(parts, dim=-1)


def take_columns(flat: Tensor, columns: Sequence[slice]) -> Tensor:
    """Some columns of `flat` (..., P), in this order; a view where it is one slice."""
    chosen = [flat[..., span] for span in columns]
    return chosen[0] if len(chosen) == 1 else torch.cat([flat[..., :0], *chosen], dim=-1)


def put_columns(flat: Tensor, columns: Sequence[slice], values: Tensor) -> None:
    """Write `values` (..., p), as `take_columns` gives them, to some columns of `flat` (..., P)."""
    sizes = [span.stop - span.start for span in columns]
    for span, part in zip(columns, values.split(sizes, dim=-1), strict=True):
        flat[..., span] = part


def row(state: AdapterState, index: int) -> AdapterState:
    """The adapter of one client out of a state stacked over K clients."""
    factors = {path: LoRAFactors(A=f.A[index], B=f.B[index]) for path, f in state.factors.items()}
    cores = {path: Core(H=c.H[index], scales=c.scales[index]) for path, c in state.cores.items()}
    return AdapterState(factors, {name: t[index] for name, t in state.head.items()}, cores)

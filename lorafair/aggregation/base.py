"""The contract of an aggregation method, the server step that applies one to all layers, and the bias it leaves.

Letters: K clients, R rank, I in_features, O out_features, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lorafair.adapter import PARTS, AdapterState, LoRAFactors, Part
from lorafair.aggregation.factor_algebra import (
    IdealUpdate,
    inner,
    nonzero_rows,
    split_ideal_update,
    square_of_sum,
    squared_norm,
    weighted_mean,
)

T = TypeVar("T")


@dataclass(frozen=True)
class LayerUpdate:
    """What the server makes of one layer."""

    factors: LoRAFactors  # (R, I) and (O, R): where every client starts the next round
    folded: LoRAFactors | None = None  # first merged into the frozen weight as s·B·A; its rank may be anything
    sent_rank: int | None = None  # beyond it B is zero and A is known to the clients: neither is sent (all R)


@dataclass(frozen=True)
class ServerUpdate:
    """What the server makes of a round, by layer path and parameter name."""

    factors: dict[str, LoRAFactors]
    folded: dict[str, LoRAFactors]  # only the layers that have any
    head: dict[str, Tensor]
    sent_rank: dict[str, int]  # rows of A and columns of B the clients are sent

    def to(self, device: torch.device | str) -> ServerUpdate:
        """The same on another device."""

        def moved(layers: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
            return {path: LoRAFactors(A=f.A.to(device), B=f.B.to(device)) for path, f in layers.items()}

        head = {name: tensor.to(device) for name, tensor in self.head.items()}
        return replace(self, factors=moved(self.factors), folded=moved(self.folded), head=head)

    @staticmethod
    def joined(updates: Sequence[ServerUpdate], paths: Sequence[str]) -> ServerUpdate:
        """Updates of different layers as one, of the layers `paths` in this order."""

        def ordered(of_layer: Mapping[str, T]) -> dict[str, T]:
            return {path: of_layer[path] for path in paths if path in of_layer}

        return ServerUpdate(
            factors=ordered({path: f for update in updates for path, f in update.factors.items()}),
            folded=ordered({path: f for update in updates for path, f in update.folded.items()}),
            head={name: tensor for update in updates for name, tensor in update.head.items()},
            sent_rank=ordered({path: rank for update in updates for path, rank in update.sent_rank.items()}),
        )


class Aggregator(Protocol):
    """An aggregation method. Concrete ones are frozen dataclasses; their fields are the options of `method:`."""

    pools_data: ClassVar[bool] = False
    """One client trains on everybody's images."""
    restarts: ClassVar[bool] = False
    """Every round starts from fresh factors; what was learned is in the folded part."""
    mixed_ranks: ClassVar[bool] = True
    """Clients may have factors of smaller rank, padded with zeros to R."""
    decomposes: ClassVar[bool] = False
    """The factors that come back are a new decomposition of the update: their difference from the old says nothing."""
    initializations: ClassVar[tuple[str, ...]] = ("average", "fresh", "local")
    """Values of federation.initialization that fit the method; the first leaves it as published."""
    keeps: ClassVar[tuple[Part, ...]] = ()
    """What each client keeps to itself from round to round. Where it is not empty, every client is evaluated."""

    @property
    def folds(self) -> bool:
        """Whether updates of `combine` may have a folded part."""
        return False

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """What clients train in this round (from 0); the rest stays as it was sent."""
        return PARTS

    def receives(self, round_index: int) -> tuple[Part, ...]:
        """What the server sends down after this round, folded parts aside."""
        return self.sends(round_index)

    def sends(self, round_index: int) -> tuple[Part, ...]:
        """What clients send up after this round."""
        return tuple(part for part in self.trains(round_index) if part not in self.keeps)

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """One layer of the next round, from A (K, R, I), B (K, O, R) and weights (K,) that sum to 1.

        `start` (R, I), (O, R) is what the clients of this round were sent. To be computed in float64, as the functions
        of `factor_algebra` do; `aggregate` casts the result back.
        """
        ...


@runtime_checkable
class JointAggregator(Protocol):
    """An aggregator that handles all layers at once, because it is faster or because they depend on one another."""

    def combine_layers(
        self, layers: Mapping[str, LoRAFactors], weights: Tensor, start: Mapping[str, LoRAFactors] | None = None
    ) -> dict[str, LayerUpdate]:
        """As `Aggregator.combine`, for every layer by its path."""
        ...


def aggregate(
    aggregator: Aggregator, clients: AdapterState, weights: Tensor, start: AdapterState | None = None
) -> ServerUpdate:
    """The server step: every layer by the method, the head by its weighted mean.

    `clients` holds tensors with a leading K, `weights` (K,) sums to 1, `start` is what the clients were sent. Computed
    in float64 on the clients' device and returned in the clients' dtype; the order of the clients matters up to
    rounding only.
    """
    starts = None if start is None else start.factors
    if isinstance(aggregator, JointAggregator) and clients.factors:
        updates = aggregator.combine_layers(clients.factors, weights, starts)
    else:
        updates = {
            path: aggregator.combine(factors, weights, None if starts is None else starts[path])
            for path, factors in clients.factors.items()
        }
    if starts is not None and not (aggregator.decomposes or aggregator.restarts):
        updates = {path: _keep_unused(u, clients.factors[path], starts[path]) for path, u in updates.items()}
    dtypes = {path: factors.A.dtype for path, factors in clients.factors.items()}
    head = {name: weighted_mean(tensor, weights) for name, tensor in clients.head.items()}
    return ServerUpdate(
        factors={path: update.factors.to(dtypes[path]) for path, update in updates.items()},
        folded={path: update.folded.to(dtypes[path]) for path, update in updates.items() if update.folded is not None},
        head={name: tensor.to(clients.head[name].dtype) for name, tensor in head.items()},
        sent_rank={
            path: update.factors.rank if update.sent_rank is None else update.sent_rank
            for path, update in updates.items()
        },
    )


def _keep_unused(update: LayerUpdate, clients: LoRAFactors, start: LoRAFactors) -> LayerUpdate:
    """Directions that no client of the round has, all being of smaller rank, stay as they were sent.

    Their mean is zero, and from a zero row of A and a zero column of B no later round could train them again.
    """
    used = nonzero_rows(clients).any(0)  # (R,)
    new = update.factors
    A, B = start.A.to(new.A), start.B.to(new.B)
    factors = LoRAFactors(A=torch.where(used.unsqueeze(1), new.A, A), B=torch.where(used, new.B, B))
    return replace(update, factors=factors)


def bias_metrics(clients: AdapterState, weights: Tensor, update: ServerUpdate) -> dict[str, Tensor]:
    """How far the server's update is from the ideal one, ΔW = Σ p_k B_k A_k: metric -> (L,) float64, layers in order.

    error_before, cosine_before: ‖ΔW − X‖/‖ΔW‖ and the cosine of ΔW and X, for X = B̄Ā (plain averaging of the factors).
    error_after, cosine_after: the same for what the method leaves the clients with, folded part included.
    norm_ratio, correction_ratio: ‖B'‖/‖B̄‖ and ‖B' − B̄‖/‖B̄‖; cosine alone does not show an inflated B.
    A ratio is 0 where its denominator is. Errors below about 1e-8, of float32 factors below 3e-4, may be rounding.
    Stays on the clients' device.
    """
    paths = list(clients.factors)
    if not paths:
        return {}
    ideals = [split_ideal_update(clients.factors[path], weights) for path in paths]
    new = [update.factors[path].to(torch.float64) for path in paths]
    layers = zip(ideals, new, (update.folded.get(path) for path in paths), strict=True)
    products = torch.stack([_inner_products(*layer) for layer in layers]).flatten(1).unbind(1)  # 36 of (L,)

    def inner_of(left: _Sum, right: _Sum) -> Tensor:
        terms = [a * b * products[6 * i + j] for i, a in enumerate(left) if a for j, b in enumerate(right) if b]
        return torch.stack(terms).sum(0)

    def square(of: _Sum) -> Tensor:
        return inner_of(of, of).clamp_min(0.0)  # of terms that cancel, rounding may leave less than nothing

    ideal_square = square_of_sum(square(_MEAN), inner_of(_MEAN, _BIAS), square(_BIAS))
    error_square = square_of_sum(square(_GAP), inner_of(_GAP, _BIAS), square(_BIAS))

    def cosine(of: _Sum) -> Tensor:
        return _ratio(inner_of(_MEAN, of) + inner_of(_BIAS, of), (ideal_square * square(of)).sqrt())

    mean_b, new_b = [ideal.mean.B for ideal in ideals], [factors.B for factors in new]
    size, new_size, change = (
        torch.stack(torch._foreach_norm(B)) for B in (mean_b, new_b, torch._foreach_sub(new_b, mean_b))
    )
    return {
        "error_before": _ratio(square(_BIAS), ideal_square).sqrt(),
        "error_after": _ratio(error_square, ideal_square).sqrt(),
        "cosine_before": cosine(_MEAN),
        "cosine_after": cosine(_APPLIED),
        "norm_ratio": _ratio(new_size, size),
        "correction_ratio": _ratio(change, size),
    }


_Sum = tuple[int, int, int, int, int, int]  # of the products that `_inner_products` lists, each with its sign
_MEAN: _Sum = (1, 0, 0, 0, 0, 0)
_APPLIED: _Sum = (0, 0, 0, 1, 0, 1)
_BIAS: _Sum = (0, 0, 0, 0, 1, 0)
_GAP: _Sum = (0, 1, 1, 0, 0, -1)  # B̄Ā − B'A' from differences of factors: close products would cancel


def _inner_products(ideal: IdealUpdate, new: LoRAFactors, folded: LoRAFactors | None) -> Tensor:
    """⟨X, Y⟩ (6, 6) of B̄Ā, (B̄ − B')Ā, B'(Ā − A'), B'A', ΔR and the folded part. All of few ranks in one product."""
    mean, bias = ideal.mean, ideal.bias
    A = torch.cat([mean.A, mean.A, mean.A - new.A, new.A])  # (4R, I)
    B = torch.cat([mean.B, mean.B - new.B, new.B, new.B], dim=1)  # (O, 4R)

    def with_few(other: LoRAFactors) -> Tensor:
        return ((B.mT @ other.B) * (A @ other.A.mT)).view(4, -1).sum(1)

    few = ((B.mT @ B) * (A @ A.mT)).view(4, mean.rank, 4, mean.rank).sum((1, 3))
    bias_square = ideal.bias_square()
    if folded is None:
        edge = torch.stack([with_few(bias), few.new_zeros(4)])
        corner = torch.stack([bias_square, *few.new_zeros(3).unbind()])
    else:
        merged = folded.to(torch.float64)
        edge, cross = torch.stack([with_few(bias), with_few(merged)]), inner(merged, bias)
        corner = torch.stack([bias_square, cross, cross, squared_norm(merged)])
    return torch.cat([torch.cat([few, edge.mT], dim=1), torch.cat([edge, corner.view(2, 2)], dim=1)])


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)

"""The contract of an aggregation method, and the server step that applies one to all layers.

Letters: K clients, R rank, I in_features, O out_features, L adapted layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lorafair.aggregation.factor_algebra import (
    nonzero_rows,
    weighted_mean,
)
from lorafair.model.adapter import PARTS, AdapterState, LoRAFactors, Part

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


class Aggregator(ABC):
    """An aggregation method: a frozen dataclass with `combine`, whose fields are the options of `method:`.

    Register one with `lorafair.register_method`. The round asks what clients train, send, receive and keep, and takes
    bytes, checkpoints and mixed ranks from the answers.

    Example:
        >>> @lorafair.register_method("trimmed")
        ... @dataclass(frozen=True)
        ... class Trimmed(lorafair.Aggregator):
        ...     cut: int = 1
        ...
        ...     def combine(self, clients, weights, start=None):
        ...         A, B = (factor.sort(0).values[self.cut : -self.cut].mean(0) for factor in (clients.A, clients.B))
        ...         return lorafair.LayerUpdate(lorafair.LoRAFactors(A=A, B=B))
    """

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
    personal_parts: ClassVar[tuple[Part, ...]] = ()
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
        return tuple(part for part in self.trains(round_index) if part not in self.personal_parts)

    @abstractmethod
    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """One layer of the next round.

        Args:
            clients: The factors after training, A (K, R, I) and B (K, O, R), clients ascending.
            weights: (K,) float64, the aggregation weights; they sum to 1.
            start: What the clients of this round were sent, A (R, I) and B (O, R).

        Returns:
            Where clients start the next round, and what is folded into the frozen weight first. To be computed in
            float64, as the functions of `factor_algebra` do; `aggregate` casts the result back.
        """


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

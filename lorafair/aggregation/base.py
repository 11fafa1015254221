"""The contract of an aggregation method, and the server step that applies one to all layers.

Letters: K clients, R LoRA rank, I in_features, O out_features, L adapted layers.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from lorafair.aggregation.coded_fold import Coding
from lorafair.aggregation.factor_algebra import nonzero_rows, weighted_mean
from lorafair.aggregation.head_mean import class_mean_head, mean_head
from lorafair.aggregation.rank_pruning import RankPruning
from lorafair.aggregation.smoothing import Smoothing
from lorafair.cluster.watchdog import heartbeat
from lorafair.config.options import option_of
from lorafair.errors import ConfigError, LorafairError, of_plugin
from lorafair.model.adapter import PARTS, AdapterLayout, AdapterState, Core, CoreShape, LoRAFactors, Part
from lorafair.seeding import seeded

T = TypeVar("T")


@dataclass(frozen=True)
class LayerUpdate:
    """The result of the server step for one layer.

    Example:
        >>> mean = lorafair.LoRAFactors(A=clients.A.mean(0), B=clients.B.mean(0))
        >>> update = lorafair.LayerUpdate(mean)  # every client starts the next round from the mean
    """

    factors: LoRAFactors  # (R, I) and (O, R): where every client starts the next round
    folded: LoRAFactors | None = None  # first merged into the frozen weight as s·B·A; its rank may be anything
    sent_lora_rank: int | None = None  # beyond it B is zero and A is known to the clients: neither is sent (all R)
    core: Core | None = None  # what `initialize` has made of it


@dataclass(frozen=True)
class InitialLayer:
    """What a method gets to initialise a layer before the first round.

    Example:
        >>> def initialize(self, layer):  # of an Aggregator: A from the first rows of W0, which stays as it is
        ...     A = layer.weight[: layer.drawn.rank]
        ...     return lorafair.LayerUpdate(lorafair.LoRAFactors(A=A, B=layer.drawn.B))
    """

    drawn: LoRAFactors  # A (R, I) Kaiming-uniform, B (O, R) zero
    weight: Tensor  # W0 (O, I)
    scaling: float  # s of the update s·B·A
    generator: torch.Generator  # on the CPU, seeded for this layer: for what else is to be drawn
    gradient: Tensor | None = None  # (O, I) of the loss by W0, of `images_at_start` training images


@dataclass(frozen=True)
class ServerUpdate:
    """What the server makes of a round, by layer path and parameter name."""

    factors: dict[str, LoRAFactors]
    folded: dict[str, LoRAFactors]  # only the layers that have any
    head: dict[str, Tensor]
    sent_lora_rank: dict[str, int]  # rows of A and columns of B the clients are sent
    cores: dict[str, Core] = dataclasses.field(default_factory=dict)  # of a method that has them

    def to(self, device: torch.device | str) -> ServerUpdate:
        """The same on another device."""

        def moved(layers: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
            return {path: LoRAFactors(A=f.A.to(device), B=f.B.to(device)) for path, f in layers.items()}

        head = {name: tensor.to(device) for name, tensor in self.head.items()}
        cores = {path: Core(core.H.to(device), core.scales.to(device)) for path, core in self.cores.items()}
        return replace(self, factors=moved(self.factors), folded=moved(self.folded), head=head, cores=cores)

    @property
    def adapter(self) -> AdapterState:
        """Where clients start."""
        return AdapterState(self.factors, self.head, self.cores)

    @staticmethod
    def joined(updates: Sequence[ServerUpdate], paths: Sequence[str]) -> ServerUpdate:
        """Updates of different layers as one, of the layers `paths` in this order."""

        def ordered(of_layer: Mapping[str, T]) -> dict[str, T]:
            return {path: of_layer[path] for path in paths if path in of_layer}

        return ServerUpdate(
            factors=ordered({path: f for update in updates for path, f in update.factors.items()}),
            folded=ordered({path: f for update in updates for path, f in update.folded.items()}),
            head={name: tensor for update in updates for name, tensor in update.head.items()},
            sent_lora_rank=ordered({path: r for update in updates for path, r in update.sent_lora_rank.items()}),
            cores=ordered({path: core for update in updates for path, core in update.cores.items()}),
        )


class Aggregator(ABC):
    """An aggregation method: a frozen dataclass with `combine`, whose fields are the options of `method:`.

    Register one with `lorafair.register_method`. Its methods say what clients train, send, receive and keep; traffic,
    checkpoints and mixed LoRA ranks follow from these.

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
    """One client trains on the images of all clients."""
    restarts: ClassVar[bool] = False
    """Every round starts from fresh factors; what was learned is in the folded part."""
    mixed_lora_ranks: ClassVar[bool] = True
    """Clients may have factors of smaller LoRA rank, padded with zeros to R."""
    selects_directions: ClassVar[bool] = False
    """Clients of smaller LoRA rank hold all R directions, and train as many as they can, drawn anew every round."""
    decomposes: ClassVar[bool] = False
    """The factors that come back are a new decomposition of the update: their difference from the old says nothing."""
    sends_fewer_directions: ClassVar[bool] = False
    """Updates may have a `sent_lora_rank` below R."""
    initializations: ClassVar[tuple[str, ...]] = ("average", "fresh", "local")
    """Values of federation.initialization that fit the method; the first leaves it as published."""
    lora_initializations: ClassVar[tuple[str, ...]] = ("kaiming", "pissa", "olora")
    """Values of model.lora.initialization that fit the method; the first is taken where none is set."""
    resets: ClassVar[bool] = False
    """Every round starts from the factors of the first one; before, what clients are sent is merged, less those."""
    averages_factors: ClassVar[bool] = False
    """With clients of equal LoRA rank, the server step gives the same for one client that is their weighted mean."""
    personal_parts: ClassVar[tuple[Part, ...]] = ()
    """What each client keeps to itself from round to round. Where it is not empty, every client is evaluated."""

    def __post_init__(self) -> None:
        """Check the options; a subclass with a `__post_init__` of its own calls this one. Raises ConfigError."""
        for declared in dataclasses.fields(cast(Any, self)):
            option, value = option_of(declared), getattr(self, declared.name)
            if not option.is_in_range(value):
                raise ConfigError(f"method.{declared.name}={value} is out of range: it must be {option.range_text}")
            choice = option.requires
            if (
                choice
                and value is not None
                and not choice.holds(lambda key: getattr(self, key.removeprefix("method.")))
            ):
                raise ConfigError(f"method.{declared.name}={value} has no effect: it needs {choice}")

    @property
    def folds(self) -> bool:
        """Whether updates of `combine` may have a folded part."""
        return False

    @property
    def rank_pruning(self) -> RankPruning | None:
        """How clients lower their own LoRA rank, for a method where they do."""
        return None

    @property
    def core(self) -> CoreShape | None:
        """The square matrix between A and B that clients train, of a method that has one."""
        return None

    @property
    def coding(self) -> Coding | None:
        """How what the server sends is coded (folded parts are `coded_fold.rounded` then); None: all in float32."""
        return None

    @property
    def smoothing(self) -> Smoothing | None:
        """How clients smooth the gradients of their factors before a step, for a method where they do."""
        return None

    @property
    def needs_all_layers(self) -> bool:
        """Whether the result for a layer depends on the other layers."""
        return False

    @property
    def uses_products(self) -> bool:
        """Whether all that the server step takes from the clients is their mean and (Σ p_k B_k A_k − B̄Ā)Āᵀ.

        Client-level privacy then releases both, and gives the method two clients that have them.
        """
        return False

    @property
    def note_on_mixed_lora_ranks(self) -> str:
        """What the log of a run should say if clients differ in LoRA rank."""
        return ""

    def trains(self, round_index: int) -> tuple[Part, ...]:
        """What clients train in this round (from 0); the rest stays as it was sent."""
        return PARTS

    def trains_in_step(self, round_index: int, step: int) -> tuple[Part, ...]:
        """What clients train in this step of the round (both from 0): all that `trains` names, or some of it."""
        return self.trains(round_index)

    def receives(self, round_index: int) -> tuple[Part, ...]:
        """What the server sends down after this round, apart from folded parts."""
        return self.sends(round_index)

    def sends(self, round_index: int) -> tuple[Part, ...]:
        """What clients send up after this round."""
        return tuple(part for part in self.trains(round_index) if part not in self.personal_parts)

    def sketch_numbers(self, outputs: int, inputs: int, rank: int) -> tuple[int, int] | None:
        """Numbers of a layer that a client sends instead of its factors, and receives beside the new ones.

        For a method whose clients take part in the aggregation by sketches of their factors; `rank` is R.
        """
        return None

    @property
    def images_at_start(self) -> int:
        """Number of training images for the gradient, with respect to the frozen weights, that `initialize` gets."""
        return 0

    def initialize(self, layer: InitialLayer) -> LayerUpdate:
        """One layer's factors before round 1, and what is folded into its weight: by default as drawn, and nothing."""
        return LayerUpdate(layer.drawn)

    def combine_core(self, cores: Tensor, weights: Tensor) -> Tensor:
        """One layer's core of the next round (h, R/h, R/h), from s_i H_i (K, h, R/h, R/h) that the clients send."""
        return weighted_mean(cores, weights)

    def in_round(self, round_index: int) -> Aggregator:
        """The method as it aggregates after this round (from 0); itself, if it does the same after every round."""
        return self

    @abstractmethod
    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """One layer of the next round.

        Args:
            clients: The factors after training, A (K, R, I) and B (K, O, R), in ascending order of clients.
            weights: (K,) float64, the aggregation weights; they sum to 1.
            start: The factors that were sent to the clients of this round, A (R, I) and B (O, R).

        Returns:
            The factors from which clients start the next round, and what is folded into the frozen weight before that.
            Both should be computed in float64, as in `factor_algebra`; `aggregate` casts them back.
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
    aggregator: Aggregator,
    clients: AdapterState,
    weights: Tensor,
    start: AdapterState | None = None,
    receives: Sequence[Part] = PARTS,
    class_counts: Tensor | None = None,
) -> ServerUpdate:
    """The server step: every layer by the method, the head by its weighted mean.

    `clients` holds tensors with a leading K, `weights` (K,) sums to 1, `start` is what the clients were sent and
    `receives` what they are sent of the result: factors that they are not sent stay those of `start`. With
    `class_counts` (K, Q), which needs `start`, each row of the head has weights of its own. Computed in float64 on the
    clients' device and returned in the clients' dtype; the order of the clients matters up to rounding only.
    """
    initial_factors = None if start is None else start.factors
    if isinstance(aggregator, JointAggregator) and clients.factors:
        with of_method(aggregator, "combine_layers"):
            updates = aggregator.combine_layers(clients.factors, weights, initial_factors)
    else:
        updates = {}
        for path, factors in clients.factors.items():
            heartbeat()
            with of_method(aggregator, f"combine of layer {path}"):
                sent = None if initial_factors is None else initial_factors[path]
                updates[path] = aggregator.combine(factors, weights, sent)
    _check_updates(aggregator, clients, updates)
    if initial_factors is not None and not (aggregator.decomposes or aggregator.restarts):
        updates = {
            path: _keep_unused(update, clients.factors[path], weights, initial_factors[path])
            for path, update in updates.items()
        }
    if initial_factors is not None and not (aggregator.personal_parts or aggregator.restarts):
        updates = {path: _keep_unsent(update, initial_factors[path], receives) for path, update in updates.items()}
    dtypes = {path: factors.A.dtype for path, factors in clients.factors.items()}
    cores = {path: _core_of(aggregator, core, weights) for path, core in clients.cores.items()}
    if class_counts is None or start is None:
        head = mean_head(clients.head, weights)
    else:
        head = class_mean_head(clients.head, class_counts, start.head)
    return ServerUpdate(
        factors={path: update.factors.to(dtypes[path]) for path, update in updates.items()},
        folded={
            path: update.folded if aggregator.coding else update.folded.to(dtypes[path])  # float32 rounds what is coded
            for path, update in updates.items()
            if update.folded is not None
        },
        head={name: tensor.to(clients.head[name].dtype) for name, tensor in head.items()},
        sent_lora_rank={
            path: update.factors.rank if update.sent_lora_rank is None else update.sent_lora_rank
            for path, update in updates.items()
        },
        cores=cores,
    )


def _core_of(aggregator: Aggregator, clients: Core, weights: Tensor) -> Core:
    with of_method(aggregator, "combine_core"):
        combined = aggregator.combine_core(clients.scaled, weights)
    if combined.shape != clients.H.shape[1:]:
        method, wanted = type(aggregator).__name__, tuple(clients.H.shape[1:])
        raise LorafairError(f"method {method}: combine_core returned {tuple(combined.shape)}; it must be {wanted}")
    return Core(H=combined.to(clients.H.dtype), scales=torch.ones_like(clients.scales[0]))


def alternates(method: Aggregator | type[Aggregator]) -> bool:
    """Whether what clients train may differ from step to step."""
    kind = method if isinstance(method, type) else type(method)
    return kind.trains_in_step is not Aggregator.trains_in_step


def try_out(aggregator: Aggregator, layout: AdapterLayout) -> None:
    """Aggregate one layer of two made-up clients, to find mistakes of a plug-in before the first round.

    Raises LorafairError that names the method.
    """
    generator = seeded(0, "trial of a method")
    path, (of_A, of_B) = next(iter(layout.factors.items()))
    made = LoRAFactors(*(torch.randn(2, *shape, generator=generator) for shape in (of_A, of_B)))
    start = LoRAFactors(A=made.A[0], B=made.B[0])
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    cores = {}
    if path in layout.cores:
        of_h, of_scales = layout.cores[path]
        cores[path] = Core(H=torch.randn(2, *of_h, generator=generator), scales=torch.ones(2, *of_scales))
    clients = AdapterState({path: made}, {}, cores)
    update = aggregate(aggregator, clients, weights, AdapterState({path: start}, {}))
    check_finite(aggregator, update)


def check_finite(aggregator: Aggregator, update: ServerUpdate) -> None:
    """Raise LorafairError that names the layer where a method has made NaN or infinity of finite adapters."""
    layers = {path: [factors.A, factors.B] for path, factors in update.factors.items()}
    for path, factors in update.folded.items():
        layers[path] += [factors.A, factors.B]
    for path, core in update.cores.items():
        layers[path] += [core.H, core.scales]
    finite = {path: torch.stack([tensor.isfinite().all() for tensor in layers[path]]).all() for path in layers}
    if finite and not torch.stack(list(finite.values())).all():  # a GPU is waited for once
        path = next(path for path, is_finite in finite.items() if not is_finite)
        raise LorafairError(
            f"method {type(aggregator).__name__} made NaN or infinity of finite adapters, in layer {path}"
        )


def of_method(aggregator: Aggregator, what: str) -> AbstractContextManager[None]:
    """Names a plug-in's method in its errors; an error of a shipped one keeps its traceback."""
    method = type(aggregator)
    shipped = method.__module__.startswith("lorafair.")
    return nullcontext() if shipped else of_plugin(f"method {method.__name__}: {what}")


def _check_updates(aggregator: Aggregator, clients: AdapterState, updates: Mapping[str, LayerUpdate]) -> None:
    """Raise LorafairError for other layers, types or shapes than a method may return."""
    method = f"method {type(aggregator).__name__}"
    if not isinstance(updates, Mapping) or updates.keys() != clients.factors.keys():
        raise LorafairError(f"{method}: combine_layers must return an update for each of the layers, and no other")
    for path, update in updates.items():
        layer = f"{method}: combine of layer {path}"
        check_layer_update(update, layer, clients.factors[path])
        if update.folded is not None and not aggregator.folds:
            raise LorafairError(f"{layer} returned a folded part; `folds` of the method must be True then")


def check_layer_update(update: Any, layer: str, like: LoRAFactors) -> None:
    """Raise LorafairError for what is no update of a layer whose factors are (..., R, I) and (..., O, R) as `like`."""
    if not isinstance(update, LayerUpdate):
        raise LorafairError(f"{layer} returned a {type(update).__name__}; it must be a lorafair.LayerUpdate")
    (lora_rank, inputs), outputs = like.A.shape[-2:], like.B.shape[-2]
    _check_factors(update.factors, f"{layer} returned factors", lora_rank, inputs, outputs)
    if update.folded is not None:
        _check_factors(update.folded, f"{layer} returned a folded part", None, inputs, outputs)


def _check_factors(factors: Any, what: str, lora_rank: int | None, inputs: int, outputs: int) -> None:
    """Raise LorafairError for what is no A (R, I) and B (O, R); a `lora_rank` of None may be any."""
    if not isinstance(factors, LoRAFactors):
        raise LorafairError(f"{what} of type {type(factors).__name__}; they must be lorafair.LoRAFactors")
    A, B = tuple(factors.A.shape), tuple(factors.B.shape)
    wanted = B[-1] if lora_rank is None and B else lora_rank
    if ((wanted, inputs), (outputs, wanted)) != (A, B):
        shown = "r" if lora_rank is None else lora_rank
        raise LorafairError(f"{what} A {A} and B {B}; they must be ({shown}, {inputs}) and ({outputs}, {shown})")


def _keep_unused(update: LayerUpdate, clients: LoRAFactors, weights: Tensor, start: LoRAFactors) -> LayerUpdate:
    """Directions that no client of the round has, or none whose weight is above zero, stay as they were sent.

    Their mean is zero, and from a zero row of A and a zero column of B no later round could train them again.
    """
    new, have = update.factors, nonzero_rows(clients)  # (K, R)
    counted = (have & (weights > 0).to(have.device).unsqueeze(1)).any(0)
    used = counted | (have.any(0) & ((new.A != 0).any(-1) | (new.B != 0).any(-2)))  # HETLoRA has weights of its own
    A, B = start.A.to(new.A), start.B.to(new.B)
    factors = LoRAFactors(A=torch.where(used.unsqueeze(1), new.A, A), B=torch.where(used, new.B, B))
    return replace(update, factors=factors)


def _keep_unsent(update: LayerUpdate, start: LoRAFactors, receives: Sequence[Part]) -> LayerUpdate:
    """A factor that clients are not sent is the one they have: with mixed LoRA ranks not the mean of what they hold."""
    new = update.factors
    A = new.A if "A" in receives else start.A.to(new.A)
    B = new.B if "B" in receives else start.B.to(new.B)
    return replace(update, factors=LoRAFactors(A=A, B=B))

"""The trained numbers of all adapters and heads of a model, as one row a client.

Letters: C clients in the cohort, R LoRA rank, I in_features, O out_features, P packed length.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorafair.model.adapter import PARTS, AdapterLayout, AdapterState, LoRAFactors, Part
from lorafair.model.lora import ClientHead, DropoutStreams, LoRALinear
from lorafair.seeding import seeded


@dataclass(frozen=True, eq=False)
class TrainedColumns:
    """Neighbouring columns of the packed rows as one parameter (C, n)."""

    parts: tuple[Part, ...]  # those among which the columns lie
    span: slice
    parameter: nn.Parameter


class AdapterParameters:
    """All trained parameters of a model as views of one (C, P) tensor.

    Loading, reading, clipping and the optimiser step of a whole cohort are then single operations on `flat`, and a
    packed adapter is a row of it. Build it after the model has been moved to its device: moving parameters afterwards
    would cut the views.
    """

    def __init__(self, model: nn.Module, max_cohort: int = 1) -> None:
        self._layers = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
        self._heads = {path: m for path, m in model.named_modules() if isinstance(m, ClientHead)}
        self.layout = AdapterLayout.of(
            {path: (m.A.shape[1:], m.B.shape[1:]) for path, m in self._layers.items()},
            {name: parameter.shape[1:] for name, parameter in self._head_parameters().items()},
            next(iter(self._layers.values())).core,
        )
        device = next(iter(self._layers.values())).A.device
        self._values = torch.zeros(max_cohort, self.layout.length, device=device)
        self._gradients = torch.zeros_like(self._values)
        self.flat = nn.Parameter(self._values)  # (C, P)
        self._trained: list[TrainedColumns] = []
        self._chosen: tuple[tuple[Part, ...], bool] | None = None  # what `train_only` was last asked for
        self._show(1)
        self.train_only(PARTS)

    def train_only(self, parts: Sequence[Part], *, separately: bool = False) -> list[TrainedColumns]:
        """Let only these parts have gradients; returns them as views (C, n) of `flat`, for an optimiser.

        Neighbouring parts are one view, unless each is to be treated `separately`.
        """
        self._gradients.zero_()
        if self._chosen == (tuple(parts), separately):
            return self._trained
        self._chosen = tuple(parts), separately
        for module in self._layers.values():
            module.A.requires_grad_("A" in parts)
            module.B.requires_grad_("B" in parts)
            if module.core is not None:
                module.H.requires_grad_("core" in parts)
                module.scales.requires_grad_("core" in parts)
        for parameter in self._head_parameters().values():
            parameter.requires_grad_("head" in parts)
        groups = [(part,) for part in PARTS if part in parts] if separately else [tuple(parts)]
        self._trained = [
            TrainedColumns(group, span, nn.Parameter(_columns(self._values, span)))
            for group in groups
            for span in self.layout.spans(group)
            if span.stop > span.start
        ]
        self._show(len(self.flat))
        return self._trained

    def resize(self, cohort: int) -> None:
        """Let the model hold the first `cohort` rows: 1 for evaluation, C while a cohort trains."""
        if cohort != len(self.flat):
            self._show(cohort)

    def tensors(self) -> Iterator[tuple[slice, nn.Parameter]]:
        """The columns of a packed row and the parameter of every tensor, in the order of the row."""
        offset, layers = 0, self._layers.values()
        ordered = [*(layer.A for layer in layers), *(layer.B for layer in layers)]
        ordered += [tensor for path in self.layout.cores for tensor in self._core_parameters(path)]
        for parameter in [*ordered, *self._head_parameters().values()]:
            start, offset = offset, offset + parameter[0].numel()
            yield slice(start, offset), parameter

    def show(self) -> None:
        """Let the model hold the rows in use, where its parameters have been something else."""
        self._show(len(self.flat))

    def _show(self, cohort: int) -> None:
        if cohort > 1:  # gradients are views of one tensor on purpose: the optimiser then takes one step, not hundreds
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        flat, gradient = self._values.narrow(0, 0, cohort), self._gradients.narrow(0, 0, cohort)
        _view(self.flat, flat, gradient)
        for trained in self._trained:
            _view(trained.parameter, _columns(flat, trained.span), _columns(gradient, trained.span))
        values, gradients = self.layout.unpack(flat), self.layout.unpack(gradient)
        for path, module in self._layers.items():
            _view(module.A, values.factors[path].A, gradients.factors[path].A)
            _view(module.B, values.factors[path].B, gradients.factors[path].B)
        for path in self.layout.cores:
            _view(self._layers[path].H, values.cores[path].H, gradients.cores[path].H)
            _view(self._layers[path].scales, values.cores[path].scales, gradients.cores[path].scales)
        for name, parameter in self._head_parameters().items():
            _view(parameter, values.head[name], gradients.head[name])

    def write(self, rows: Tensor) -> None:
        """Load packed adapters (C, P), or one (P,) for all the rows in use."""
        with torch.no_grad():
            self.flat.copy_(rows.expand_as(self.flat))

    @property
    def drops(self) -> bool:
        """Whether a layer has dropout."""
        return any(module.dropout > 0 for module in self._layers.values())

    def use_dropout(self, streams: DropoutStreams | None) -> None:
        """Draw dropout masks from these streams, or switch dropout off."""
        for module in self._layers.values():
            if module.dropout:  # setting an attribute of a module takes a while
                module.dropout_streams = streams

    def scale_clients(self, scales: Tensor | None) -> None:
        """Multiply the updates of the C clients of a cohort by these (C,), or by nothing."""
        for module in self._layers.values():
            module.client_scales = None if scales is None else scales.view(-1, 1, 1)

    def draw(self, seed: int, round_index: int) -> Tensor:
        """A fresh packed adapter (P,) on the CPU; what a layer gets follows from the seed, the round and its name."""
        factors = {path: m.draw(seeded(seed, "lora", round_index, path)) for path, m in self._layers.items()}
        head = {
            f"{path}.{name}": tensor
            for path, module in self._heads.items()
            for name, tensor in module.draw(seeded(seed, "head", round_index, path)).items()
        }
        cores = {path: self._layers[path].draw_core() for path in self.layout.cores}
        return self.layout.pack(AdapterState(factors, head, cores))

    @torch.no_grad()
    def fold_into_base(self, folded: Mapping[str, LoRAFactors]) -> None:
        """Add s·B·A to the frozen weights: W0 += s·B·A with A (r, I), B (O, r) of any LoRA rank r."""
        for path, factors in folded.items():
            layer = self._layers[path]
            weight = layer.base.weight
            weight.addmm_(factors.B.to(weight), factors.A.to(weight), alpha=layer.scaling)

    @torch.no_grad()
    def load_base_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the frozen weights (O, I) under some adapters, as `base_weights` gave them."""
        for path, weight in weights.items():
            self._layers[path].base.weight.copy_(weight)

    def base_weights(self) -> dict[str, Tensor]:
        """The frozen weights (O, I) under the adapters, which folding changes."""
        return {path: layer.base.weight.detach() for path, layer in self._layers.items()}

    @contextmanager
    def base_gradients(self) -> Iterator[dict[str, Tensor]]:
        """In the block, what `backward` gives is added up: gradients (O, I) of the frozen weights, float32, by path."""
        weights = self.base_weights()
        gradients = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}

        def watch(path: str) -> RemovableHandle:
            def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                entering = inputs[0].detach().flatten(0, -2).float()  # (N..., I)

                def add(gradient: Tensor) -> None:
                    gradients[path].addmm_(gradient.flatten(0, -2).float().mT, entering)

                if output.requires_grad:  # not in the first pass of gradient checkpointing
                    output.register_hook(add)

            return self._layers[path].register_forward_hook(note)

        handles = [watch(path) for path in self._layers]
        try:
            yield gradients
        finally:
            for handle in handles:
                handle.remove()
            self._gradients.zero_()

    def _core_parameters(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self._layers[path].H, self._layers[path].scales

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{path}.{name}": p for path, head in self._heads.items() for name, p in head.named_parameters()}


def _columns(rows: Tensor, span: slice) -> Tensor:
    return rows.narrow(1, span.start, span.stop - span.start)


def _view(parameter: nn.Parameter, value: Tensor, gradient: Tensor) -> None:
    parameter.grad = None  # autograd checks a gradient's shape against the parameter's, so this order matters
    parameter.data = value
    parameter.grad = gradient

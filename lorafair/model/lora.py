"""Low-rank adapters for C clients side by side around frozen linear layers (LoRA, arXiv 2106.09685).

Letters: C clients in the cohort, N images of one client, R LoRA rank, I in_features, O out_features, P packed length.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lorafair.errors import ConfigError
from lorafair.model.adapted_product import AdaptedWeight, adapted_product
from lorafair.model.adapter import PARTS, AdapterLayout, AdapterState, Core, CoreShape, LoRAFactors, Part
from lorafair.seeding import seeded


@dataclass(frozen=True)
class DropoutStreams:
    """Where each client of a training cohort draws its dropout masks.

    Each draws from a generator of its own and for its own images only, so that its masks do not depend on the
    clients beside it. The rows beyond a client's count are padding.
    """

    generators: Sequence[torch.Generator]
    counts: Sequence[int]

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Inverted dropout of x (C*N, ...) with probability p."""
        mask = self.mask(x, p)
        return x if mask is None else (x * mask).div_(1 - p)

    def mask(self, x: Tensor, p: float) -> Tensor | None:
        """Like x (C*N, ...): 0 with probability p, else 1; None where nothing is dropped."""
        if p == 0:
            return None
        mask, padded = torch.empty_like(x), max(1, *self.counts)
        of_clients = mask.chunk(len(self.generators))
        for part, generator, count in zip(of_clients, self.generators, self.counts, strict=True):
            rows = part.shape[0] * count // padded  # a layer may split an image into several rows (windows)
            part[:rows].bernoulli_(1 - p, generator=generator)
            part[rows:].zero_()
        return mask


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus the update s·B·A of each of C clients.

    The first axis of the input holds the cohort's images client by client: (C*N, ..., I) -> (C*N, ..., O). The frozen
    layer is one product for all of them, the adapters are one batched pair. model/proof.py sees to it that the input
    of a layer is like that.
    """

    A: nn.Parameter  # (C, R, I)
    B: nn.Parameter  # (C, O, R)

    def __init__(
        self, base: nn.Linear, lora_rank: int, alpha: float, dropout: float = 0.0, core: CoreShape | None = None
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / lora_rank
        self.dropout = dropout
        self.dropout_streams: DropoutStreams | None = None
        self.client_scales: Tensor | None = None  # (C, 1, 1) of the update, beyond `scaling`
        self.computes_in: torch.dtype | None = None  # to which all of it is cast; None: as it is, or as autocast says
        device = base.weight.device
        # Zero, and not what the memory holds: NaN times B = 0 is NaN. Training starts with what `draw` gives.
        self.A = nn.Parameter(torch.zeros(1, lora_rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(1, base.out_features, lora_rank, device=device))
        self.core = core
        if core is not None:  # (C, h, R/h, R/h) and (C, h)
            of_h, of_scales = core.of_rank(lora_rank)
            self.H = nn.Parameter(torch.zeros(1, *of_h, device=device))
            self.scales = nn.Parameter(torch.ones(1, *of_scales, device=device))

    def draw(self, generator: torch.Generator) -> LoRAFactors:
        """Fresh factors as LoRA starts: A Kaiming-uniform, B zero, so that the update is zero."""
        bound = 1 / math.sqrt(self.base.in_features)  # kaiming_uniform with a = sqrt(5), as in the LoRA authors' code
        A = torch.empty(self.A.shape[1:]).uniform_(-bound, bound, generator=generator)  # (R, I)
        return LoRAFactors(A=A, B=torch.zeros(self.B.shape[1:]))

    def draw_core(self) -> Core:
        """Cores start at zero, with scales of 1, so that the update is zero."""
        return Core(H=torch.zeros(self.H.shape[1:]), scales=torch.ones(self.scales.shape[1:]))

    @property
    def outgoing(self) -> Tensor:
        """B (C, O, R), times the core where there is one."""
        return self.B if self.core is None else Core(self.H, self.scales).after(self.B)

    @property
    def weight(self) -> AdaptedWeight:
        """For modules that read the weight of the layer instead of calling it: one that carries the update."""
        return AdaptedWeight(self)

    def forward(self, x: Tensor, *given: Tensor | None) -> Tensor:
        """(C*N, ..., I) -> (C*N, ..., O), with the layer's bias (O,) or the one given."""
        (bias,) = given or (self.base.bias,)
        cohort = self.A.shape[0]
        A = self.A if self.client_scales is None else self.A * self.client_scales[:cohort]
        B = self.outgoing
        weight = self.base.weight
        if self.computes_in is not None:
            weight, A, B = (tensor.to(self.computes_in) for tensor in (weight, A, B))
            bias = None if bias is None else bias.to(self.computes_in)
        streams = self.dropout_streams
        if x.is_cuda:
            mask = None if streams is None else streams.mask(x, self.dropout)
            scaling = self.scaling if mask is None else self.scaling / (1 - self.dropout)
            return adapted_product(x, weight, bias, A, B, scaling, mask)
        kept = x if streams is None else streams.drop(x, self.dropout)
        out = F.linear(x, weight, bias)
        hidden = torch.bmm(kept.reshape(cohort, -1, x.shape[-1]), A.mT)  # (C, N..., R)
        stacked = out.reshape(cohort, -1, out.shape[-1])  # (C, N..., O)
        return torch.baddbmm(stacked, hidden, B.mT, alpha=self.scaling).view_as(out)


class ClientHead(nn.Module):
    """The trainable classifier of each of C clients: (C*N, ..., D) -> (C*N, ..., classes)."""

    weight: nn.Parameter  # (C, classes, D)
    bias: nn.Parameter  # (C, classes)

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, classes, features))
        self.bias = nn.Parameter(torch.zeros(1, classes))
        self.in_float32 = False  # whatever comes in; else in the type of what comes in, or as autocast says

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh head: weights normal with standard deviation 0.02 (timm's for a ViT head), bias zero."""
        weight = torch.empty(self.weight.shape[1:]).normal_(0, 0.02, generator=generator)
        return {"weight": weight, "bias": torch.zeros(self.bias.shape[1:])}

    def forward(self, x: Tensor) -> Tensor:
        """(C*N, ..., D) -> (C*N, ..., classes)."""
        if self.in_float32:
            x = x.float()
        stacked = x.reshape(self.weight.shape[0], -1, x.shape[-1])  # (C, N..., D)
        return torch.baddbmm(self.bias.unsqueeze(1), stacked, self.weight.mT).view(*x.shape[:-1], -1)


def add_lora(
    backbone: nn.Module,
    targets: Sequence[str],
    *,
    lora_rank: int,
    alpha: float,
    dropout: float,
    last_blocks: int | None,
    core: CoreShape | None = None,
) -> list[str]:
    """Wrap the linear layers that `targets` name, in place; returns their module paths.

    A target is the end of a module path ("attn.proj") or a pattern with * ("blocks.*.fc2"); one that begins with -
    leaves layers out. Raises ConfigError for a target that matches no linear layer, naming the kinds of layers there
    are.
    """
    linear = {path: m for path, m in backbone.named_modules() if isinstance(m, nn.Linear)}
    chosen = _chosen(linear, targets, _first_block(backbone, last_blocks), last_blocks)
    for path, layer in chosen.items():
        if lora_rank > min(layer.in_features, layer.out_features):
            raise ConfigError(
                f"model.lora.rank={lora_rank} is larger than layer {path} allows: its weight is {layer.out_features} x "
                f"{layer.in_features}, so a LoRA rank of at most {min(layer.in_features, layer.out_features)}; "
                f"-{kind_of(path)} in model.lora.targets leaves it out"
            )
    for path in chosen:  # in the order of the model, so that the packed order does not depend on the order of targets
        parent, _, name = path.rpartition(".")
        wrapped = LoRALinear(chosen[path], lora_rank, alpha, dropout, core)
        setattr(backbone.get_submodule(parent), name, wrapped)
    return [path for path in linear if path in chosen]


def _chosen(
    linear: Mapping[str, nn.Linear], targets: Sequence[str], first: int, last_blocks: int | None
) -> dict[str, nn.Linear]:
    """The layers that `targets` name, from block `first` on."""
    chosen: dict[str, nn.Linear] = {}
    left_out = [target for target in targets if target.startswith("-")]
    for target in sorted(targets, key=lambda target: target in left_out):
        matches = [path for path in linear if is_named_by(path, target.removeprefix("-"))]
        if not matches:
            raise ConfigError(
                f"model.lora.targets: {target} matches no linear layer of this backbone; there are "
                f"{', '.join(dict.fromkeys(map(kind_of, linear))) or 'none'}"
            )
        kept = {path: linear[path] for path in matches if block_of(path) >= first}
        if not kept and target not in left_out:
            raise ConfigError(
                f"model.lora.last_blocks={last_blocks} leaves no layer of {target} in model.lora.targets to adapt"
            )
        chosen = {p: m for p, m in chosen.items() if p not in kept} if target in left_out else chosen | kept
    if not chosen:
        raise ConfigError(f"model.lora.targets=[{','.join(targets)}] leaves no layer to adapt")
    return chosen


def is_named_by(path: str, target: str) -> bool:
    """Whether a target without - is this module path, an end of it or a pattern of one of them."""
    return fnmatch(path, target) or fnmatch(path, f"*.{target}")


def block_of(path: str) -> float:
    """The index of the block a module of the backbone belongs to; infinite for a module outside `blocks`."""
    parts = path.split(".")
    return int(parts[1]) if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() else math.inf


def _first_block(backbone: nn.Module, last_blocks: int | None) -> int:
    if last_blocks is None:
        return 0
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise ConfigError(
            "model.lora.last_blocks needs a backbone with a list of blocks, such as a ViT or an MLP-Mixer"
        )
    if last_blocks > len(blocks):
        raise ConfigError(f"model.lora.last_blocks={last_blocks}: this backbone has {len(blocks)} blocks")
    return len(blocks) - last_blocks


def kind_of(path: str) -> str:
    """A module path with its numbers replaced: blocks.*.attn.proj for each of twelve."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


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

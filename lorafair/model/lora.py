"""Low-rank adapters for C clients side by side around frozen linear layers (LoRA, arXiv 2106.09685).

Letters: C clients in the cohort, N images of one client, R LoRA rank, I in_features, O out_features, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafair.errors import ConfigError
from lorafair.model.adapted_product import AdaptedWeight, adapted_product
from lorafair.model.adapter import Core, CoreShape, LoRAFactors


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

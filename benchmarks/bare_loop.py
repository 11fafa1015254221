"""What a federation is measured against: the same model and batches in a loop that knows nothing of clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafair.client.training import train_clients
from lorafair.communication.agreement import StopRequest
from lorafair.config import Config
from lorafair.experiment import Experiment, build_experiment
from lorafair.federation import begin_round
from lorafair.model.adapter import AdapterLayout
from lorafair.model.lora import ClientHead, LoRALinear
from lorafair.reporting.tracker import Clock
from lorafair.server.state import ServerState, start_or_resume


class PlainLoRA(nn.Module):
    """y = W0 x + s·B(Ax), as one would write it for a single client."""

    def __init__(self, wrapped: LoRALinear) -> None:
        super().__init__()
        self.base, self.scaling = wrapped.base, wrapped.scaling
        self.A = nn.Parameter(wrapped.A.detach()[0].clone())
        self.B = nn.Parameter(wrapped.B.detach()[0].clone())

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A, self.B
        if not torch.is_autocast_enabled(x.device.type):
            A, B = A.to(x.dtype), B.to(x.dtype)
        return self.base(x) + self.scaling * F.linear(F.linear(x, A), B)


def replace_adapters(backbone: nn.Module, adapted: Callable[[LoRALinear], nn.Module] = PlainLoRA) -> None:
    """Put plain modules in the place of the package's own ones, in place: its adapters as `adapted`, its head."""
    for path, module in list(backbone.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, LoRALinear):
            setattr(backbone.get_submodule(parent), name, adapted(module))
        elif isinstance(module, ClientHead):
            linear = nn.Linear(module.weight.shape[2], module.weight.shape[1])
            setattr(backbone.get_submodule(parent), name, linear.to(module.weight.device))


def trained_parameters(backbone: nn.Module, layout: AdapterLayout) -> list[nn.Parameter]:
    """The trained parameters of a backbone after `replace_adapters`, in the order of a packed row."""
    plain = dict(backbone.named_parameters())
    names = [f"{path}.A" for path in layout.factors] + [f"{path}.B" for path in layout.factors]
    return [plain[name] for name in [*names, *layout.head]]


@torch.no_grad()
def write_row(parameters: Sequence[nn.Parameter], row: Tensor) -> None:
    """Set parameters from a packed row (P,)."""
    for parameter, part in zip(parameters, row.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))


def read_row(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The packed row (P,) of parameters."""
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def take_step(
    backbone: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    inputs: Tensor,
    labels: Tensor,
    clip_norm: float | None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """One step of the plain loop on normalised images (N, 3, S, S)."""
    optimizer.zero_grad()
    with autocast():
        logits = backbone(inputs)
    F.cross_entropy(logits.float(), labels).backward()
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm or torch.inf)
    optimizer.step()


def open_experiment(fabric: Any, config: Config) -> tuple[Experiment, ServerState, Callable[[], Tensor]]:
    """The package's experiment, its state, and a function that trains the clients of round 1 on this rank."""
    experiment, _ = build_experiment(fabric, config)
    experiment.open_inputs()
    state, stop = start_or_resume(experiment, None), StopRequest(fabric)

    def train() -> Tensor:
        partial, plan, _ = begin_round(experiment, state, Clock(experiment.fabric.device))
        return train_clients(experiment, state, plan, partial, stop)

    return experiment, state, train

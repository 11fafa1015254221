"""Proof that every adapted layer is one: its update reaches the logits, and clients side by side stay apart.

Letters: S side of the image, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafair.errors import ConfigError, first_line
from lorafair.model.adapter import AdapterLayout
from lorafair.model.lora import LoRALinear, is_named_by, kind_of
from lorafair.model.parameters import AdapterParameters

if TYPE_CHECKING:
    from lorafair.model.adapted_model import AdaptedModel


def prove_used(model: AdaptedModel, name: str) -> None:
    """Raise ConfigError for adapted layers that have no effect on the logits or fail, and for a wrong image size.

    For a model on meta, where it costs no arithmetic: it follows the graph of the computation, not its numbers.
    """
    fault = _fault_of_use(model)
    if not fault:
        return
    with _adapting(model, {}):
        try:
            model(_images(model, 1))
        except Exception as error:
            raise ConfigError(f"model.image_size={model.image_size} does not fit {name}: {_text(error)}") from error
    raise _refusal(model, _fault_of_use, fault, f"of {name} cannot be adapted")


@torch.no_grad()
def prove_apart(model: AdaptedModel, cohort: int, why: str = "") -> None:
    """Raise ConfigError for adapted layers in which `cohort` clients side by side would not be as one by one.

    `why` says what needs that, where it is not client.cohort.

    Of two clients with an image each the second gets NaN for factors. Any number that depends on them is NaN, so the
    first one's logits are finite if and only if all that enters them went through its own factors, as it does one by
    one. A forward pass of two images shows that, without random numbers, gradients or a tolerance. Where the second
    one's logits are no NaN, its factors have no effect.
    """
    if model.mean.is_meta or type(model.mean) is not Tensor:  # no numbers, as on meta or in PyTorch's fake tensors
        return
    fault = _fault_of_cohort(model)
    if not fault:
        return
    with _adapting(model, {}):
        model(_images(model, 2))  # what has failed may be something else, such as the memory: it fails here again
    why, or_else = (why, "") if why else (f"with client.cohort={cohort}", ", or client.cohort=1")
    raise _refusal(model, _fault_of_cohort, fault, f"cannot be adapted {why}", or_else)


def _fault_of_use(model: AdaptedModel) -> str:
    """Why an adapted layer cannot be used or has no effect; empty if none is like that."""
    factors = [factor for layer in _adapted(model).values() for factor in (layer.A, layer.B)]
    try:
        logits = model(_images(model, 1))
        if logits.ndim != 2 or len(logits) != 1:
            return f"the logits of an image have the shape {tuple(logits.shape)}"
        gradients = torch.autograd.grad(logits.sum(), factors, allow_unused=True)
    except Exception as error:  # of the backbone's own code, which may do anything with its layers
        return _text(error)
    return "no output depends on it" if None in gradients else ""


def _fault_of_cohort(model: AdaptedModel) -> str:
    """Why two clients side by side are not as one by one; empty if they are."""
    adapters = AdapterParameters(model.backbone, max_cohort=2)
    adapters.resize(2)
    rows = torch.zeros_like(adapters.flat)
    inputs = _images(model, 2)
    try:
        if model.prefix_blocks:  # what is trained begins there
            tokens = model.embed(inputs[:1])
            inputs = torch.cat([tokens, tokens])
        adapters.write(_poisoned(rows, adapters.layout))
        first, second = model(inputs)
        if first.isfinite().all():
            return "" if second.isnan().any() else "no output depends on it"
        adapters.write(rows)
        unaffected = not model(inputs)[0].isfinite().all()  # not finite without the other client either
    except Exception as error:  # of the backbone's own code, too
        return f"its rows cannot be dealt out to two clients: {_text(error)}"
    return "" if unaffected else "its rows do not belong to one image each, in the order of the images"


def _poisoned(rows: Tensor, layout: AdapterLayout) -> Tensor:
    """Packed adapters (2, P) whose second one has NaN for factors, and a head that adds infinity."""
    poisoned = rows.detach().clone()
    poisoned[1, : layout.adapter_length] = math.nan
    for name, values in layout.unpack(poisoned).head.items():
        if name.endswith("bias"):
            values[1] = math.inf
    return poisoned


def _refusal(
    model: AdaptedModel, fault_of: Callable[[AdaptedModel], str], fault: str, cannot: str, or_else: str = ""
) -> ConfigError:
    """The error that names the kinds of layers at fault, found by adapting one kind at a time, and what works."""
    kinds: dict[str, dict[str, nn.Linear]] = {}
    for path, layer in _linear(model).items():
        kinds.setdefault(kind_of(path), {})[path] = layer
    faults = {}
    for kind, layers in kinds.items():
        with _adapting(model, layers):
            faults[kind] = fault_of(model)
    adapted = dict.fromkeys(kind_of(path) for path in _adapted(model))
    guilty = {kind: faults[kind] for kind in adapted if faults[kind]} or dict.fromkeys(adapted, fault)
    working = [kind for kind in faults if not faults[kind] and kind not in guilty]
    chosen = [kind for kind in working if kind in adapted] or working
    advice = f"take model.lora.targets={_targets(chosen, faults)}" if chosen else "take another model.name"
    reasons = "; ".join(dict.fromkeys(guilty.values()))
    return ConfigError(f"model.lora.targets: {', '.join(guilty)} {cannot} ({reasons}); {advice}{or_else}")


def _targets(kinds: Sequence[str], faults: Mapping[str, str]) -> str:
    """Targets for these kinds of layers, without those at fault that the same ends of a path would name."""
    ends = list(dict.fromkeys(kind.rpartition("*.")[2] for kind in kinds))
    avoided = [kind for kind, fault in faults.items() if fault and any(is_named_by(kind, end) for end in ends)]
    return f"[{','.join([*ends, *(f'-{kind}' for kind in avoided)])}]"


@contextmanager
def _adapting(model: AdaptedModel, layers: Mapping[str, nn.Linear]) -> Iterator[None]:
    """In the block these layers of the backbone are adapted, with LoRA rank 1, instead of those that are."""
    backbone, adapted = model.backbone, _adapted(model)
    for path, module in adapted.items():
        backbone.set_submodule(path, module.base)
    for path, linear in layers.items():
        backbone.set_submodule(path, LoRALinear(linear, 1, 1.0))
    try:
        yield
    finally:
        for path, linear in layers.items():
            backbone.set_submodule(path, linear)
        for path, module in adapted.items():
            backbone.set_submodule(path, module)


def _adapted(model: AdaptedModel) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.backbone.named_modules() if isinstance(module, LoRALinear)}


def _linear(model: AdaptedModel) -> dict[str, nn.Linear]:
    """All Linear layers of the backbone by their paths there, whether adapted or not."""
    with _adapting(model, {}):
        return {path: module for path, module in model.backbone.named_modules() if isinstance(module, nn.Linear)}


def _images(model: AdaptedModel, count: int) -> Tensor:
    """Made-up ones, uint8 (count, 3, S, S)."""
    shape = (count, 3, model.image_size, model.image_size)
    return torch.full(shape, 127, dtype=torch.uint8, device=model.mean.device)


def _text(error: Exception) -> str:
    """An error in a line; its kind where it is no check of the backbone's own."""
    kind = "" if isinstance(error, AssertionError | RuntimeError) and str(error) else f"{type(error).__name__}: "
    return kind + first_line(error)

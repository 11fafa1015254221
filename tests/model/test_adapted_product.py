"""The adapted product against the same layer written plainly, and its gradient against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafair.model.adapted_product import adapted_product
from lorafair.model.lora import LoRALinear
from tests.torch_private import TorchDispatchMode

C, N, R, IN, OUT = 3, 5, 2, 7, 4
SCALING = 1.7


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (C, N, IN), "weight": (OUT, IN), "bias": (OUT,), "A": (C, R, IN), "B": (C, OUT, R)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def plainly(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    of_clients = [F.linear(x[c], weight + SCALING * B[c] @ A[c], bias) for c in range(C)]
    return torch.stack(of_clients)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_and_its_gradient(with_bias: bool) -> None:
    given: dict[str, Any] = tensors(torch.float64)
    if not with_bias:
        given["bias"] = None
    for name in ("x", "A", "B"):
        given[name].requires_grad_()
    expected = plainly(**given)
    torch.testing.assert_close(adapted_product(**given, scaling=SCALING), expected)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_product(x, given["weight"], given["bias"], A, B, SCALING)

    assert torch.autograd.gradcheck(product, (given["x"], given["A"], given["B"]))


def test_the_product_with_what_dropout_has_left() -> None:
    given = tensors(torch.float64)
    kept = given["x"] * torch.arange(IN).remainder(3).clamp(max=1)
    for tensor in (given["x"], kept, given["A"], given["B"]):
        tensor.requires_grad_()
    frozen = F.linear(given["x"], given["weight"], given["bias"])
    adapters = plainly(kept, torch.zeros_like(given["weight"]), None, given["A"], given["B"])
    torch.testing.assert_close(adapted_product(**given, scaling=SCALING, kept=kept), frozen + adapters)

    def product(x: Tensor, kept: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_product(x, given["weight"], given["bias"], A, B, SCALING, kept)

    assert torch.autograd.gradcheck(product, (given["x"], kept, given["A"], given["B"]))


@pytest.mark.parametrize("trained", [("A",), ("B",), ("x",), ("A", "B")])
def test_only_what_is_trained_has_a_gradient(trained: tuple[str, ...]) -> None:
    given = tensors(torch.float64)
    wanted = [given[name].requires_grad_() for name in trained]
    weights = torch.arange(C * N * OUT, dtype=torch.float64).view(C, N, OUT)
    found = torch.autograd.grad((adapted_product(**given, scaling=SCALING) * weights).sum(), wanted)
    expected = torch.autograd.grad((plainly(**given) * weights).sum(), wanted)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_gives_the_same_either_way(autocast: bool) -> None:
    given = tensors(torch.float32)
    layer = LoRALinear(nn.Linear(IN, OUT), R, alpha=SCALING * R)
    layer.A, layer.B = nn.Parameter(given["A"]), nn.Parameter(given["B"])
    x = given["x"].flatten(0, 1).requires_grad_()
    weights = torch.arange(C * N * OUT).view(C * N, OUT) / 10

    def gradients(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), [x, layer.A, layer.B])]

    with torch.autocast("cpu", enabled=autocast):
        expected = layer(x)
        product = adapted_product(
            x.view(C, N, IN), layer.base.weight, layer.base.bias, layer.A, layer.B, layer.scaling
        ).flatten(0, 1)
    assert product.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = 2e-2 if autocast else 1e-5
    for mine, theirs in zip(gradients(product), gradients(expected), strict=True):
        assert (mine - theirs).float().norm() <= tolerance * theirs.float().norm()
        assert mine.dtype == theirs.dtype


def test_what_enters_a_layer_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: an input that is a view of another layout is copied by one pass, and not by two."""
    layer, copies = LoRALinear(nn.Linear(IN, OUT), R, alpha=1.0), list[torch.Size]()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.clone.default:
                copies.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    x = torch.randn(6, IN, N, generator=torch.Generator().manual_seed(0)).mT  # (images, rows, I)
    expected = layer(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    with Copies():
        found = layer(x)
    torch.testing.assert_close(found, expected)
    assert copies.count(x.shape) == 1

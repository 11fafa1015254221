"""The adapted product against the same layer written plainly, and its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafair.model import adapted_product as adapted_product_module
from lorafair.model.adapted_product import adapted_product
from lorafair.model.lora import DropoutStreams, LoRALinear
from tests.torch_private import TorchDispatchMode

C, N, R, IN, OUT = 3, 5, 2, 7, 4
SCALING = 1.7
# Clients and input features: with one client and at least twice as many inputs as outputs, the gradient is one product.
WIDTHS = {"three clients": (3, 7), "one client": (1, 7), "one client, wide": (1, 8), "one client, wider": (1, 11)}


def tensors(dtype: torch.dtype, clients: int = C, inputs: int = IN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (clients, N, inputs), "weight": (OUT, inputs), "bias": (OUT,), "A": (clients, R, inputs),
        "B": (clients, OUT, R),
    }  # fmt: skip
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def plainly(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    of_clients = [F.linear(x[c], weight + SCALING * B[c] @ A[c], bias) for c in range(len(A))]
    return torch.stack(of_clients)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("clients", "inputs"), WIDTHS.values(), ids=WIDTHS)
def test_the_product_and_its_gradient(clients: int, inputs: int, with_bias: bool) -> None:
    given: dict[str, Any] = tensors(torch.float64, clients, inputs)
    if not with_bias:
        given["bias"] = None
    for name in ("x", "A", "B"):
        given[name].requires_grad_()
    expected = plainly(**given)
    torch.testing.assert_close(adapted_product(**given, scaling=SCALING), expected)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_product(x, given["weight"], given["bias"], A, B, SCALING)

    assert torch.autograd.gradcheck(product, (given["x"], given["A"], given["B"]))


def test_the_product_with_a_mask_of_dropout() -> None:
    given = tensors(torch.float64)
    mask = torch.arange(IN, dtype=torch.float64).remainder(3).clamp(max=1).expand_as(given["x"])
    for tensor in (given["x"], given["A"], given["B"]):
        tensor.requires_grad_()
    frozen = F.linear(given["x"], given["weight"], given["bias"])
    adapters = plainly(given["x"] * mask, torch.zeros_like(given["weight"]), None, given["A"], given["B"])
    torch.testing.assert_close(adapted_product(**given, scaling=SCALING, mask=mask), frozen + adapters)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_product(x, given["weight"], given["bias"], A, B, SCALING, mask)

    assert torch.autograd.gradcheck(product, (given["x"], given["A"], given["B"]))


@pytest.mark.parametrize("trained", [("A",), ("B",), ("x",), ("A", "B")])
@pytest.mark.parametrize("clients", [C, 1])
def test_only_what_is_trained_has_a_gradient(clients: int, trained: tuple[str, ...]) -> None:
    given = tensors(torch.float64, clients, inputs=2 * OUT)
    wanted = [given[name].requires_grad_() for name in trained]
    weights = torch.arange(clients * N * OUT, dtype=torch.float64).view(clients, N, OUT)
    found = torch.autograd.grad((adapted_product(**given, scaling=SCALING) * weights).sum(), wanted)
    expected = torch.autograd.grad((plainly(**given) * weights).sum(), wanted)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_one_product_of_a_wide_input_is_the_sum_of_two(dtype: torch.dtype, tolerance: float) -> None:
    """The gradient of one client, and of the same client beside another one, which is never one product."""
    given = tensors(dtype, clients=1, inputs=3 * OUT)
    gradient = torch.randn(1, N, OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight, A, B = (given[name] for name in ("weight", "A", "B"))
    alone = adapted_product_module._of_input(gradient, weight, A, B)
    beside = adapted_product_module._of_input(
        gradient.expand(2, -1, -1), weight, A.expand(2, -1, -1), torch.cat([B, B])
    )
    for mine, theirs in zip(alone, beside, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs[:1]).double().norm() <= tolerance * theirs[:1].double().norm()


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("clients", "inputs"), [(3, 7), (1, 7), (1, 8)])
def test_the_product_compiles_as_a_whole_with_the_same_gradients(clients: int, inputs: int, dropped: bool) -> None:
    torch.compiler.reset()
    given = tensors(torch.float64, clients, inputs)
    trained = [given[name].requires_grad_() for name in ("x", "A", "B")]
    mask = torch.arange(inputs, dtype=torch.float64).remainder(3).clamp(max=1).expand_as(given["x"])

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_product(x, given["weight"], given["bias"], A, B, SCALING, mask if dropped else None)

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    weights = torch.arange(clients * N * OUT, dtype=torch.float64).view(clients, N, OUT)
    found, expected = compiled(*trained), product(*trained)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((out * weights).sum(), trained) for out in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("change", [lambda y: y.relu_(), lambda y: y.add_(1.0)])
def test_the_next_layer_may_change_the_product_in_place(change: Callable[[Tensor], Tensor]) -> None:
    """As nn.ReLU(inplace=True) does, or a backbone that adds positions."""
    given = tensors(torch.float64)
    trained = [given[name].requires_grad_() for name in ("x", "A", "B")]
    found = change(adapted_product(**given, scaling=SCALING)).square().sum()
    expected = change(plainly(**given).clone()).square().sum()
    gradients = [torch.autograd.grad(loss, trained) for loss in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_images_of_any_shape_enter_client_by_client() -> None:
    given = tensors(torch.float64)
    x = given["x"].view(C, N, IN).repeat(1, 4, 1).view(C * 2, 2, N, IN)  # (C*2 images, 2 rows, N columns, I)
    mask = (x > 0).to(x.dtype)
    shape = {**given, "x": x.view(C, 4 * N, IN)}
    expected = adapted_product(**shape, scaling=SCALING, mask=mask.view(C, 4 * N, IN))
    found = adapted_product(**{**given, "x": x}, scaling=SCALING, mask=mask)
    assert found.shape == (C * 2, 2, N, OUT)
    assert torch.equal(found.flatten(), expected.flatten())


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


def test_dropout_of_a_layer_is_the_same_either_way() -> None:
    """On a CPU it is inverted dropout of the input, and on a GPU a mask and a larger scaling."""
    given, p = tensors(torch.float64), 0.25
    layer = LoRALinear(nn.Linear(IN, OUT).double(), R, alpha=SCALING * R, dropout=p)
    layer.A, layer.B = nn.Parameter(given["A"]), nn.Parameter(given["B"])
    x = given["x"].flatten(0, 1).requires_grad_()

    def streams() -> DropoutStreams:
        return DropoutStreams([torch.Generator().manual_seed(c) for c in range(C)], [N, N - 1, N])

    layer.dropout_streams = streams()
    expected = layer(x)
    mask = streams().mask(x, p)
    assert mask is not None
    assert 0 < mask.mean() < 1
    rows = x.view(C, N, IN)
    scaling = layer.scaling / (1 - p)
    product = adapted_product(
        rows, layer.base.weight, layer.base.bias, layer.A, layer.B, scaling, mask.view_as(rows)
    ).flatten(0, 1)
    torch.testing.assert_close(product, expected)
    of_sum = [torch.autograd.grad(out.square().sum(), [x, layer.A, layer.B]) for out in (product, expected)]
    for mine, theirs in zip(*of_sum, strict=True):
        torch.testing.assert_close(mine, theirs)


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

"""The product of an adapted layer and its gradient, with few passes over activations; a weight that stands for it.

Written as `linear(x) + s·B(Ax)`, a layer makes two tensors of the size of its output and adds them, and its gradient
makes two of the size of its input: each is a pass over memory, which on a GPU takes as long as the adapters' own
arithmetic. Here the adapter's part is added by the product that computes it, or the two products are one over the
features of both. For compilers, which fuse additions with what comes next, they are written as additions.

Letters: C clients in the cohort, n rows of one client, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from lorafair.model.lora import LoRALinear


def adapted_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """x·W0ᵀ + bias + s·(x·Aᵀ)·Bᵀ of each client: (C*N, ..., I) -> (C*N, ..., O), in autocast's type where that is on.

    W0 (O, I) and the bias (O,) are frozen and get no gradient. A (C, R, I), B (C, O, R). With a dropout mask of zeros
    and ones, like x, the adapter's part is s·((x∘mask)·Aᵀ)·Bᵀ: the mask is not divided by the share that is kept, for
    that is a pass over memory in each direction, and s is one number.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, A, B = (tensor.to(dtype) for tensor in (x, weight, A, B))
        bias, mask = (None if tensor is None else tensor.to(dtype) for tensor in (bias, mask))
    rows = x.reshape(len(A), -1, x.shape[-1])  # (C, n, I)
    mask = None if mask is None else mask.reshape(rows.shape)
    with torch.autocast(kind, enabled=False):
        product: Tensor = _AdaptedProduct.apply(rows, mask, weight, bias, A, B, scaling)  # type: ignore[no-untyped-call]
    return product.view(*x.shape[:-1], len(weight))


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        # No view of what is made here is returned: autograd would not let the next layer change it in place.
        out = F.linear(x.flatten(0, 1), weight, bias)  # (C*n, O)
        entering = x if mask is None else x * mask
        hidden = torch.bmm(entering, A.mT)  # (C, n, R)
        ctx.save_for_backward(entering, weight, A, B, hidden, mask)
        ctx.scaling = scaling
        if torch.compiler.is_compiling():
            return out + torch.bmm(hidden, B.mT * scaling).flatten(0, 1)
        out.view(*hidden.shape[:2], -1).baddbmm_(hidden, B.mT, alpha=scaling)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        entering, weight, A, B, hidden, mask = ctx.saved_tensors
        gradient = gradients[0].reshape(*hidden.shape[:2], -1)  # (C, n, O)
        of_x, _, _, _, of_A, of_B, _ = ctx.needs_input_grad
        through: Tensor | None = None
        if of_x and mask is None:
            through, of_hidden = _of_input(gradient, weight, A, B * ctx.scaling)
        else:
            of_hidden = torch.bmm(gradient, B * ctx.scaling)  # (C, n, R)
            if of_x:
                through = torch.matmul(gradient, weight).addcmul_(torch.bmm(of_hidden, A), mask)
        return (
            through,
            None,
            None,
            None,
            torch.bmm(of_hidden.mT, entering) if of_A else None,
            torch.bmm(gradient.mT, hidden).mul_(ctx.scaling) if of_B else None,
            None,
        )


def _of_input(gradient: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (C, n, I), which is dy·W0 + dh·A, and of h = x·Aᵀ (C, n, R), which is dh = dy·B.

    Of one client, the first is [dy dh]·[W0; A]. Where x is wide and y is narrow, as in the second layer of an MLP, to
    copy dy beside dh takes less time than to add to a sum as large as x.
    """
    clients, outputs, inputs = len(A), weight.shape[0], weight.shape[1]
    if clients > 1 or inputs < 2 * outputs:
        of_hidden = torch.bmm(gradient, B)
        through = torch.matmul(gradient, weight)
        if torch.compiler.is_compiling():
            return through + torch.bmm(of_hidden, A), of_hidden
        return through.baddbmm_(of_hidden, A), of_hidden
    if torch.compiler.is_compiling():
        of_hidden = torch.bmm(gradient, B)
        both = torch.cat([gradient, of_hidden], -1)
    else:
        both = gradient.new_empty(*gradient.shape[:2], outputs + A.shape[1])
        both[..., :outputs] = gradient
        of_hidden = torch.bmm(gradient, B, out=both[..., outputs:])
    return torch.matmul(both, torch.cat([weight, A[0]])), of_hidden


class AdaptedWeight:
    """The weight W0 + s·B·A of an adapted layer, as far as modules use one: in F.linear(x, weight, bias).

    The attention of BEiT, EVA-02 and Swin V2 computes `F.linear(x, weight=self.qkv.weight, bias=...)`. PyTorch hands
    that call to this class, which computes it with the update of each client. Any other use is an error.
    """

    def __init__(self, layer: LoRALinear) -> None:
        self.layer = layer
        self.device, self.dtype = layer.base.weight.device, layer.base.weight.dtype

    @classmethod
    def __torch_function__(
        cls, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.linear:
            name = getattr(function, "__name__", function)
            raise TypeError(f"{name} reads the weight of an adapted layer, and only F.linear can be given one")
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        return given["weight"].layer(given["input"], given.get("bias"))

"""Inner products and norms of the clients' updates as changes of weights, without a matrix of a layer's size.

The update of client k in a layer is ΔP_k = s·(B_k A_k − B_0 A_0), from what it was sent to what it sends; with
β = B_k − B_0 and α = A_k − A_0 it is s·(β A_k + B_0 α), so that ⟨ΔP_k, ΔP_j⟩ follows from products of size R x R.
Computing with the differences keeps the precision of updates that are small beside the factors.

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lorafair.model.adapter import AdapterState, LoRAFactors

_MOST_NUMBERS = 2**18  # of a block of inner products of all directions with one another: what a cache holds


def layer_products(clients: LoRAFactors, start: LoRAFactors) -> Tensor:
    """⟨ΔP_k, ΔP_j⟩ / s² of one layer (K, K), float64.

    From factors (K, R, I) and (K, O, R) of the clients, and what they were sent, (R, I) and (O, R).
    With X = βA_0 + B_0α and Y = βα it is ⟨X, X⟩ + ⟨X, Y⟩ + ⟨Y, X⟩ + ⟨Y, Y⟩. What has one index of a client on each side
    is a product of two matrices with K rows; only ⟨Y_k, Y_j⟩ = ⟨β_kᵀβ_j, α_kα_jᵀ⟩ needs R x R numbers of every pair.
    """
    alpha, beta = clients.A - start.A, clients.B - start.B
    a, b = start.A, start.B
    u, v = a @ alpha.mT, b.mT @ beta  # (K, R, R): A_0 α_kᵀ and B_0ᵀ β_k
    of_alpha, of_beta = alpha.flatten(1), beta.flatten(1)

    def paired(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.flatten(1).mT).double()

    linear = paired(of_beta, beta @ (a @ a.mT)) + paired(of_alpha, (b.mT @ b) @ alpha)
    one_sided = paired(of_alpha, v @ a)  # ⟨B_0 α_k, β_j A_0⟩
    one_sided += paired(of_beta, beta @ u.mT) + paired(of_alpha, v @ alpha)  # ⟨X_k, Y_j⟩
    return linear + one_sided + one_sided.mT + _second_order(alpha, beta)


def _second_order(alpha: Tensor, beta: Tensor) -> Tensor:
    """⟨β_k α_k, β_j α_j⟩ (K, K), some clients at a time."""
    count, rank = alpha.shape[:2]
    all_alpha, all_beta = alpha.flatten(0, 1), beta.mT.flatten(0, 1)  # (K·R, I), (K·R, O)
    products = alpha.new_zeros(count, count, dtype=torch.float64)
    step = max(1, _MOST_NUMBERS // max(1, count * rank * rank))
    for first in range(0, count, step):
        here = slice(first * rank, min(count, first + step) * rank)
        rest = slice(first * rank, None)  # the other half follows from symmetry
        of_pairs = (all_alpha[here] @ all_alpha[rest].mT) * (all_beta[here] @ all_beta[rest].mT)
        block = of_pairs.view(-1, rank, count - first, rank).sum((1, 3))
        products[first : first + len(block), first:] = block
    return products.triu() + products.triu(1).mT


def head_products(clients: Tensor, start: Tensor) -> Tensor:
    """⟨Δh_k, Δh_j⟩ (K, K), float64, of one tensor of the head, (K, ...) after training and (...) before."""
    change = (clients - start).flatten(1)
    return (change @ change.mT).double()


def products_by_layer(clients: AdapterState, start: AdapterState, scaling: float) -> Iterator[tuple[str, Tensor]]:
    """(name, inner products (K, K) of the clients' changes of weights) of every layer and every tensor of the head."""
    clients, start = clients.with_cores_in_b(), start.with_cores_in_b()
    for path, factors in clients.factors.items():
        yield path, scaling**2 * layer_products(factors, start.factors[path])
    for name, tensor in clients.head.items():
        yield name, head_products(tensor, start.head[name])


def distances(products: Tensor) -> Tensor:
    """‖ΔP_k − ΔP_j‖ (K, K) from all inner products; zero on the diagonal."""
    squares = products.diagonal()
    between = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * products).clamp_min(0.0).sqrt()
    return between.fill_diagonal_(0.0)


def shortened_norm(clients: AdapterState, start: AdapterState, scaling: float) -> Iterator[tuple[str, Tensor]]:
    """(name, (K, 3)): ‖X‖², ⟨X, Y⟩ and ‖Y‖² of every layer and tensor of the head, float64.

    A client whose factors moved only the fraction t of their way has the update t·X + t²·Y, with X = s·(βA_0 + B_0α)
    and Y = s·βα; of the head, X is the change and Y = 0.
    """
    clients, start = clients.with_cores_in_b(), start.with_cores_in_b()
    for path, factors in clients.factors.items():
        sent = start.factors[path]
        alpha, beta = (factors.A - sent.A).double(), (factors.B - sent.B).double()
        a, b = sent.A.double(), sent.B.double()
        gram_beta, gram_alpha = beta.mT @ beta, alpha @ alpha.mT  # (K, R, R)
        beta_b, alpha_a = beta.mT @ b, alpha @ a.mT
        linear = (gram_beta * (a @ a.mT)).sum((1, 2)) + (gram_alpha * (b.mT @ b)).sum((1, 2))
        linear += 2 * (beta_b * alpha_a.mT).sum((1, 2))
        mixed = (gram_beta * alpha_a.mT).sum((1, 2)) + (beta_b * gram_alpha).sum((1, 2))
        yield path, scaling**2 * torch.stack([linear, mixed, (gram_beta * gram_alpha).sum((1, 2))], dim=1)
    for name, tensor in clients.head.items():
        change = (tensor - start.head[name]).flatten(1).double()
        square = change.square().sum(1)
        yield name, torch.stack([square, torch.zeros_like(square), torch.zeros_like(square)], dim=1)

"""Means of clients' factors, and inner products and norms of low-rank products B·A.

Results are float64, because Gram matrices square the condition number. A sum over clients is one product of rank
N = K·R, and no (O, I) matrix is formed; for so many clients that it would be small beside their factors, the sum is
that matrix, as a product with the identity. Clients are cast to float64 a block of fixed size at a time.

Letters: K clients, R LoRA rank of a client's factors, I in_features, O out_features, N rank of a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafair.model.adapter import LoRAFactors

_BLOCK = 256  # rows of an (N, N) or (O, I) matrix held at a time
_CLIENT_NUMBERS = 2**23  # numbers of clients' factors that are cast to float64 at a time: 64 MB
_ROUNDING = 1e-14  # a square below this fraction of its terms is rounding noise


@dataclass(frozen=True)
class IdealUpdate:
    """ΔW = Σ p_k B_k A_k of one layer as B̄Ā + ΔR, where ΔR = Σ p_k (B_k − B̄)(A_k − Ā) is the aggregation bias.

    The covariance form of ΔR does not cancel: equal clients, or clients that share A or B, give zero up to rounding.
    """

    mean: LoRAFactors  # A (R, I), B (O, R)
    bias: LoRAFactors  # A (N, I), B (O, N)
    precision: torch.dtype  # of the clients' factors

    def bias_square(self) -> Tensor:
        """‖ΔR‖², a scalar tensor: all that is quadratic in the clients, so on a CPU in their own precision.

        It only sets the weight of a correction and the reported error; from float32 factors it is good to 1e-7. A GPU
        may round float32 products to ten bits and is fast in float64.
        """
        if self.bias.A.device.type != "cpu":
            return squared_norm(self.bias)
        return squared_norm(self.bias.to(torch.promote_types(self.precision, torch.float32)))


def clients_at_a_time(numbers: int) -> int:
    """How many clients of so many numbers make up a block; at least one."""
    return max(1, _CLIENT_NUMBERS // max(1, numbers))


def blocks_of(clients: LoRAFactors, weights: Tensor) -> Iterator[tuple[LoRAFactors, Tensor]]:
    """The factors of some clients at a time, in their own precision, and their weights in float64 on their device."""
    size = clients_at_a_time(clients.rank * (clients.A.shape[2] + clients.B.shape[1]))
    exact = weights.to(clients.A.device, torch.float64)
    for A, B, own in zip(clients.A.split(size), clients.B.split(size), exact.split(size), strict=True):
        yield LoRAFactors(A=A, B=B), own


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of equal-sized tensors, in their order, at least one; the first is overwritten."""
    remaining = iter(terms)
    result = next(remaining)
    for term in remaining:
        result += term
    return result


def weighted_mean(stack: Tensor, weights: Tensor) -> Tensor:
    """Σ p_k T_k over the leading axis of `stack` (K, ...), in float64 on the device of `stack`."""
    size, exact = clients_at_a_time(stack.shape[1:].numel()), weights.to(stack.device, torch.float64)
    blocks = zip(exact.split(size), stack.split(size), strict=True)
    return total(own @ block.to(torch.float64).reshape(len(block), -1) for own, block in blocks).view(stack.shape[1:])


def mean_factors(clients: LoRAFactors, weights: Tensor) -> LoRAFactors:
    """Ā = Σ p_k A_k and B̄ = Σ p_k B_k, in float64."""
    return LoRAFactors(A=weighted_mean(clients.A, weights), B=weighted_mean(clients.B, weights))


def weighted_sum(clients: LoRAFactors, weights: Tensor) -> LoRAFactors:
    """Σ p_k B_k A_k in float64, as one product of rank N = K·R with the weights in A; as a matrix for many clients."""
    return _summed(clients, weights) if _is_dense(clients) else _stacked(clients, weights)


def packed_sum(clients: LoRAFactors, weights: Tensor) -> LoRAFactors:
    """`weighted_sum` as it is sent: without the zeros that pad smaller LoRA ranks, of rank Σ r_k. Waits for a GPU."""
    have = directions_of(clients)
    return weighted_sum(clients, weights) if bool(have.all()) else _packed(clients, weights, have)


def shared_a(clients: LoRAFactors, weights: Tensor) -> Tensor:
    """The A (R, I) whose first rows each client holds, in float64, where none has trained it; zero beyond all of them.

    Not the mean where LoRA ranks differ: it would count the zeros that pad the smaller ones.
    """
    mean, have = weighted_mean(clients.A, weights), directions_of(clients)
    held = (have * weights.to(mean.device, torch.float64).unsqueeze(1)).sum(0)  # (R,)
    whole = have.all(0) | (held == 0)
    return mean / torch.where(whole, 1.0, held).unsqueeze(1)


def split_ideal_update(clients: LoRAFactors, weights: Tensor) -> IdealUpdate:
    """The mean of the factors and what it leaves of ΔW. Clients: A (K, R, I), B (K, O, R)."""
    mean = mean_factors(clients, weights)
    bias = _summed(clients, weights, mean) if _is_dense(clients) else _stacked(clients, weights, mean)
    return IdealUpdate(mean=mean, bias=bias, precision=clients.A.dtype)


def _is_dense(clients: LoRAFactors, rank: int | None = None) -> bool:
    """Whether a sum over these clients, of this rank (K·R), is kept as a matrix: its factors are larger than a block,
    and than the matrix."""
    (count, lora_rank, inputs), outputs = clients.A.shape, clients.B.shape[1]
    rank = count * lora_rank if rank is None else rank
    return rank > max(outputs, inputs) and rank * (outputs + inputs) > _CLIENT_NUMBERS


def _stacked(clients: LoRAFactors, weights: Tensor, origin: LoRAFactors | None = None) -> LoRAFactors:
    """Σ p_k (B_k − B)(A_k − A) as a product of rank K·R, where `origin` is (A, B), or zero."""
    A, B = clients.A.to(torch.float64, copy=True), clients.B.to(torch.float64, copy=True)
    # In place: for many clients, fresh memory costs more than the arithmetic.
    if origin is not None:
        A.sub_(origin.A)
        B.sub_(origin.B)
    A.mul_(weights.to(A.device, torch.float64).view(-1, 1, 1))
    return LoRAFactors(A=A.flatten(0, 1), B=B.permute(1, 0, 2).flatten(1))  # (N, I), (O, N)


def _packed(clients: LoRAFactors, weights: Tensor, kept: Tensor, origin: LoRAFactors | None = None) -> LoRAFactors:
    """The same without the directions (K, R) that are not `kept`, whose terms are zero."""
    if _is_dense(clients, int(kept.sum())):
        return _summed(clients, weights, origin)
    stacks = [_stacked(block, own, origin) for block, own in blocks_of(clients, weights)]
    masks = kept.flatten().split([stack.rank for stack in stacks])
    parts = [LoRAFactors(A=s.A[mask], B=s.B[:, mask]) for s, mask in zip(stacks, masks, strict=True)]
    return add(*parts)


def _summed(clients: LoRAFactors, weights: Tensor, origin: LoRAFactors | None = None) -> LoRAFactors:
    """The same as a product of rank min(O, I), one of whose factors is the identity, a block of clients at a time."""
    stacks = (_stacked(block, own, origin) for block, own in blocks_of(clients, weights))
    outputs, inputs = clients.B.shape[1], clients.A.shape[2]
    dense = torch.zeros(outputs, inputs, dtype=torch.float64, device=clients.A.device)
    for stack in stacks:
        dense.addmm_(stack.B, stack.A)
    if outputs <= inputs:
        return LoRAFactors(A=dense, B=torch.eye(outputs, dtype=dense.dtype, device=dense.device))
    return LoRAFactors(A=torch.eye(inputs, dtype=dense.dtype, device=dense.device), B=dense)


def add(*products: LoRAFactors) -> LoRAFactors:
    """The sum of products of equal (O, I), as one product; the ranks add up."""
    return LoRAFactors(A=torch.cat([p.A for p in products], dim=-2), B=torch.cat([p.B for p in products], dim=-1))


def transpose(product: LoRAFactors) -> LoRAFactors:
    """(B·A)ᵀ as a product: the two factors change places. Views, no copy."""
    return LoRAFactors(A=product.B.mT, B=product.A.mT)


def inner(left: LoRAFactors, right: LoRAFactors) -> Tensor:
    """⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), a scalar tensor; for one small rank at least."""
    return ((left.B.mT @ right.B).to(torch.float64) * (left.A @ right.A.mT)).sum()


def squared_norm(product: LoRAFactors) -> Tensor:
    """‖B·A‖² (Frobenius), a scalar tensor: N²(O + I) or 2NOI operations, a block of the intermediate at a time."""
    (outputs, rank), inputs = product.B.shape, product.A.shape[1]
    if rank * (outputs + inputs) > 2 * outputs * inputs:
        return squared_row_norms(product).sum()
    total = product.A.new_zeros((), dtype=torch.float64)
    for start in range(0, rank, _BLOCK):
        stop = start + _BLOCK
        # The Gram matrices are symmetric: the part right of the diagonal block counts twice.
        block = _part(product, start, min(stop, rank))
        total = total + inner(block, block)
        if stop < rank:
            total = total + 2 * inner(block, _part(product, stop, rank))
    return total.clamp_min(0.0)  # of terms that cancel, rounding may leave less than nothing


def _part(product: LoRAFactors, start: int, stop: int) -> LoRAFactors:
    return LoRAFactors(A=product.A.narrow(0, start, stop - start), B=product.B.narrow(1, start, stop - start))


def squared_row_norms(product: LoRAFactors) -> Tensor:
    """‖(B·A)[o]‖² of every row, (O,)."""
    (outputs, rank), inputs = product.B.shape, product.A.shape[1]
    if rank * (outputs + inputs) < outputs * inputs:
        return ((product.B @ (product.A @ product.A.mT)) * product.B).sum(-1).clamp(min=0)
    # So many clients that rows of the product cost less than the Gram matrix of the factors.
    return torch.cat([(rows @ product.A).to(torch.float64).square().sum(-1) for rows in torch.split(product.B, _BLOCK)])


def square_of_sum(first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
    """‖u + v‖² from ‖u‖², ⟨u, v⟩ and ‖v‖²; exactly 0 where nothing but rounding is left."""
    total = first + 2 * cross + second
    return torch.where(total > _ROUNDING * (first + second), total, 0.0)


def svd(product: LoRAFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B·A: U (O, M), descending singular values (M,), Vᵀ (M, I), where M is at most N, O and I.

    From the QR decompositions of the factors, N²(O + I) operations; dense where the rank is not below O or I.
    """
    (outputs, rank), inputs = product.B.shape, product.A.shape[1]
    if rank >= min(outputs, inputs):
        U, values, Vt = torch.linalg.svd(product.B @ product.A, full_matrices=False)
        return U, values, Vt
    left, left_core = torch.linalg.qr(product.B)  # (O, N), (N, N)
    right, right_core = torch.linalg.qr(product.A.mT)  # (I, N), (N, N)
    U, values, Vt = torch.linalg.svd(left_core @ right_core.mT)
    return left @ U, values, Vt @ right.mT


def truncated_svd(product: LoRAFactors, rank: int) -> LoRAFactors:
    """The best approximation of B·A of rank R: B = UΣ (O, R), A = Vᵀ (R, I), padded with zeros beyond its own rank."""
    U, values, Vt = svd(product)
    return first_triples(U, values, Vt, min(rank, len(values)), rank)


def first_triples(
    U: Tensor, values: Tensor, Vt: Tensor, kept: int, rank: int, spare: Tensor | None = None
) -> LoRAFactors:
    """The first singular triples as factors of rank R: B = UΣ (O, R) and A = Vᵀ (R, I), zero beyond those kept.

    With `spare` (R, I) the other rows of A are those of `spare`: from zeros in both factors nothing could be trained.
    """
    A = Vt.new_zeros(rank, Vt.shape[1]) if spare is None else spare.to(Vt, copy=True)
    B = U.new_zeros(U.shape[0], rank)
    A[:kept], B[:, :kept] = Vt[:kept], U[:, :kept] * values[:kept]
    return LoRAFactors(A=A, B=B)


def aggregation_bias(clients: LoRAFactors, weights: Tensor) -> LoRAFactors:
    """The aggregation bias ΔR = ΔW − B̄Ā as a product of rank (K − 1)·R at most, in float64. Waits for a GPU.

    ΔR = Σ p_k (B_k − B̄)(A_k − Ā), and since Σ p_k (B_k − B̄) = 0, Ā may be replaced by the last client's A: row by row,
    where LoRA ranks differ, and by zero where not all clients have the row, which leaves rank Σ r_k − min r_k.
    """
    origin = LoRAFactors(A=clients.A[-1].to(torch.float64), B=weighted_mean(clients.B, weights))
    have = directions_of(clients)
    if not bool(have.all()):
        of_all = have.all(0)  # (R,)
        kept = torch.cat([have[:-1], (have[-1] & ~of_all).unsqueeze(0)])
        by_row = LoRAFactors(A=torch.where(of_all.unsqueeze(1), origin.A, 0.0), B=origin.B)
        return _packed(clients, weights, kept, by_row)
    if _is_dense(clients):
        return _summed(clients, weights, origin)
    return _stacked(LoRAFactors(A=clients.A[:-1], B=clients.B[:-1]), weights[:-1], origin)


def nonzero_rows(clients: LoRAFactors) -> Tensor:
    """Which rows of A (K, R, I) are not all zero, (K, R)."""
    return torch.cat([(A != 0).any(-1) for A in clients.A.split(clients_at_a_time(clients.A.shape[1:].numel()))])


def lora_ranks_of(clients: LoRAFactors) -> Tensor:
    """The LoRA rank (K,) of each client's factors: rows of A that are zero at its end are padding. A (K, R, I)."""
    used = nonzero_rows(clients)
    positions = torch.arange(1, used.shape[1] + 1, device=used.device)
    return (used * positions).amax(1)


def directions_of(clients: LoRAFactors) -> Tensor:
    """Which directions each client has: those below its LoRA rank, (K, R). A (K, R, I)."""
    return torch.arange(clients.rank, device=clients.A.device) < lora_ranks_of(clients).unsqueeze(1)


def have_mixed_lora_ranks(clients: LoRAFactors) -> Tensor:
    """Whether the clients' LoRA ranks differ, a scalar tensor."""
    lora_ranks = lora_ranks_of(clients)
    return lora_ranks.amax() != lora_ranks.amin()


def is_identity(factor: Tensor) -> bool:
    """Whether a factor (N, N) of a product is the identity, so that the other one is the product. Waits for a GPU."""
    rows, columns = factor.shape
    return rows == columns and torch.equal(factor, torch.eye(rows, dtype=factor.dtype, device=factor.device))

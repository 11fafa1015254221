"""The coded exact fold: factors in half precision, and what they leave of ΔW folded in as factors of few bits.

T = Σ p_k B_k A_k; clients start from A', B' in float16; L = T − B'A' = U S Vᵀ; F = Q(U√S)·Q(√S Vᵀ) of the first triples
is folded into W0. Q rounds a column of B, or a row of A, to whole multiples of one float32 number, its scale:
Q(x) = c·round(x/c), c = max|x|/(2^(b−1) − 1). Server and clients hold the rounded numbers.

Letters: K clients, R LoRA rank, I in_features, O out_features, r rank of what is folded, b bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorafair.aggregation.factor_algebra import add, aggregation_bias, mean_factors, svd
from lorafair.config.options import When, option, when_given
from lorafair.model.adapter import LoRAFactors

_HALF = torch.finfo(torch.float16)
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a column below has lost its precision, and is sent as zero


@dataclass(frozen=True)
class Coding:
    """How the server's message to the clients is coded."""

    bits: int  # of a number of the folded factors
    half_start: bool  # A and B, from which clients start, in float16; else in float32

    def message_bytes(self, rank: int, outputs: int, inputs: int) -> int:
        """Of one layer's folded factors: r(O + I) numbers of b bits, filled up to a byte, and 2r scales in float32."""
        return -(-rank * (outputs + inputs) * self.bits // 8) + 8 * rank


def fold_bits_option(requires: When | None = None) -> int | None:
    """The option fold_bits of a method."""
    return option(
        None,
        """Send what is folded as factors whose numbers are rounded to so many bits, with one scale a column of B or row
        of A (not rounded: float32). With 4 bits, fold_rank=4·R and the start in float16, a layer costs the bytes of
        FedIT in float32 and 32·R more, whatever the number of clients.""",
        at_least=2,
        at_most=16,
        requires=requires,
    )


def fold_rank_option(requires: When | None = None) -> int | None:
    """The option fold_rank of a method."""
    return option(
        None,
        "Fold only the best approximation of this rank of what is left (all of it).",
        at_least=1,
        requires=requires,
    )


def start_precision_option() -> Literal["float16", "float32"] | None:
    """The option start_precision of a method."""
    return option(
        None,
        """What the factors that clients start from are sent in. float16: half the bytes; what the rounding leaves is
        folded, too. float32: as without fold_bits.""",
        requires=when_given("method.fold_bits"),
        conditional_default="float16",
    )


def coding_of(bits: int | None, start_precision: str | None) -> Coding | None:
    """What these options of a method mean; None where nothing is coded."""
    return None if bits is None else Coding(bits, half_start=start_precision != "float32")


def start_of(factors: LoRAFactors, coding: Coding | None) -> LoRAFactors:
    """The factors as clients get them: in float64, of values that float16 has where they are sent so."""
    if coding is None or not coding.half_start:
        return factors
    return LoRAFactors(A=_half(factors.A), B=_half(factors.B))


def _half(factor: Tensor) -> Tensor:
    return factor.clamp(_HALF.min, _HALF.max).to(torch.float16).to(torch.float64)


def left_over(
    start: LoRAFactors, clients: LoRAFactors, weights: Tensor, *, new_a: bool = True, new_b: bool = True
) -> LoRAFactors:
    """ΔW − B'A' = ΔR + (B̄ − B')Ā + B'(Ā − A'), in float64, of the ranks that differ from zero.

    `start` is (A', B'); where it is known to have Ā or B̄, not `new_a` or not `new_b`, the rank is smaller.
    """
    mean = mean_factors(clients, weights)
    parts = [aggregation_bias(clients, weights)]
    if new_b:
        parts.append(LoRAFactors(A=mean.A, B=mean.B - start.B))
    if new_a:
        parts.append(LoRAFactors(A=mean.A - start.A, B=start.B))
    return add(*parts)


def coded(product: LoRAFactors, rank: int | None, coding: Coding) -> LoRAFactors | None:
    """The best approximation of B·A of this rank at most, √S in both factors, rounded; in float64, which is exact.

    None of a product without any rank. No singular value is left out for being small.
    """
    if not product.rank:
        return None
    U, values, Vt = svd(product)
    roots = values[:rank].sqrt()
    return rounded(LoRAFactors(A=roots.unsqueeze(1) * Vt[:rank], B=U[:, :rank] * roots), coding.bits)


def rounded(factors: LoRAFactors, bits: int) -> LoRAFactors:
    """Q of every column of B (O, r) and row of A (r, I), in float64. Rounding again changes nothing."""
    of_b, scale_b = integers(factors.B, bits, dim=0)
    of_a, scale_a = integers(factors.A, bits, dim=1)
    return LoRAFactors(A=of_a * scale_a.to(torch.float64), B=of_b * scale_b.to(torch.float64))


def integers(factor: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from −(2^(b−1) − 1) to 2^(b−1) − 1, as float64, and their scales in float32, with axis `dim` kept.

    Of rounded factors it gives back the numbers and scales that they were made from, exactly: the largest number of a
    column is 2^(b−1) − 1 scales, which float64 holds and divides without rounding.
    """
    largest = 2 ** (bits - 1) - 1
    exact = factor.to(torch.float64)
    scales = (exact.abs().amax(dim, keepdim=True) / largest).to(torch.float32)
    scales = torch.where(scales < _SMALLEST_SCALE, 0.0, scales)
    unit = scales.to(torch.float64)
    numbers = torch.where(unit > 0, exact / torch.where(unit > 0, unit, 1.0), 0.0).round().clamp(-largest, largest)
    return numbers, scales

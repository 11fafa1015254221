"""Where the first round starts: factors that are drawn, or made of the frozen weight.

Letters: R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorafair.aggregation.base import (
    Aggregator,
    InitialLayer,
    LayerUpdate,
    ServerUpdate,
    check_finite,
    check_layer_update,
    of_method,
)
from lorafair.cluster.watchdog import heartbeat
from lorafair.model.adapter import AdapterState, Core, LoRAFactors
from lorafair.seeding import seeded


def leading_triples(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triples U (O, R), Σ (R,), Vᵀ (R, I) of a dense matrix (O, I), in float64.

    From the eigenvectors of M·Mᵀ, or of the smaller Mᵀ·M; U·Σ·Vᵀ is their projection of M. A row of Vᵀ, or a column of
    U, whose singular value is zero is zero.
    """
    outputs, inputs = matrix.shape
    if outputs > inputs:
        V, values, Ut = leading_triples(matrix.mT, rank)
        return Ut.mT, values, V.mT
    exact = matrix.to(torch.float64)
    squares, basis = torch.linalg.eigh(exact @ exact.mT)  # ascending
    values, U = squares[-rank:].flip(0).clamp_min(0).sqrt(), basis[:, -rank:].flip(1)
    return U, values, (U.mT @ exact) / torch.where(values > 0, values, 1.0).unsqueeze(1)


def principal_factors(weight: Tensor, lora_rank: int, scaling: float) -> LoRAFactors:
    """PiSSA (arXiv 2404.02948, equations 2 to 4): B = U√(Σ/s), A = √(Σ/s)Vᵀ of the first R singular triples of W0."""
    U, values, Vt = leading_triples(weight, lora_rank)
    roots = (values / scaling).sqrt()
    return LoRAFactors(A=roots.unsqueeze(1) * Vt, B=U * roots)


def orthonormal_factors(weight: Tensor, lora_rank: int, scaling: float) -> LoRAFactors:
    """OLoRA (arXiv 2406.01775, algorithm 1): the first R columns of Q and rows of R of W0 = QR, as B and A."""
    Q, upper = torch.linalg.qr(weight.to(torch.float64))
    return LoRAFactors(A=upper[:lora_rank], B=Q[:, :lora_rank])


OF_WEIGHT: dict[str, Callable[[Tensor, int, float], LoRAFactors]] = {
    "pissa": principal_factors,
    "olora": orthonormal_factors,
}


def is_drawn(aggregator: Aggregator, kind: str | None) -> bool:
    """Whether the first round starts from the drawn factors, so that nothing has to be computed."""
    own = type(aggregator).initialize is not Aggregator.initialize
    return (kind or aggregator.lora_initializations[0]) not in OF_WEIGHT and not own


def initial_update(
    aggregator: Aggregator,
    kind: str | None,
    drawn: AdapterState,
    weights: Mapping[str, Tensor],
    *,
    scaling: float,
    seed: int,
    gradients: Mapping[str, Tensor] | None = None,
) -> ServerUpdate:
    """Where the first round starts, and what is folded into the frozen weights (O, I) before.

    `kind` is model.lora.initialization, None for what the method asks for. Factors that are made of W0 are taken out of
    it, so that the model is as it was: W0 − s·B·A is frozen.
    """
    make = OF_WEIGHT.get(kind or aggregator.lora_initializations[0])
    updates = {}
    for path, factors in drawn.factors.items():
        heartbeat()
        if make is None:
            given = InitialLayer(factors, weights[path], scaling, seeded(seed, "initialize", path))
            given = replace(given, gradient=None if gradients is None else gradients[path])
            with of_method(aggregator, f"initialize of layer {path}"):
                updates[path] = aggregator.initialize(given)
            layer = f"method {type(aggregator).__name__}: initialize of layer {path}"
            check_layer_update(updates[path], layer, factors)
        else:
            made = make(weights[path], factors.rank, scaling).to(factors.A.dtype)  # what is folded is what is trained
            updates[path] = LayerUpdate(made, folded=LoRAFactors(A=made.A, B=-made.B))
    dtypes = {path: factors.A.dtype for path, factors in drawn.factors.items()}
    update = ServerUpdate(
        factors={path: u.factors.to(dtypes[path]) for path, u in updates.items()},
        folded={path: u.folded.to(dtypes[path]) for path, u in updates.items() if u.folded is not None},
        head=drawn.head,
        sent_lora_rank={},
        cores=drawn.cores | {path: _like(u.core, drawn.cores[path]) for path, u in updates.items() if u.core},
    )
    check_finite(aggregator, update)
    return update


def _like(core: Core, drawn: Core) -> Core:
    return Core(H=core.H.to(drawn.H.dtype).view_as(drawn.H), scales=core.scales.to(drawn.scales.dtype))

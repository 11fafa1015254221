"""Where the first round starts: factors that are drawn, or made of the frozen weight.

Letters: R LoRA rank, I in_features, O out_features, M the smaller of I and O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorafair.aggregation.base import Aggregator, LayerUpdate, ServerUpdate, check_finite, check_layer_update
from lorafair.cluster.watchdog import heartbeat
from lorafair.model.adapter import AdapterState, LoRAFactors
from lorafair.seeding import seeded


def principal_factors(weight: Tensor, lora_rank: int, scaling: float) -> LoRAFactors:
    """PiSSA (arXiv 2404.02948, equations 2 to 4): B = U√(Σ/s), A = √(Σ/s)Vᵀ of the first R singular triples of W0.

    From the eigenvectors U of W0·W0ᵀ, or of the smaller W0ᵀ·W0, in float64: s·B·A = U·Uᵀ·W0.
    """
    outputs, inputs = weight.shape
    if outputs > inputs:
        mirrored = principal_factors(weight.mT, lora_rank, scaling)
        return LoRAFactors(A=mirrored.B.mT, B=mirrored.A.mT)
    exact = weight.to(torch.float64)
    squares, basis = torch.linalg.eigh(exact @ exact.mT)  # (M,) ascending, (O, M)
    roots = squares[-lora_rank:].flip(0).clamp_min(0).sqrt().div(scaling).sqrt()  # (R,) √(Σ/s)
    U = basis[:, -lora_rank:].flip(1)
    A = (U.mT @ exact) / torch.where(roots > 0, scaling * roots, 1.0).unsqueeze(1)
    return LoRAFactors(A=A, B=U * roots)


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
            generator = seeded(seed, "initialize", path)
            updates[path] = aggregator.initialize(factors, weights[path], scaling, generator)
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
        cores=drawn.cores | {path: u.core for path, u in updates.items() if u.core is not None},
    )
    check_finite(aggregator, update)
    return update

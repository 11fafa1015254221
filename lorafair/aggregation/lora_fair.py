"""LoRA-FAIR: correct the averaged factors so that their product comes close to the average of the products.

Averaging gives B̄Ā instead of ΔW = Σ p_k B_k A_k. The server adds ΔB = argmin S(ΔW, (B̄ + ΔB)Ā) + λ‖ΔB‖² and the next
round starts from (Ā, B̄ + ΔB); clients send and receive what they do in FedIT. (arXiv 2411.14961, ICCV 2025)

Letters: K clients, R LoRA rank, I in_features, O out_features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorafair.aggregation.alignment import aligned
from lorafair.aggregation.base import Aggregator, LayerUpdate
from lorafair.aggregation.coded_fold import (
    Coding,
    coded,
    coding_of,
    fold_bits_option,
    fold_rank_option,
    left_over,
    start_of,
    start_precision_option,
)
from lorafair.aggregation.factor_algebra import (
    have_mixed_lora_ranks,
    inner,
    mean_factors,
    squared_norm,
    transpose,
    truncated_svd,
    weighted_sum,
)
from lorafair.aggregation.solvers.directions import (
    Correction,
    Problems,
    descend,
    descend_rows,
    solve_cosine,
    solve_frobenius,
)
from lorafair.aggregation.solvers.fixed_factor import correct_b
from lorafair.aggregation.solvers.free_factors import (
    descend_from_mean,
    descend_jointly,
    minimize_from,
    with_noise,
)
from lorafair.aggregation.solvers.layer_objective import LayerObjective, layer_objective, penalty_of_b
from lorafair.config.options import option, when
from lorafair.errors import LorafairError
from lorafair.model.adapter import LoRAFactors


@dataclass(frozen=True)
class LoRAFair(Aggregator):
    """FedIT with a server-side correction of the averaged factors (arXiv 2411.14961)."""

    similarity: Literal["cosine", "cosine_columns", "frobenius"] = option(
        "cosine",
        """How the corrected product X is compared with ΔW. cosine: 1 − cos of the flattened matrices. cosine_columns: 1
        − the mean cosine of their columns. frobenius: ‖ΔW − X‖², with λ relative to the fixed factor.""",
    )
    residual: Literal["B", "A", "both"] = option(
        "B", "The factor that is corrected; the other stays the clients' mean."
    )
    regularization: float = option(
        0.01, "λ, the weight of the correction's squared norm. Large values give FedIT.", at_least=0
    )
    solver: Literal["exact", "sgd"] = option(
        "exact",
        """exact: the minimiser (with residual=both, or cosine_columns on B, a local one). sgd: the paper's gradient
        descent from zero, which inflates B if B is small and stops early if λ is small.""",
    )
    rescale: bool | None = option(
        None,
        """Afterwards multiply the corrected factor (B for both) by ⟨ΔW, X⟩/‖X‖², because the cosine does not depend on
        the scale. If not set: only in rounds whose clients differ in LoRA rank, where the cosine alone would leave a
        larger error than FedIT.""",
    )
    align: bool = option(
        False,
        """First rotate every client's factors towards those that it was sent (orthogonal Procrustes); the products do
        not change. The server does this, without extra communication.""",
    )
    fold: bool = option(
        False,
        """Merge the remainder ΔW − B'A' into the frozen weights: exact like FedEx-LoRA, at its traffic, or less with
        method.fold_bits.""",
    )
    fold_bits: int | None = fold_bits_option(requires=when("method.fold", True))
    fold_rank: int | None = fold_rank_option(requires=when("method.fold", True))
    start_precision: Literal["float16", "float32"] | None = start_precision_option()
    sgd_steps: int | None = option(
        None, "Number of gradient steps.", at_least=1, requires=when("method.solver", "sgd"), conditional_default=1000
    )
    sgd_learning_rate: float | None = option(
        None, "Step size of the descent.", above=0, requires=when("method.solver", "sgd"), conditional_default=0.01
    )
    sgd_start: Literal["zero", "xavier"] | None = option(
        None,
        """Initial value of ΔB (zero). xavier: torch's xavier_uniform_, as in public code derived from the authors'
        (with similarity=cosine_columns, sgd_steps=500 and sgd_patience=5); most of that noise remains.""",
        requires=when("method.solver", "sgd"),
    )
    sgd_patience: int | None = option(
        None,
        """End the descent after this many consecutive steps that change the loss, summed over all layers, by less than
        1e-6; 5 in that code (never).""",
        at_least=1,
        requires=when("method.solver", "sgd"),
    )

    @property
    def folds(self) -> bool:
        """With method.fold."""
        return self.fold

    @property
    def coding(self) -> Coding | None:
        """With method.fold_bits."""
        return coding_of(self.fold_bits, self.start_precision)

    @property
    def needs_all_layers(self) -> bool:
        """With method.sgd_patience, which looks at the loss of all of them."""
        return self.sgd_patience is not None

    @property
    def uses_products(self) -> bool:
        """Where B is corrected with the whole matrix in view, and nothing is folded or turned before.

        The exact solution and the descent then depend on ΔR·Āᵀ, the mean and, for the cosine, on ‖ΔW‖, which is taken
        within the rows of Ā.
        """
        fits = self.residual == "B" and self.similarity != "cosine_columns" and self.sgd_start != "xavier"
        return fits and not (self.align or self.fold or self.needs_all_layers)

    @property
    def note_on_mixed_lora_ranks(self) -> str:
        """That method.rescale is on then."""
        if self.rescale is not None:
            return ""
        return "method.rescale is on in rounds whose clients differ in LoRA rank (method.rescale=false: never)"

    def combine(self, clients: LoRAFactors, weights: Tensor, start: LoRAFactors | None = None) -> LayerUpdate:
        """One layer, from A (K, R, I), B (K, O, R) and weights (K,); see `combine_layers`."""
        return self.combine_layers({"layer": clients}, weights, None if start is None else {"layer": start})["layer"]

    def combine_layers(
        self, layers: Mapping[str, LoRAFactors], weights: Tensor, start: Mapping[str, LoRAFactors] | None = None
    ) -> dict[str, LayerUpdate]:
        """All layers: in one batch where a factor is fixed, which never waits for the device but in `eigh`.

        Raises LorafairError where sgd diverges.
        """
        if self.align and start is not None:
            layers = {path: aligned(clients, start[path]) for path, clients in layers.items()}
        mixed = {path: have_mixed_lora_ranks(clients) for path, clients in layers.items()}
        if self.needs_all_layers or self.sgd_start == "xavier":
            corrected = self._fitted(self._descend_jointly(layers, weights), layers, weights, mixed)
        elif self._has_fixed_factor:
            corrected = self._correct_one_factor(layers, weights, mixed)
        else:
            found = {path: self._correct_freely(clients, weights) for path, clients in layers.items()}
            corrected = self._fitted(found, layers, weights, mixed)
        if self.solver == "sgd":
            self._require_finite(corrected)
        if self.rescale:
            corrected = {path: self._rescaled(corrected[path], layers[path], weights) for path in layers}
        return {path: self._update(factors, layers[path], weights) for path, factors in corrected.items()}

    def objective(self, clients: LoRAFactors, weights: Tensor) -> LayerObjective:
        """What this method minimises for one layer, a function of A (R, I) and B (O, R) in float64."""
        return layer_objective(clients, weights, similarity=self.similarity, regularization=self.regularization)

    @property
    def _has_fixed_factor(self) -> bool:
        """Whether the problem falls apart into the small ones of `fixed_factor`."""
        return self.residual == "A" or (self.residual == "B" and self.similarity != "cosine_columns")

    def _correct_one_factor(
        self, layers: Mapping[str, LoRAFactors], weights: Tensor, mixed: Mapping[str, Tensor]
    ) -> dict[str, LoRAFactors]:
        on_a = self.residual == "A"
        corrected = correct_b(
            {path: transpose(clients) for path, clients in layers.items()} if on_a else layers,
            weights,
            self._solve,
            penalty=lambda mean: penalty_of_b(mean, similarity=self.similarity, regularization=self.regularization),
            by_row=self.similarity == "cosine_columns",
            rescales=mixed if self.rescale is None else None,
        )
        return {path: transpose(factors) for path, factors in corrected.items()} if on_a else corrected

    def _solve(self, problems: Problems) -> Correction:
        cosine = self.similarity != "frobenius"
        if self.solver == "sgd" and self.similarity == "cosine_columns":
            return descend_rows(problems, steps=self._steps, learning_rate=self._learning_rate)
        if self.solver == "sgd":
            return descend(problems, cosine=cosine, steps=self._steps, learning_rate=self._learning_rate)
        return solve_cosine(problems) if cosine else solve_frobenius(problems)

    def _fitted(
        self,
        corrected: dict[str, LoRAFactors],
        layers: Mapping[str, LoRAFactors],
        weights: Tensor,
        mixed: Mapping[str, Tensor],
    ) -> dict[str, LoRAFactors]:
        """Rescaled where nothing else is asked for and LoRA ranks differ; see `directions.rescaled`."""
        for path in corrected if self.rescale is None else ():
            if bool(mixed[path]):
                opposed = inner(corrected[path], weighted_sum(layers[path], weights)) <= 0
                corrected[path] = (
                    mean_factors(layers[path], weights)
                    if bool(opposed)
                    else self._rescaled(corrected[path], layers[path], weights)
                )
        return corrected

    def _descend_jointly(self, layers: Mapping[str, LoRAFactors], weights: Tensor) -> dict[str, LoRAFactors]:
        objectives = [self.objective(clients, weights) for clients in layers.values()]
        starts = [objective.mean for objective in objectives]
        if self.sgd_start == "xavier":
            starts = [with_noise(mean, self.residual) for mean in starts]
        found = descend_jointly(
            objectives,
            starts,
            self.residual,
            steps=self._steps,
            learning_rate=self._learning_rate,
            patience=self.sgd_patience,
        )
        return dict(zip(layers, found, strict=True))

    def _correct_freely(self, clients: LoRAFactors, weights: Tensor) -> LoRAFactors:
        objective = self.objective(clients, weights)
        if self.solver == "sgd":
            return descend_from_mean(objective, self.residual, steps=self._steps, learning_rate=self._learning_rate)
        if self.residual == "B":
            return minimize_from(objective, objective.mean, "B")
        one_sided = [
            dataclasses.replace(
                self, residual=side, rescale=False, fold=False, fold_bits=None, fold_rank=None, start_precision=None
            )
            .combine(clients, weights)
            .factors
            for side in ("B", "A")
        ]
        # Several valleys: the one below the mean, where descent would go, and the one below the best single correction.
        starts = (objective.mean, min(one_sided, key=lambda factors: float(objective(factors))))
        return min((minimize_from(objective, start, "both") for start in starts), key=lambda f: float(objective(f)))

    def _update(self, corrected: LoRAFactors, clients: LoRAFactors, weights: Tensor) -> LayerUpdate:
        """The corrected factors, and with method.fold what they leave, as it is sent."""
        if not self.fold:
            return LayerUpdate(corrected)
        coding = self.coding
        start, rounds_start = start_of(corrected, coding), coding is not None and coding.half_start
        new_b = self.residual != "A" or bool(self.rescale) or rounds_start
        left = left_over(start, clients, weights, new_a=self.residual != "B" or rounds_start, new_b=new_b)
        if coding is not None:
            return LayerUpdate(start, coded(left, self.fold_rank, coding))
        if self.fold_rank is not None and self.fold_rank < left.rank:
            left = truncated_svd(left, self.fold_rank)
        return LayerUpdate(start, left)

    @property
    def _steps(self) -> int:
        return 1000 if self.sgd_steps is None else self.sgd_steps

    @property
    def _learning_rate(self) -> float:
        return 0.01 if self.sgd_learning_rate is None else self.sgd_learning_rate

    def _require_finite(self, corrected: dict[str, LoRAFactors]) -> None:
        for path, factors in corrected.items():
            if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
                raise LorafairError(
                    f"method.sgd_learning_rate={self._learning_rate} diverged in layer {path}: take a smaller one, "
                    "a smaller method.regularization, or method.solver=exact"
                )

    def _rescaled(self, corrected: LoRAFactors, clients: LoRAFactors, weights: Tensor) -> LoRAFactors:
        scale = inner(corrected, weighted_sum(clients, weights)) / squared_norm(corrected)
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
        if self.residual == "A":
            return LoRAFactors(A=corrected.A * scale, B=corrected.B)
        return LoRAFactors(A=corrected.A, B=corrected.B * scale)

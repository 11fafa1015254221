"""How the releases of a round share the privacy budget under client-level privacy.

Gaussian releases of the multipliers σ_i on the same clients are together one Gaussian mechanism of multiplier σ with
1/σ² = Σ 1/σ_i², also where the query of one depends on the result of another. So the accountant sees σ alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafair.aggregation.base import Aggregator
from lorafair.config.schema import PrivacyConfig
from lorafair.errors import ConfigError

_PRODUCTS = 0.05


@dataclass(frozen=True)
class BudgetShares:
    """A number for each release of a round; 0 for one that is not made."""

    mean: float  # of the clipped updates
    count: float  # of the clients whose norms are within the bound
    products: float  # of LoRA-FAIR

    def multipliers(self, noise_multiplier: float) -> BudgetShares:
        """σ_i = σ/√w_i of shares w_i."""
        of_shares = (noise_multiplier / math.sqrt(w) if w else 0.0 for w in (self.mean, self.count, self.products))
        return BudgetShares(*of_shares)


def budget_shares(privacy: PrivacyConfig, method: Aggregator) -> BudgetShares:
    """The shares w_i of the budget 1/σ², which sum to 1. Raises ConfigError where nothing is left for the mean."""
    count = privacy.clip_share or 0.0
    given = _PRODUCTS if privacy.products_share is None else privacy.products_share
    products = given if method.uses_products else 0.0
    if count + products >= 1:
        raise ConfigError(
            f"privacy.clip_share={count:g} and privacy.products_share={products:g} leave nothing of the budget for the "
            "mean of the updates: their sum must be below 1"
        )
    return BudgetShares(1 - count - products, count, products)

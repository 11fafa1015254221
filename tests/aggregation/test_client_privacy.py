"""Methods under client-level privacy: what each claims of its server step, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorafair.aggregation.base import Aggregator, aggregate
from lorafair.aggregation.lora_fair import LoRAFair
from lorafair.aggregation.privacy_budget import budget_shares
from lorafair.aggregation.registry import build_aggregator, method_of
from lorafair.config.schema import Config, PrivacyConfig
from lorafair.errors import ConfigError
from lorafair.model.adapter import PARTS, AdapterLayout, AdapterState, LoRAFactors
from lorafair.privacy.products import ReleasedLayer, row_basis
from lorafair.registry import METHODS
from lorafair.seeding import seeded

SHAPES = {"one": ((4, 7), (6, 4)), "two": ((4, 5), (9, 4))}
HEAD = {"head.weight": (4, 6)}
PRIVATE = ("privacy.unit=client", "privacy.noise_multiplier=1", "federation.weighting=uniform")


def after_training(method: Aggregator, clients: int) -> tuple[AdapterLayout, torch.Tensor, torch.Tensor]:
    """Packed adapters (K, P) of clients that have trained what the method trains, and where they started (P,)."""
    layout = AdapterLayout.of(SHAPES, HEAD, method.core)
    generator = seeded(0, "made up")
    start = torch.randn(layout.length, generator=generator, dtype=torch.float64)
    rows = start.repeat(clients, 1)
    for part in method.trains(0):
        span = layout.slices[part]
        rows[:, span] += torch.randn(clients, span.stop - span.start, generator=generator, dtype=torch.float64)
    return layout, rows, start


def of_mean(method: Aggregator) -> tuple[AdapterState, AdapterState, dict[str, LoRAFactors], dict[str, LoRAFactors]]:
    """What aggregation makes of some clients, and of one that is their mean; with what is folded."""
    layout, rows, start = after_training(method, 4)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mean, one = (weights @ rows).unsqueeze(0), torch.ones(1, dtype=torch.float64)
    sent, received = layout.unpack(start), method.receives(0)
    several = aggregate(method.in_round(0), layout.unpack(rows), weights, sent, received)
    single = aggregate(method.in_round(0), layout.unpack(mean), one, sent, received)
    return several.adapter, single.adapter, several.folded, single.folded


def are_equal(method: Aggregator) -> bool:
    several, single, folded, folded_of_mean = of_mean(method)
    pairs = [(several.head[name], single.head[name]) for name in several.head]
    pairs += [(core.H, single.cores[path].H) for path, core in several.cores.items()]
    for path, factors in several.factors.items():
        other = single.factors[path]
        pairs += [(factors.B @ factors.A, other.B @ other.A)]  # signs of singular vectors are free
        if not method.decomposes:
            pairs += [(factors.A, other.A), (factors.B, other.B)]
    for path in folded.keys() | folded_of_mean.keys():
        products = [f[path].B @ f[path].A if path in f else torch.zeros(1) for f in (folded, folded_of_mean)]
        pairs.append((products[0], products[1]))
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in pairs)


SHIPPED = [name for name in METHODS.names if name not in ("centralized", "local_only")]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_method_averages_factors_as_it_claims(name: str) -> None:
    method = build_aggregator({"name": name})
    assert are_equal(method) == method.averages_factors


@pytest.mark.parametrize("similarity", ["cosine", "frobenius"])
@pytest.mark.parametrize("solver", ["exact", "sgd"])
@pytest.mark.parametrize("rescale", [None, True])
def test_lora_fair_needs_only_the_mean_and_the_products_in_the_rows_of_a(
    similarity: Any, solver: Any, rescale: bool | None
) -> None:
    """From the pair of clients that has these two, the same step as from all clients.

    The cosine also depends on ‖ΔW‖; here ΔW lies within the rows of Ā, where the release has all of it.
    """
    method = LoRAFair(similarity=similarity, solver=solver, rescale=rescale, sgd_steps=30 if solver == "sgd" else None)
    assert method.uses_products
    generator, weights = seeded(0, "made up"), torch.full((5,), 0.2, dtype=torch.float64)
    A0, B0, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 7), (6, 3), (5, 6, 3)))
    a = torch.randn(5, 3, 7, generator=generator, dtype=torch.float64)
    if similarity == "cosine":
        a = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64) @ A0
    clients = LoRAFactors(A=A0 + a, B=B0 + b)
    mean = LoRAFactors(A=clients.A.mean(0), B=clients.B.mean(0))
    basis = row_basis(mean.A)
    layer = ReleasedLayer(mean, LoRAFactors(A=a.mean(0), B=b.mean(0)), basis, (b @ (a @ basis)).mean(0), noise_std=0.0)
    expected = method.combine(clients, weights).factors
    found = method.combine(layer.pair(), torch.full((2,), 0.5, dtype=torch.float64)).factors
    assert torch.allclose(found.A, expected.A, atol=1e-9)
    assert torch.allclose(found.B, expected.B, atol=1e-7)
    assert not torch.allclose(expected.B, mean.B, atol=1e-4)  # something is corrected


def test_the_budget_is_shared_without_a_rest() -> None:
    privacy = PrivacyConfig(unit="client", clip_share=0.1, products_share=0.3)
    shares = budget_shares(privacy, LoRAFair())
    each = shares.multipliers(2.0)
    assert sum(1 / sigma**2 for sigma in (each.mean, each.count, each.products)) == pytest.approx(1 / 2.0**2)
    of_fedit = budget_shares(privacy, build_aggregator({"name": "fedit"})).multipliers(2.0)
    assert of_fedit.products == 0
    assert 1 / of_fedit.mean**2 + 1 / of_fedit.count**2 == pytest.approx(1 / 4)


POSSIBLE = "possible: fed_plora, .*fedit, fedsvd, ffa_lora, frlora, .*lora_fair, rbla, ro_lora"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federation.weighting=size"], r"federation.weighting=size does not fit privacy.unit=client: only equal"),
        (["federation.weighting=afl"], r"federation.weighting=afl does not fit privacy.unit=client"),
        (["federation.profile=phones_4g"], r"federation.profile=phones_4g does not fit privacy.unit=client"),
        (["defence.name=krum"], r"defence.name=krum does not fit privacy.unit=client: .*depends on the others"),
        (["federation.head_weighting=class"], r"federation.head_weighting=class does not fit .*images of each class"),
        (["federation.initialization=local"], r"federation.initialization=local does not fit privacy.unit=client"),
        (["client.scaffold=true", "client.optimizer=sgd"], r"client.scaffold=true does not fit privacy.unit=client"),
        (["model.lora.client_ranks=[4,2,1]"], r"model.lora.client_ranks does not fit privacy.unit=client"),
        (["method.name=fedsa_lora"], rf"method.name=fedsa_lora, whose clients keep parts of their own .*{POSSIBLE}"),
        (["method.name=fedask", "method.freeze_a=false"], r"method.name=fedask needs method.freeze_a=true"),
        (["method.name=local_only"], r"method.name=local_only, whose clients keep parts"),
        (["method.name=centralized"], r"method.name=centralized, which pools the clients' images"),
        (["method.name=fed_sb"], r"method.name=fed_sb, which starts from a gradient of the clients' images"),
        *(
            ([f"method.name={name}"], rf"method.name={name}, whose server step depends on each client's .*{POSSIBLE}")
            for name in (
                "flora", "flex_lora", "fedex_lora", "het_lora", "florist", "raflora", "fedrot_lora", "fedrpca",
                "flora_na", "fedmomentum", "ravan", "glora",
            )
        ),
        *(
            ([f"method.{option}"], r"privacy.unit=client with method.name=lora_fair needs method.residual=B, ")
            for option in ("residual=A", "residual=both", "similarity=cosine_columns", "align=true", "fold=true")
        ),
        (["privacy.clip_parts={A: 1, B: 1}"], r"privacy.clip_parts=.* must give a number for each part .*: A, B, head"),
        (["privacy.clip_parts={A: 1, B: 0, head: 1}"], r"privacy.clip_parts=.*give a number above 0"),
        (["method.name=fedit", "privacy.products_share=0.1"], r"privacy.products_share=0.1 has no effect: it needs"),
        (["privacy.clip_rate=0.1"], r"privacy.clip_rate=0.1 has no effect: it needs privacy.clip_quantile"),
        (
            ["privacy.clip_quantile=0.5", "privacy.clip_share=0.5", "privacy.products_share=0.5"],
            r"leave nothing of the budget for the mean",
        ),
        (["privacy.clip_quantile=1.5"], r"privacy.clip_quantile=1.5 is out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_bounded_is_refused_in_one_line(
    tiny: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        method_of(tiny(*PRIVATE, *overrides))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "ro_lora", "fedsvd", "frlora", "rbla", "fed_plora", "lora_fair"])
def test_what_can_be_bounded_is_possible(tiny: Callable[..., Config], name: str) -> None:
    method = method_of(tiny(*PRIVATE, f"method.name={name}"))
    assert method.averages_factors or method.uses_products
    assert set(method.sends(0)) <= set(PARTS)


@pytest.mark.parametrize(
    "options",
    [
        ["federation.initialization=fresh"],
        ["server.optimizer=fedadam"],
        ["evaluation.average_rounds=2"],
        ["client.proximal=0.1"],
    ],
)
def test_post_processing_and_local_training_are_free(tiny: Callable[..., Config], options: list[str]) -> None:
    method_of(tiny(*PRIVATE, "method.name=fedit", *options))

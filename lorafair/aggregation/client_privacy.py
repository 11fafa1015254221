"""Which methods and settings client-level differential privacy can work with; what cannot be bounded is refused."""

from __future__ import annotations

from collections.abc import Callable

from lorafair.aggregation.base import Aggregator
from lorafair.aggregation.privacy_budget import budget_shares
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.model.adapter import PARTS, Part

Methods = Callable[[Callable[[type[Aggregator]], bool]], list[str]]  # the names of those for which something holds


def check_client_privacy(config: Config, method: Aggregator, name: str, methods_that: Methods) -> None:
    """Raise ConfigError, with what is possible, where privacy.unit=client does not fit the method or a setting."""
    _check_parts_of_privacy(config, method, name)
    if config.privacy.unit != "client":
        return
    unit = "privacy.unit=client"
    if method.personal_parts or method.pools_data or method.images_at_start:
        why = (
            "whose clients keep parts of their own and are evaluated with them" if method.personal_parts
            else "which pools the clients' images" if method.pools_data
            else "which starts from a gradient of the clients' images"
        )  # fmt: skip
        raise ConfigError(f"{unit} does not fit method.name={name}, {why}; possible: {_possible(methods_that)}")
    if name == "lora_fair" and not method.uses_products:
        raise ConfigError(
            f"{unit} with method.name=lora_fair needs method.residual=B, similarity=cosine or frobenius, and no align, "
            "fold, sgd_patience or sgd_start=xavier: only for these the clients' part is a sum that can be bounded"
        )
    if getattr(method, "freeze_a", None) is False:
        raise ConfigError(
            f"{unit} with method.name={name} needs method.freeze_a=true: else it is no function of the mean"
        )
    if not (method.averages_factors or method.uses_products):
        raise ConfigError(
            f"{unit} does not fit method.name={name}, whose server step depends on each client's factors and not on "
            f"their mean alone; possible: {_possible(methods_that)}"
        )
    _check_settings(config)
    budget_shares(config.privacy, method)


def _possible(methods_that: Methods) -> str:
    names = methods_that(lambda m: m.averages_factors and not m.personal_parts and _needs_no_images(m))
    return ", ".join(sorted([*names, "lora_fair"]))


def _needs_no_images(method: type[Aggregator]) -> bool:
    return method.images_at_start is Aggregator.images_at_start


def _check_settings(config: Config) -> None:
    """What would tell of single clients, or make one count more than the bound."""
    for key, used, why, possible in (
        (
            f"federation.weighting={config.federation.weighting}",
            config.federation.weighting != "uniform",
            "only equal weights tell nothing of a client and let none count more than the bound",
            "federation.weighting=uniform",
        ),
        (
            f"federation.profile={config.federation.profile}",
            config.federation.profile is not None,
            "who takes part would follow from the clients' devices, and the accountant counts on independent samples",
            "no federation.profile",
        ),
        (
            f"defence.name={config.defence.name}",
            config.defence.name is not None,
            "what it makes of one client depends on the others, so the bound would not hold; each client's influence "
            "is bounded by privacy.clip_norm already",
            "no defence.name",
        ),
        (
            "federation.head_weighting=class", config.federation.head_weighting == "class",
            "it discloses how many images of each class a client has", "federation.head_weighting=client",
        ),
        (
            "federation.initialization=local", config.federation.initialization == "local",
            "clients would not start from what was released", "federation.initialization=average",
        ),
        (
            "client.scaffold=true", config.client.scaffold,
            "the server would keep a control variate of every client", "client.scaffold=false",
        ),
        (
            "model.lora.client_ranks", config.model.lora.client_ranks is not None,
            "the mean is taken over clients of one LoRA rank", "one number as model.lora.rank",
        ),
    ):  # fmt: skip
        if used:
            raise ConfigError(f"{key} does not fit privacy.unit=client: {why}; possible: {possible}")


def _check_parts_of_privacy(config: Config, method: Aggregator, name: str) -> None:
    """The options of privacy whose meaning depends on the method."""
    privacy = config.privacy
    for option in ("products_share", "products_clip"):
        value = getattr(privacy, option)
        if value is not None and not (privacy.unit == "client" and method.uses_products):
            raise ConfigError(
                f"privacy.{option}={value} has no effect: it needs privacy.unit=client and method.name=lora_fair"
            )
    if not privacy.clip_parts:
        return
    if privacy.unit != "client":
        raise ConfigError(f"privacy.clip_parts={privacy.clip_parts} has no effect: it needs privacy.unit=client")
    sent: list[Part] = [part for part in PARTS if any(part in method.sends(index) for index in range(2))]
    if method.core is None and "core" in sent:
        sent.remove("core")
    given = privacy.clip_parts
    if set(given) != set(sent):
        raise ConfigError(
            f"privacy.clip_parts={given} must give a number for each part that clients of method.name={name} send: "
            f"{', '.join(sent)}"
        )
    if not all(isinstance(value, int | float) and value > 0 for value in given.values()):
        raise ConfigError(f"privacy.clip_parts={given}: give a number above 0 for each part")

"""What cannot be had together with differential privacy, found before processes start."""

from __future__ import annotations

from lorafair.aggregation.base import Aggregator
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.privacy.accounting import require_accountant

# The ε of completed rounds is computed from these, so a run that is continued cannot change them.
_ACCOUNTED = (
    "images", "classes", "seed", "federation.clients_per_round", "federation.seed", "client.batch_size",
    "client.epochs", "client.steps",
)  # fmt: skip
_ACCOUNTED_GROUPS = ("data.", "partition.", "privacy.")


def check_privacy(config: Config, aggregator: Aggregator) -> None:
    """Raise ConfigError where the accountant is not installed, or the ε of the run would not hold."""
    if config.privacy.unit == "none":
        return
    require_accountant()
    if config.federation.profile is not None:
        raise ConfigError(
            f"federation.profile={config.federation.profile} chooses clients by how fast they are, and the ε of "
            f"privacy.unit={config.privacy.unit} is computed for clients drawn with federation.seed alone; leave one "
            "of them out (lorafair timeline prices a run with a profile afterwards)"
        )
    if config.privacy.unit == "example":
        _check_examples(config, aggregator)
    _check_accepted(config)


def _check_examples(config: Config, aggregator: Aggregator) -> None:
    name, protects = config.method["name"], "privacy.unit=example"
    if aggregator.images_at_start:
        raise ConfigError(
            f"method.name={name} begins with gradients of {aggregator.images_at_start} training images, which have no "
            f"noise, so {protects} would not hold; take another method"
        )
    if config.federation.weighting not in ("size", "uniform"):
        raise ConfigError(
            f"federation.weighting={config.federation.weighting} makes weights of the clients' losses, which have no "
            f"noise, so {protects} would not hold; set federation.weighting=size or uniform"
        )
    if config.federation.head_weighting == "class":
        raise ConfigError(
            "federation.head_weighting=class sends how many images of each class a client has, without noise, so "
            f"{protects} would not hold; set federation.head_weighting=client"
        )
    if config.model.compile is not None:
        raise ConfigError(
            f"model.compile={config.model.compile}: with {protects} every step has another number of images, and the "
            "model would be compiled for each; set model.compile=null"
        )


def _check_accepted(config: Config) -> None:
    """No option of which the ε of completed rounds is computed may change."""
    for key in config.accept:
        if key in _ACCOUNTED or key.startswith(_ACCOUNTED_GROUPS):
            raise ConfigError(
                f"accept: {key} cannot differ with privacy.unit={config.privacy.unit}: the ε of the completed rounds "
                "is computed from it; start a new run"
            )

"""Which compression fits which method: found from the configuration, before anything is loaded."""

from __future__ import annotations

from lorafair.aggregation.base import Aggregator
from lorafair.config.schema import Config
from lorafair.errors import ConfigError
from lorafair.registry import COMPRESSIONS


def check_compression(config: Config, method: Aggregator, name: str) -> None:
    """Raise ConfigError for a coding of what does not travel, or what cannot be coded with it."""
    options = config.compression
    given = {key: getattr(options, key) for key in ("up", "down", "folded") if getattr(options, key) is not None}
    for key, coding in given.items():
        if key != "folded" and not _travels(method, key):
            what = "sends" if key == "up" else "is sent"
            raise ConfigError(
                f"compression.{key}={coding} has no effect with method.name={name}, whose client {what} nothing"
            )
        if method.rank_pruning is not None:
            raise ConfigError(
                f"compression.{key}={coding} does not fit method.pruning of method.name={name}, by which the length of "
                "messages changes; leave one of them out"
            )
        if method.sketch_numbers(1, 1, 1) is not None:
            raise ConfigError(
                f"compression.{key}={coding} does not fit method.name={name}, whose clients send sketches instead of "
                "factors; leave it out"
            )
        if config.client.scaffold:
            raise ConfigError(
                f"compression.{key}={coding} does not fit client.scaffold=true, whose control variates travel in "
                "float32; leave one of them out"
            )
    if options.folded is not None:
        _check_folded(options.folded, method, name)
    if options.head is not None:
        _check_head(config, method, name)


def _travels(method: Aggregator, key: str) -> bool:
    parts = method.sends(0) if key == "up" else method.receives(0)
    return bool(parts) and not method.pools_data


def _check_head(config: Config, method: Aggregator, name: str) -> None:
    coding = config.compression.head
    if config.compression.up is None and config.compression.down is None:
        raise ConfigError(f"compression.head={coding} has no effect: it needs compression.up or compression.down")
    if "head" not in method.sends(0):
        raise ConfigError(f"compression.head={coding} has no effect: with method.name={name} heads stay at the clients")
    _check_not_sparse("head", str(coding))


def _check_folded(coding: str, method: Aggregator, name: str) -> None:
    if not method.folds:
        raise ConfigError(
            f"compression.folded={coding} has no effect: method.name={name} with these options folds nothing"
        )
    if method.coding is not None:
        raise ConfigError(
            f"compression.folded={coding} does not fit method.fold_bits={method.coding.bits}, which codes the same "
            "factors; leave one of them out"
        )
    _check_not_sparse("folded", coding)


def _check_not_sparse(key: str, coding: str) -> None:
    if COMPRESSIONS[coding].is_sparse:
        possible = [other for other in COMPRESSIONS.names if not COMPRESSIONS[other].is_sparse]
        raise ConfigError(
            f"compression.{key}={coding} would lose for good what it leaves out; possible: {', '.join(possible)}"
        )

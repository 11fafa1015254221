"""Whether every part gets its turn, with a method whose clients train one after the other from step to step."""

from __future__ import annotations

from collections.abc import Sequence

from lorafair.aggregation.base import Aggregator, alternates
from lorafair.config.schema import ClientConfig
from lorafair.console import format_count
from lorafair.data.loading import number_of_batches
from lorafair.errors import ConfigError


def check_turns(aggregator: Aggregator, sizes: Sequence[int], local: ClientConfig) -> None:
    """Raise ConfigError where no client, of so many images (N,), takes enough steps in a round to train every part."""
    if not alternates(aggregator):
        return
    steps = max(number_of_batches(size, local) for size in sizes)
    reached = {part for step in range(min(steps, 100)) for part in aggregator.trains_in_step(0, step)}
    missed = [part for part in ("A", "B", "head") if part in aggregator.trains(0) and part not in reached]
    if missed:
        key = f"client.steps={steps}" if local.steps is not None else f"client.batch_size={local.batch_size}"
        raise ConfigError(
            f"{key}: no client would train {' and '.join(missed)} in {format_count(steps, 'step')} a round, as this "
            "method trains its parts in turns from step to step; set more client.steps or client.epochs, or a smaller "
            "client.batch_size"
        )

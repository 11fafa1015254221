"""Callbacks: methods of a user's objects that are called at certain moments of a run, on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorafair.errors import LorafairError, of_plugin, one_line
from lorafair.evaluation import Evaluation
from lorafair.registry import CALLBACKS


class Callback:
    """Methods that are called at certain points of a run, on rank 0; those of this class do nothing.

    A callback cannot change the numbers of a run. If it raises an exception, the run ends with an error that names it.

    Example:
        >>> class StopWatch(lorafair.Callback):
        ...     def on_round_end(self, round, scalars):
        ...         print(round, scalars["time/train"])
        >>> lorafair.run("conf/synthetic.yaml", callbacks=[StopWatch()])
    """

    def on_round_start(self, round: int) -> None:
        """A round begins; rounds are numbered from 1."""

    def on_round_end(self, round: int, scalars: Mapping[str, float]) -> None:
        """A round is done; `scalars` are its values by their names in metrics.csv."""

    def on_evaluation(self, round: int, evaluation: Evaluation) -> None:
        """The model after a round was evaluated."""

    def on_stop(self, completed_rounds: int, reason: str) -> None:
        """The run ends: `reason` is "finished", or what ended it."""


def register_callback(name: str) -> Callable[[Callable[[], Callback]], Callable[[], Callback]]:
    """Make a callback a value of `callbacks`.

    Args:
        name: The name to use in `callbacks`.

    Returns:
        A decorator for a class that extends `Callback`, or a function that makes one; called without arguments.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @lorafair.register_callback("stop_watch")
        ... class StopWatch(lorafair.Callback):
        ...     def on_round_end(self, round, scalars):
        ...         print(round, scalars["time/train"])
    """

    def register(make: Callable[[], Callback]) -> Callable[[], Callback]:
        CALLBACKS.add(name, make)
        return make

    return register


def make_callback(name: str) -> Callback:
    """The callback of a name in `callbacks`. Raises LorafairError where it cannot be made."""
    make = CALLBACKS[name]
    with of_plugin(f"callbacks: {name}"):
        callback = make()
    if not isinstance(callback, Callback):
        raise LorafairError(f"callbacks: {name} makes {one_line(callback)}, which does not extend lorafair.Callback")
    return callback


class Callbacks:
    """All callbacks of a run."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self._callbacks = callbacks

    def call(self, moment: str, *arguments: object) -> None:
        """Call a method of each. Raises LorafairError naming the one that fails."""
        for callback in self._callbacks:
            with of_plugin(f"callback {type(callback).__name__}.{moment}"):
                getattr(callback, moment)(*arguments)

"""The options of what comes out of a run: accuracy, pictures, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.config.options import option, when_given


@dataclass(frozen=True)
class EvaluationConfig:
    """Top-1 accuracy on the test images of every domain, and metrics of plug-ins."""

    every: int = option(1, "Evaluate after every n rounds, and always after the last one.", at_least=1, identity=False)
    batch_size: int = option(
        128,
        "Images per batch; it affects the last bits of numbers, so it does not depend on the number of processes.",
        at_least=1,
        identity=False,
    )
    average_rounds: int | None = option(
        None,
        """Evaluate and export the mean of the last n rounds' heads or adapters (average_parts) instead of the last one.
        Clients still start from the last one, so training does not change; the n states are kept in checkpoints
        (1).""",
        at_least=1,
    )
    average_parts: Literal["head", "all"] | None = option(
        None,
        """What is averaged over rounds. head: weight and bias of the head. all: also the factors A and B, separately;
        for methods whose factors of different rounds belong to the same frozen weights.""",
        requires=when_given("evaluation.average_rounds"),
        conditional_default="head",
    )
    metrics: tuple[str, ...] = option(
        (),
        "Further metrics: torchmetrics objects registered by plug-ins (lorafair.register_metric).",
        names="METRICS",
        identity=False,
    )


@dataclass(frozen=True)
class TensorBoardConfig:
    """What TensorBoard shows in addition to the curves that every run has."""

    layers: Literal["pictures", "curves"] = option(
        "pictures",
        """pictures: one picture, layer by round, for each metric of the layers. curves: also a curve for each metric
        and layer. metrics.csv has the values in both cases.""",
        identity=False,
    )
    pictures_every: int = option(
        10,
        """Draw the pictures of layers and of clients' losses at most every n rounds, and so rarely that they take at
        most 0.2 % of the time; always after the last round.""",
        at_least=1,
        identity=False,
    )
    histograms: bool = option(
        False, "Histograms of the norms of the rows of A and the columns of B after each round.", identity=False
    )
    samples: int = option(
        6,
        "Training images shown of each client at the start; fewer if there are many clients (0: none).",
        at_least=0,
        at_most=20,
        identity=False,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved."""

    every: int | Literal["auto"] = option(
        "auto",
        """Save after every n rounds, and always after the last one. auto: after every round, but only about once a
        second if rounds are shorter than that.""",
        at_least=1,
        identity=False,
    )
    keep: int = option(
        2,
        "Number of checkpoints kept; at least 2, so that one survives a failure while the other is written.",
        at_least=2,
        reason="one survives while the other is written",
        identity=False,
    )
    seconds: float = option(
        60.0,
        "Within a round, save the clients that are done whenever this much time has passed since the last write.",
        at_least=0,
        identity=False,
    )

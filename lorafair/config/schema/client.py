"""The options of local training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.config.options import option, when, when_not_given


@dataclass(frozen=True)
class ClientConfig:
    """Local training. The optimiser is fresh for every client and round."""

    optimizer: Literal["sgd", "adamw"] = option("sgd", "torch.optim.SGD or torch.optim.AdamW.")
    learning_rate: float = option(0.01, "Learning rate of LoRA factors and head.", above=0)
    momentum: float | None = option(
        None, "Momentum of SGD.", at_least=0, below=1, requires=when("client.optimizer", "sgd"), conditional_default=0.9
    )
    weight_decay: float = option(1e-5, "Weight decay: L2 for sgd, decoupled for adamw.", at_least=0)
    b_learning_rate_ratio: float = option(
        1.0,
        "Ratio of the learning rate of B to that of A and the head (LoRA+, arXiv 2402.12354, proposes 16).",
        above=0,
    )
    schedule: Literal["constant", "linear", "cosine", "exponential"] = option(
        "constant",
        """How the learning rate falls from round to round: linear and cosine reach final_fraction of it after
        schedule_rounds, exponential multiplies it by decay.""",
    )
    schedule_rounds: int | None = option(
        None,
        "Rounds over which the learning rate falls.",
        at_least=1,
        requires=when("client.schedule", "linear", "cosine"),
        conditional_default=lambda config: config.rounds,
        conditional_default_text="rounds",
    )
    final_fraction: float | None = option(
        None,
        "Ratio of the last learning rate to the first.",
        formerly="final_share",
        at_least=0,
        at_most=1,
        requires=when("client.schedule", "linear", "cosine"),
        conditional_default=0.0,
    )
    decay: float | None = option(
        None,
        "Factor by which the learning rate is multiplied after each round.",
        above=0,
        at_most=1,
        requires=when("client.schedule", "exponential"),
        conditional_default=0.99,
    )
    proximal: float = option(
        0.0,
        "FedProx's μ: the local loss gets μ/2·‖w − w_start‖² over factors and head (arXiv 1812.06127).",
        at_least=0,
    )
    scaffold: bool = option(
        False,
        "SCAFFOLD: each client corrects its gradients by control variates (arXiv 1910.06378, option II); requires sgd.",
    )
    clip_norm: float | None = option(
        10.0, "Largest norm of a client's gradient, over all parameters; null: no clipping.", above=0
    )
    epochs: int | None = option(
        None,
        "Passes over a client's images each round.",
        at_least=1,
        requires=when_not_given("client.steps"),
        conditional_default=1,
    )
    steps: int | None = option(None, "Batches that a client trains each round, instead of epochs.", at_least=1)
    seed: int | None = option(
        None, "Seed of the order of images, augmentation and dropout; null: the seed of the run.", at_least=0
    )
    batch_size: int = option(128, "Images per step; a client with fewer uses all of its images.", at_least=1)
    cohort: int | Literal["auto"] = option(
        "auto",
        """Clients trained side by side on one rank, sharing the frozen layers' matrix products. auto: as many as keep
        the device busy, as leave enough cohorts to distribute over ranks (at least 16 per round on a CPU, 8 on a GPU),
        and as fit into the memory of the smallest GPU.""",
        at_least=1,
    )
    timeout_minutes: float | None = option(
        10.0,
        """A client that finishes no step in this time counts as hung, and the run ends with an error that names it. The
        same limit holds for server step, evaluation, report and checkpoint without progress; for loading and tokens it
        is fabric.timeout_minutes. null: no limit for any of them.""",
        above=0,
        identity=False,
    )

"""The options of rounds and server: who takes part, with which weight, and the server's optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.config.options import option, when, when_given

_SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi")


@dataclass(frozen=True)
class FederationConfig:
    """The clients of a round, their weights, and where they start."""

    clients_per_round: int | None = option(
        None,
        """Clients drawn each round, uniformly without replacement (all). With privacy.unit=client every client takes
        part independently of the others, with probability n / clients: n on average.""",
        at_least=1,
    )
    weighting: Literal["size", "uniform", "q", "afl"] = option(
        "size",
        """Aggregation weights. size: by number of training images (as in the paper). uniform: equal (as in its released
        code). q: q-FedAvg (arXiv 1905.10497), number of images times F^q. afl: agnostic federated learning (arXiv
        1902.00146), a mixture that moves towards clients with a high loss F, and is kept in checkpoints. F is the loss
        of a client's first batch of the round, before its first step; each client sends it with its adapter.""",
    )
    weighting_q: float | None = option(
        None,
        "q of q-FedAvg: 0 is size, and the larger it is, the more clients with a high loss count.",
        at_least=0,
        requires=when("federation.weighting", "q"),
        conditional_default=1.0,
    )
    weighting_step: Literal["qfedavg", "full"] | None = option(
        None,
        """How far the server goes. qfedavg: as published, a part of the way to the weighted mean that follows from the
        losses and from how far clients went (L = 1/learning rate, times 1 - momentum). full: all the way, so that q
        changes the weights alone.""",
        requires=when("federation.weighting", "q"),
        conditional_default="qfedavg",
    )
    weighting_rate: float | None = option(
        None,
        "Step size of AFL's projected gradient ascent on the mixture, per nat of loss.",
        above=0,
        requires=when("federation.weighting", "afl"),
        conditional_default=0.1,
    )
    head_weighting: Literal["client", "class"] = option(
        "client",
        """Weights of the mean of the clients' heads. client: those of federation.weighting, for the whole head. class:
        row c of weight and bias is weighted by the clients' numbers of training images of class c, and keeps the value
        that was sent if no client of the round has any. The server then learns these numbers: each client sends one per
        class with its adapter, and the counted bytes include them. The factors A and B keep the weights of
        federation.weighting.""",
    )
    initialization: Literal["average", "fresh", "local"] = option(
        "average",
        """Where a client starts the next round. average: from the server's factors. fresh: the server's update is
        merged into the frozen weights, A is drawn again and B = 0. local: from the client's own last factors.""",
    )
    seed: int | None = option(
        None,
        """Seed of the clients drawn each round, of LoRA ranks drawn for clients, and of the devices of
        federation.profile; null: the seed of the run.""",
        at_least=0,
    )
    profile: str | None = option(
        None,
        """Devices and networks of the clients: a shipped profile (lorafair timeline --list) or a YAML file. In each
        round, clients that are not available in it are not asked; over_selection and deadline_seconds drop those that
        are late in its virtual time (null: no client is late or away).""",
        is_path=True,
        identity=False,
    )
    over_selection: float | None = option(
        None,
        """Ask this many times clients_per_round clients, rounded up, and keep the first clients_per_round of them to
        finish (1).""",
        above=1,
        requires=when_given("federation.profile"),
    )
    deadline_seconds: float | None = option(
        None,
        """Drop clients whose update arrives later than this after they were asked, in virtual time. If all are later,
        the fastest one is kept (null: no deadline).""",
        above=0,
        requires=when_given("federation.profile"),
    )


@dataclass(frozen=True)
class ServerConfig:
    """A server optimiser that takes the method's change of factors and head as its gradient (arXiv 2003.00295).

    Adam and Yogi scale every element of a factor separately, so their step depends on how an update is split into B·A.
    """

    optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = option(
        "none", "Server optimiser. none: clients start from what the method returns."
    )
    learning_rate: float | None = option(
        None,
        "Step size of the server optimiser.",
        above=0,
        requires=when("server.optimizer", *_SERVER_OPTIMIZERS),
        conditional_default=lambda config: 1.0 if config.server.optimizer == "fedavgm" else 0.01,
        conditional_default_text="1 for fedavgm, 0.01 for fedadam and fedyogi",
    )
    momentum: float | None = option(
        None,
        "β1, the momentum of the server optimiser.",
        at_least=0,
        below=1,
        requires=when("server.optimizer", *_SERVER_OPTIMIZERS),
        conditional_default=0.9,
    )
    second_momentum: float | None = option(
        None,
        "β2, the decay of the second moment.",
        at_least=0,
        below=1,
        requires=when("server.optimizer", "fedadam", "fedyogi"),
        conditional_default=0.99,
    )
    adaptivity: float | None = option(
        None,
        "τ, added to the square root of the second moment.",
        above=0,
        requires=when("server.optimizer", "fedadam", "fedyogi"),
        conditional_default=0.001,
    )

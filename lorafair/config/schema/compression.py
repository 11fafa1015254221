"""The options of the codings of what travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.config.options import option, when_any, when_given

_ALL_CODINGS = ("compression.up", "compression.down", "compression.folded", "compression.head")
_SPARSE = ("topk", "randomk")


@dataclass(frozen=True)
class CompressionConfig:
    """Codings of what clients and server send each other, around any method (docs/concepts/compression.md).

    What is coded is a difference: up, a client's way from its start; down, what clients lack. Server and clients go on
    with the decoded numbers, and the bytes are those of the messages.
    """

    up: str | None = option(
        None, "What clients send: their factors, cores and head (null: float32).", names="COMPRESSIONS"
    )
    down: str | None = option(
        None,
        """What the server sends of factors, cores and head (null: float32, or as the method codes it). What is lost is
        added to the next message (error feedback).""",
        names="COMPRESSIONS",
    )
    folded: str | None = option(
        None,
        """Folded parts of a method that folds and has no coding of its own (null: float32). What is lost is not sent
        later.""",
        names="COMPRESSIONS",
    )
    head: str | None = option(
        None,
        """The head, in what compression.up and compression.down code (null: as the factors). It is a small part of the
        numbers, and every one of them counts.""",
        names="COMPRESSIONS",
    )
    fraction: float | None = option(
        None,
        "Fraction of the numbers of every row that is sent.",
        above=0,
        at_most=1,
        requires=when_any(_ALL_CODINGS, *_SPARSE),
        conditional_default=0.125,
    )
    bits: int | None = option(
        None,
        "Bits of a number that topk or randomk sends, with a scale a row (null: float32).",
        at_least=2,
        at_most=16,
        requires=when_any(_ALL_CODINGS, *_SPARSE),
    )
    rate: float | None = option(
        None,
        """Bits of a number that unary sends, the scale of its row included: 32 / rate times less than float32. Rows of
        fewer than about 30 numbers take more.""",
        at_least=1.5,
        at_most=8,
        requires=when_any(_ALL_CODINGS, "unary"),
        conditional_default=1.95,
    )
    rounding: Literal["nearest", "stochastic"] | None = option(
        None,
        """How integers round. stochastic: up or down at random, by seed, round and client, so that the mean is
        exact.""",
        requires=when_any(_ALL_CODINGS, "int8", "int4", "ternary", *_SPARSE),
        conditional_default="nearest",
    )
    client_error_feedback: bool | None = option(
        None,
        """Each client adds to its next update what the coding has lost of the last one. Its state is a number for each
        that it sends: clients × parameters × 4 bytes in every process and checkpoint. With clients_per_round it is what
        was lost when the client last took part.""",
        requires=when_given("compression.up"),
        conditional_default=lambda config: config.federation.clients_per_round is None,
        conditional_default_text="true without federation.clients_per_round",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The codings that are named, each once."""
        return tuple(dict.fromkeys(name for name in (self.up, self.down, self.folded, self.head) if name is not None))

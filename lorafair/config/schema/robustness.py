"""The options of clients that lie, and of what the server does about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafair.config.options import option, when, when_given


@dataclass(frozen=True)
class AttackConfig:
    """Clients that lie, to test a defence. Who lies follows from federation.seed."""

    name: Literal["sign_flip", "scaled_update", "label_flip", "backdoor"] | None = option(
        None,
        """What they do. sign_flip: they send their update with the opposite sign. scaled_update: they send it many
        times as long. label_flip: they train with class c called Q − 1 − c. backdoor: some of their images get a white
        square in a corner and the label attack.target; how often test images with the square are taken for it is
        recorded (null: nobody lies).""",
    )
    share: float | None = option(
        None,
        "Share of the clients that lie.",
        above=0,
        below=1,
        requires=when_given("attack.name"),
        conditional_default=0.2,
    )
    strength: float | None = option(
        None,
        "How many times as long as the trained update the sent one is.",
        above=0,
        requires=when("attack.name", "sign_flip", "scaled_update"),
        conditional_default=lambda config: 1.0 if config.attack.name == "sign_flip" else 10.0,
        conditional_default_text="1 for sign_flip, 10 for scaled_update",
    )
    target: int | None = option(
        None,
        "The class, from 0, that the backdoor's images are called.",
        at_least=0,
        requires=when("attack.name", "backdoor"),
        conditional_default=0,
    )
    poisoned_images: float | None = option(
        None,
        "Share of an attacker's images that get the square.",
        above=0,
        at_most=1,
        requires=when("attack.name", "backdoor"),
        conditional_default=0.5,
    )


@dataclass(frozen=True)
class DefenceConfig:
    """Robust aggregation: what the server does about updates that do not look like the others.

    Updates are compared as changes of the weights, s·(B_k A_k − B_0 A_0) and the head together, whatever basis the
    factors have. What is kept goes to the method, so that every method without parts that clients keep can be defended.
    """

    name: str | None = option(
        None,
        """krum: the update nearest to its neighbours. multi_krum: the K − f nearest. geometric_median: weights that
        make the mean the geometric median. trimmed_mean: without the f updates farthest from the geometric median.
        median: the one nearest to all others. norm_bounding: long updates are shortened. entry_trimmed_mean and
        entry_median: of every number of the factors by itself, as published for whole models (null: none).""",
        names="DEFENCES",
    )
    share: float | None = option(
        None,
        "Share of the clients of a round that may lie: f is this share of K, rounded up, and below K/2.",
        above=0,
        below=0.5,
        requires=when_given("defence.name"),
        conditional_default=0.2,
    )
    norm_bound: float | None = option(
        None,
        "Longest update, as the norm of the change of all weights; null: the median of the round's norms.",
        above=0,
        requires=when("defence.name", "norm_bounding"),
    )

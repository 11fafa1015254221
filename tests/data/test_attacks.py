"""What clients that lie do to labels, images and updates, and that the others keep their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorafair.config import AttackConfig
from lorafair.data.attacks import Attack, backdoor_success, make_attack, with_square
from lorafair.data.loading import CohortStep
from lorafair.data.partition import Client
from lorafair.errors import ConfigError

CLIENTS = tuple(Client(f"client-{k}", None, np.arange(20 * k, 20 * k + 20)) for k in range(10))


def attack_of(name: str, **options: float) -> Attack:
    made = make_attack(AttackConfig(name=name, **{"share": 0.2, **options}), CLIENTS, 200, 4, seed=1)  # type: ignore[arg-type]
    assert made is not None
    return made


def test_who_lies_follows_from_the_seed_alone() -> None:
    attackers = attack_of("sign_flip", strength=1.0).attackers
    assert len(attackers) == 2
    assert attackers == attack_of("label_flip").attackers
    others = make_attack(AttackConfig(name="label_flip", share=0.2), CLIENTS, 200, 4, seed=2)
    assert others is not None
    assert others.attackers != attackers
    assert make_attack(AttackConfig(), CLIENTS, 200, 4, seed=1) is None


@pytest.mark.parametrize(("name", "strength", "factor"), [("sign_flip", 1.0, -1.0), ("scaled_update", 10.0, 10.0)])
def test_updates_of_attackers_alone_change(name: str, strength: float, factor: float) -> None:
    attack = attack_of(name, strength=strength)
    start, rows = torch.randn(10, 7), torch.randn(10, 7)
    sent = attack.update(0, range(10), start, rows)
    for client in range(10):
        expected = start + factor * (rows - start) if client in attack.attackers else rows
        assert torch.equal(sent[client], expected[client])


def test_flipped_labels_are_those_of_attackers() -> None:
    attack, labels = attack_of("label_flip"), torch.arange(200) % 4
    flipped = attack.labels(labels, 4)
    for client, images in enumerate(CLIENTS):
        own = torch.from_numpy(images.indices)
        assert torch.equal(flipped[own], 3 - labels[own] if client in attack.attackers else labels[own])


def test_a_backdoor_marks_a_share_of_the_attackers_images_and_calls_them_the_target() -> None:
    attack, labels = attack_of("backdoor", target=2, poisoned_images=0.5), torch.arange(200) % 4
    marked = attack.poisoned.nonzero().flatten()
    assert {int(image) // 20 for image in marked} == set(attack.attackers)
    assert 10 <= len(marked) <= 30  # of 40
    poisoned = attack.labels(labels, 4)
    assert (poisoned[marked] == 2).all()
    assert torch.equal(poisoned[~attack.poisoned], labels[~attack.poisoned])
    images = torch.zeros(200, 3, 12, 12, dtype=torch.uint8)
    step = CohortStep(np.arange(200).reshape(10, 20), (20,) * 10)
    (stamped,) = attack.stamped([images], [step])
    assert torch.equal(stamped.amax((1, 2, 3)) == 255, attack.poisoned)
    assert torch.equal(stamped[marked[0]], with_square(images[:1])[0])


def test_the_square_is_in_the_corner_and_success_counts_other_classes() -> None:
    marked = with_square(torch.zeros(1, 3, 12, 12, dtype=torch.uint8))
    assert (marked[..., -2:, -2:] == 255).all()
    assert marked.to(torch.int64).sum() == 255 * 3 * 4
    confusion = torch.tensor([[[5, 3], [1, 9]], [[2, 2], [4, 4]]])  # two domains
    assert backdoor_success(confusion, 0) == (1 + 4) / (1 + 9 + 4 + 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "label_flip", "share": 0.01}, r"attack.share=0.01 of 10 clients is 0; .* attack.name=null"),
        ({"name": "label_flip", "share": 0.99}, r"attack.share=0.99 of 10 clients is 10"),
        ({"name": "backdoor", "share": 0.2, "target": 4}, r"attack.target=4 is no class; there are 0 to 3"),
    ],
)
def test_attacks_that_are_not_possible(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(AttackConfig(**options), CLIENTS, 200, 4, seed=1)  # type: ignore[arg-type]

"""Operations of local training, against a count by hand."""

from __future__ import annotations

from lorafair.config.loading import load_config
from lorafair.model.work import flop_per_image

SMALL = ("model.name=test_vit", "model.weights=random", "model.image_size=32", "model.lora.rank=4")


def by_hand(blocks: int, adapted: int, rank: int = 4, classes: int = 10) -> int:
    """Of timm's test_vit at 32 pixels with adapters on attn.proj and mlp.fc2 of its last blocks."""
    tokens, width, hidden, patches = 5, 64, 192, 4
    patch = 2 * patches * 3 * 16 * 16 * width
    linear = 2 * tokens * (width * 3 * width + width * width + 2 * width * hidden)
    attention = 2 * 2 * tokens * tokens * width
    adapters = 2 * tokens * rank * (2 * width + width + hidden)
    head = 2 * width * classes
    forward = patch + blocks * (linear + attention) + adapted * adapters + head
    # Each product with frozen weights has one gradient, each of the attention and of the factors has two. In the first
    # adapted block nothing below attn.proj has any, nor has the input of its A.
    qkv = 2 * tokens * width * 3 * width
    proj = 2 * tokens * width * width
    backward = adapted * (linear + 2 * attention + 2 * adapters) + 2 * head
    return forward + backward - qkv - 2 * attention - proj - 2 * tokens * rank * width


def test_frozen_weights_have_no_gradients_and_nothing_below_the_first_adapter_has() -> None:
    for adapted in (2, 6):
        config = load_config(*SMALL, f"model.lora.last_blocks={adapted}")
        assert flop_per_image(config.model, 10) == by_hand(6, adapted)


def test_it_does_not_depend_on_how_the_run_saves_memory_or_draws() -> None:
    pairs = ("model.gradient_checkpointing=true", "model.seed=3")
    config = load_config(*SMALL, *pairs, "model.lora.last_blocks=1")
    assert flop_per_image(config.model, 10) == by_hand(6, 1)

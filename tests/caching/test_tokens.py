"""Cached tokens: the same as computed anew, found again, bounded, and the same training."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lorafair.caching.tokens import TokenSource, cached_tokens, reason_against_cache, token_file
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.cluster.signals import Interrupted, handling_signals
from lorafair.config.schema import Config, LoRAConfig, ModelConfig
from lorafair.data.loading import Indices
from lorafair.errors import ConfigError
from lorafair.federation import run_federation
from lorafair.files.cache import cache_dir
from lorafair.model.backbone import build_model
from lorafair.seeding import seeded
from tests.conftest import launched, run_ranks

FLIPPED = "data.augmentation=flip changes the images in every pass"
CONFIG = ModelConfig(name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=2, last_blocks=2))
IMAGES = torch.randint(0, 256, (150, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "images"))


class Source:
    def __init__(self) -> None:
        self.read = 0

    def batches(self, indices: list[Indices]) -> Any:
        for batch in indices:
            self.read += len(batch)
            yield IMAGES[batch]


def cached_by(fabric: Any, source: Source, key: str) -> TokenSource:
    model = build_model(CONFIG, 4, 0).attach("cpu")
    return cached_tokens(fabric, model, source, token_file(fabric, model, CONFIG, len(IMAGES), key))


def tokens(fabric: Any, key: str) -> tuple[np.ndarray, int]:
    source = Source()
    cached = cached_by(fabric, source, key)
    [found] = list(cached.batches([np.arange(len(IMAGES))]))
    return found.numpy(), source.read


def test_tokens_are_computed_once_and_are_those_of_the_images() -> None:
    model = build_model(CONFIG, 4, 0).attach("cpu")
    first, read = tokens(launched(1), "once")
    assert read == len(IMAGES)
    again, read = tokens(launched(1), "once")
    assert read == 0
    assert np.array_equal(first, again)
    with torch.inference_mode():
        np.testing.assert_allclose(first, model.embed(IMAGES).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_tokens_in_half_the_bits_are_those_rounded(tiny: Callable[..., Config]) -> None:
    fabric, model = launched(1), build_model(CONFIG, 4, 0).attach("cpu")
    kept = token_file(fabric, model, replace(CONFIG, prefix_cache_dtype="bfloat16"), len(IMAGES), "half")
    whole = token_file(fabric, model, CONFIG, len(IMAGES), "half")
    assert kept.bytes == whole.bytes / 2
    [half], [exact] = (
        list(cached_tokens(fabric, model, Source(), array).batches([np.arange(len(IMAGES))])) for array in (kept, whole)
    )
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())
    with torch.inference_mode():
        torch.testing.assert_close(model(half), model(exact), rtol=0.05, atol=0.05)
    run_federation(fabric, tiny("model.prefix_cache_dtype=bfloat16", "rounds=1", "data.resident=true"))


@pytest.mark.slow
def test_ranks_share_the_work_and_get_the_same_bits() -> None:
    [(alone, _)] = run_ranks(1, tokens, "alone")
    shared = run_ranks(2, tokens, "shared")
    assert sorted(read for _, read in shared) == [64, 86]  # of 150 images in batches of 64
    for found, _ in shared:
        assert np.array_equal(found, alone)


@pytest.mark.slow
def test_tokens_unused_for_a_month_are_removed() -> None:
    folder = cache_dir() / "tokens"
    before = set(folder.iterdir()) if folder.is_dir() else set()
    tokens(launched(1), "old")
    [old] = set(folder.iterdir()) - before
    os.utime(old, times=(0, time.time() - 29 * 86400))
    tokens(launched(1), "second")
    assert old.exists()
    assert tokens(launched(1), "old") == (pytest.approx(np.load(old)), 0)  # used: starts its month again
    assert time.time() - old.stat().st_mtime < 86400
    os.utime(old, times=(0, time.time() - 31 * 86400))
    tokens(launched(1), "third")
    assert not old.exists()


def test_two_runs_compute_the_same_tokens_at_once() -> None:
    """As two tasks of a job array on one node do: neither disturbs the other."""

    class Meanwhile(Source):
        def batches(self, indices: list[Indices]) -> Any:
            for number, batch in enumerate(super().batches(indices)):
                if number == 1:
                    self.other = tokens(launched(1), "at once")
                yield batch

    source = Meanwhile()
    cached = cached_by(launched(1), source, "at once")
    [found] = list(cached.batches([np.arange(len(IMAGES))]))
    assert (source.read, source.other[1]) == (150, 150)
    assert np.array_equal(found.numpy(), source.other[0])
    assert not list((cache_dir() / "tokens").glob("*.partial*"))


def reason(config: ModelConfig, images: int = 10) -> str:
    return reason_against_cache(config, build_model(config, 4, 0).attach("cpu"), images)


def test_when_tokens_are_not_cached() -> None:
    assert reason(CONFIG) == ""
    assert reason(replace(CONFIG, prefix_cache="never")) == "model.prefix_cache=never"
    assert "no block lies below the first adapter" in reason(replace(CONFIG, lora=LoRAConfig(rank=2)))
    assert "it needs 1.3 GB and model.prefix_cache_gb=1" in reason(replace(CONFIG, prefix_cache_gb=1), images=10**6)
    model = build_model(CONFIG, 4, 0).attach("cpu")
    assert "data.augmentation=flip changes" in reason_against_cache(CONFIG, model, 10, FLIPPED)
    with pytest.raises(ConfigError, match=r"prefix_cache=always is not possible: data\.augmentation=flip changes"):
        reason_against_cache(replace(CONFIG, prefix_cache="always"), model, 10, FLIPPED)
    with pytest.raises(ConfigError, match=r"model\.prefix_cache=always is not possible: no block"):
        reason(replace(CONFIG, prefix_cache="always", lora=LoRAConfig(rank=2)))


@pytest.mark.slow
def test_training_is_the_same_with_and_without(tiny: Callable[..., Config], tmp_path: Any) -> None:
    adapters = []
    for choice in ("always", "never"):
        config = tiny(f"model.prefix_cache={choice}", f"run_dir={tmp_path / choice}")
        run_federation(launched(1), config)
        adapters.append(load_checkpoint(list_checkpoints(config.folder)[-1]).tensors["adapter"])
    torch.testing.assert_close(adapters[0], adapters[1], rtol=1e-3, atol=1e-4)


def test_an_interrupted_computation_leaves_nothing_that_looks_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafair.caching.tokens.EMBED_BATCH", 50)

    class Failing(Source):
        def batches(self, indices: list[Indices]) -> Any:
            yield from list(super().batches(indices))[:1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_by(launched(1), Failing(), "interrupted")
    _, read = tokens(launched(1), "interrupted")
    assert read == len(IMAGES)


def stopped(fabric: Any, key: str) -> str:
    class Signalled(Source):
        def batches(self, indices: list[Indices]) -> Any:
            for number, batch in enumerate(super().batches(indices)):
                if number == 0 and fabric.global_rank == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                yield batch

    with handling_signals():
        try:
            cached_by(fabric, Signalled(), key)
        except Interrupted as stop:
            return str(stop)
    return "done"


@pytest.mark.slow
def test_a_signal_stops_all_ranks_and_leaves_no_half_file() -> None:
    folder = cache_dir() / "tokens"
    before = set(folder.iterdir()) if folder.is_dir() else set()
    for end in run_ranks(2, stopped, "stopped"):
        assert end.startswith("stopped by SIGUSR1 before the first round, while computing tokens: that begins anew")
    assert set(folder.iterdir()) == before
    assert sum(read for _, read in run_ranks(2, tokens, "stopped")) == len(IMAGES)

"""Decoded images in a file: the pixels of direct decoding, made once, checked whenever a run begins to use them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorafair.caching.images import cached_images
from lorafair.caching.shared_array import SharedArray
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.config.schema import Config, DataConfig
from lorafair.data.files import ImageFiles
from lorafair.data.images import ImageData, ImagesInMemory
from lorafair.data.sources import load_images
from lorafair.errors import LorafairError
from lorafair.federation import run_federation
from lorafair.files.cache import cache_dir
from lorafair.seeding import seeded_numpy
from tests.conftest import launched, run_ranks

SIZE = 32


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """2 domains of 2 classes of 40 JPEGs whose sides differ."""
    rng = seeded_numpy(0, "pictures")
    for domain in ("photo", "sketch"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / domain / name
            folder.mkdir(parents=True)
            for number in range(40):
                pixels = rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
    return tmp_path / "pictures"


def config_of(pictures: Path, **options: Any) -> DataConfig:
    return DataConfig(source="folder", root=pictures, **{"test_fraction": 0.2, **options})


def pack(fabric: Any, config: DataConfig, seed: int = 0, read_once: bool = False) -> ImageData:
    return cached_images(fabric, config, load_images(config, seed), SIZE, read_once=read_once)


def pixels(data: ImageData) -> np.ndarray:
    return np.concatenate([s.images.read_many(np.arange(len(s)), SIZE) for s in (data.train, data.test)])


def files() -> list[Path]:
    return sorted((cache_dir() / "images").glob("*"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decoded: list[int] = []
    read = ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda self, i, size: (decoded.append(i), read(self, i, size))[1])
    return decoded


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pixels_are_those_of_direct_decoding(pictures: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = load_images(config_of(pictures), 0)
    data = pack(launched(1), config_of(pictures, workers=workers))
    assert len(files()) == 1
    decoded = count_decoded(monkeypatch)
    assert np.array_equal(pixels(pack(launched(1), config_of(pictures, workers=workers))), pixels(data))
    assert decoded == []
    expected = np.stack([s.images.read(i, SIZE) for s in (direct.train, direct.test) for i in range(len(s))])
    assert np.array_equal(pixels(data), expected)
    assert (data.fingerprint, len(data.train)) == (direct.fingerprint, 128)


def ranks_pack(fabric: Any, config: DataConfig, cache: str) -> tuple[np.ndarray, int]:
    os.environ["XDG_CACHE_HOME"] = cache
    decoded: list[int] = []
    read = ImageFiles.read
    ImageFiles.read = lambda self, i, size: (decoded.append(i), read(self, i, size))[1]  # type: ignore[method-assign]
    data = pack(fabric, config)
    return pixels(data), len(decoded)


@pytest.mark.slow
def test_ranks_of_a_node_share_the_work(pictures: Path) -> None:
    results = run_ranks(2, ranks_pack, config_of(pictures), os.environ["XDG_CACHE_HOME"])
    assert sorted(count for _, count in results) == [64, 96]  # of 160 in parts of 64
    direct = pixels(load_images(config_of(pictures), 0))
    assert all(np.array_equal(found, direct) for found, _ in results)


@pytest.mark.slow
def test_runs_that_split_alike_images_differently_share_a_file(pictures: Path) -> None:
    for options, count in (({"seed": 0}, 1), ({"seed": 1}, 1), ({"test_fraction": 0.4}, 1), ({"train_images": 9}, 2)):
        seed = options.pop("seed", 0)
        data = pack(launched(1), config_of(pictures, **options), int(seed))
        assert np.array_equal(pixels(data), pixels(load_images(config_of(pictures, **options), int(seed))))
        assert len(files()) == count


def test_a_file_changed_in_place_is_decoded_again(pictures: Path) -> None:
    pack(launched(1), config_of(pictures))
    file = pictures / "photo" / "cat" / "0.jpg"
    content, other = file.read_bytes(), (pictures / "photo" / "dog" / "1.jpg").read_bytes()
    size = max(len(content), len(other))
    file.write_bytes(other.ljust(size, b"\0"))
    os.utime(file, ns=(0, 10**18))
    assert np.array_equal(pixels(pack(launched(1), config_of(pictures))), pixels(load_images(config_of(pictures), 0)))
    os.utime(file, ns=(0, 2 * 10**18))  # the same size
    before = len(files())
    pack(launched(1), config_of(pictures))
    assert len(files()) == before + 1


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "one bit": flip_byte,
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1000),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 1),
    "empty": lambda file: os.truncate(file, 0),
    "another shape": lambda file: np.save(file, np.zeros((3, 4), np.uint8)),
    "another type": lambda file: np.save(file, np.zeros((160, SIZE, SIZE, 3), np.int8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_made_again(
    pictures: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(launched(1), config_of(pictures))
    [file] = files()
    DAMAGES[damage](file)
    data = pack(launched(1), config_of(pictures))
    assert f"warning: {file} is damaged (" in capsys.readouterr().out
    assert np.array_equal(pixels(data), pixels(load_images(config_of(pictures), 0)))
    pack(launched(1), config_of(pictures))
    assert "damaged" not in capsys.readouterr().out
    assert files() == [file]


@pytest.mark.slow
def test_two_ranks_agree_on_a_damage_that_one_of_them_sees(pictures: Path) -> None:
    run_ranks(2, ranks_pack, config_of(pictures), os.environ["XDG_CACHE_HOME"])
    flip_byte(files()[0])
    direct = pixels(load_images(config_of(pictures), 0))
    results = run_ranks(2, ranks_pack, config_of(pictures), os.environ["XDG_CACHE_HOME"])
    assert all(np.array_equal(found, direct) for found, _ in results)


def test_a_failed_making_leaves_nothing(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SharedArray, file: Path) -> None:
        file.touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SharedArray, "create", fail)
        with pytest.raises(KeyboardInterrupt):
            pack(launched(1), config_of(pictures))
    assert files() == []


def test_a_full_disk_is_found_before_decoding(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", full)
    decoded = count_decoded(monkeypatch)
    with pytest.raises(LorafairError, match=r"images has no room for 0\.0 GB \(Disk quota exceeded\); make room, set"):
        pack(launched(1), config_of(pictures))
    assert (decoded, files()) == ([], [])


def test_when_images_are_kept(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, read_once in (({"cache": "never"}, False), ({}, True), ({"cache_gb": 1e-6}, False)):
        pack(launched(1), config_of(pictures, **options), read_once=read_once)
        assert files() == []
    assert "decoded images are not cached: it needs 0.0 GB and data.cache_gb=1e-06" in capsys.readouterr().out
    with pytest.raises(LorafairError, match=r"data\.cache=always is not possible: it needs .* data\.cache_gb=1e-06"):
        pack(launched(1), config_of(pictures, cache="always", cache_gb=1e-6))
    made_up = DataConfig(source="synthetic")
    for options, count in (({}, 0), ({"cache": "always"}, 0)):  # already an array of that side
        pack(launched(1), DataConfig(source="synthetic", **options))  # type: ignore[arg-type]
        assert len(files()) == count
    data = load_images(made_up, 0)
    enlarged = cached_images(launched(1), DataConfig(source="synthetic", cache="always"), data, 40, read_once=True)
    assert len(files()) == 1
    assert np.array_equal(enlarged.test.images.read(3, 40), data.test.images.read(3, 40))


def test_images_of_the_wanted_side_are_taken_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(4 * 8 * 8 * 3, dtype=np.uint32).astype(np.uint8).reshape(4, 8, 8, 3)
    monkeypatch.setattr(Image, "fromarray", None)
    found = ImagesInMemory(array).read_many(np.array([3, 0]), 8)
    assert np.array_equal(found, array[[3, 0]])
    found[:] = 0  # the batch is the caller's
    assert array[3].any()


@pytest.mark.slow
def test_training_is_the_same_with_and_without(tiny: Callable[..., Config], pictures: Path, tmp_path: Path) -> None:
    adapters = []
    for choice in ("always", "never"):
        source = ("data.source=folder", f"data.root={pictures}", f"data.cache={choice}", "model.prefix_cache=never")
        config = tiny(*source, f"run_dir={tmp_path / choice}", "rounds=1")
        run_federation(launched(1), config)
        adapters.append(load_checkpoint(list_checkpoints(config.folder)[-1]).tensors["adapter"])
    assert torch.equal(adapters[0], adapters[1])


@pytest.mark.slow
def test_nothing_is_decoded_where_tokens_are_known(
    tiny: Callable[..., Config], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ("data.source=folder", f"data.root={pictures}", "rounds=1", "tensorboard.samples=0")
    run_federation(launched(1), tiny(*source, "data.cache=auto"))
    assert files() == []
    decoded = count_decoded(monkeypatch)
    run_federation(launched(1), tiny(*source, "data.cache=always", f"run_dir={tmp_path / 'again'}"))
    assert (files(), decoded) == ([], [])

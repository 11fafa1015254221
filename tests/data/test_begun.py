"""A run goes on after an image that was found to be damaged in some round is repaired or left out."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from lorafair.config.schema import Config, DataConfig
from lorafair.data.begun import DAMAGED, RECORD, Begun, images_begun_with, noting_damage, record_images
from lorafair.data.images import DataError, ImageData, Split
from lorafair.data.partition import Client
from lorafair.data.sources import load_images
from lorafair.errors import LorafairError
from lorafair.federation import run_federation
from lorafair.launch import make_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BROKEN = "photo/cat/3.png"


def save_image(file: Path, seed: int, side: int = 24) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = bytes(60)
    file.write_bytes(content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """2 domains of 2 classes of 6 images, one of which is damaged in its middle."""
    for i, name in enumerate(f"{d}/{c}/{n}.png" for d in ("photo", "art") for c in ("cat", "dog") for n in range(6)):
        save_image(tmp_path / "data" / name, seed=i)
    damage(tmp_path / "data" / BROKEN)
    return tmp_path / "data"


def config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(source="folder", root=root, test_fraction=0.3, **options)


def begin(root: Path, run_dir: Path, **options: Any) -> ImageData:
    """Load the images, record them and decode all, as a run does."""
    data = noting_damage(load_images(config(root, **options), 0), run_dir)
    record_images(run_dir, data, data.fingerprint, config(root, **options), 0, origin=None)
    for split in (data.train, data.test):
        for i in range(len(split)):
            with contextlib.suppress(DataError):
                split.images.read(i, 8)
    return data


def names(split: Split) -> list[str]:
    return [split.images.images.path(i).name for i in split.images.indices]  # type: ignore[attr-defined]


def clients_of(data: ImageData) -> list[Client]:
    return [Client(name, d, np.flatnonzero(data.train.domains == d)) for d, name in enumerate(data.domains)]


def continued(root: Path, run_dir: Path, **options: Any) -> Begun:
    begun = images_begun_with(run_dir, config(root, **options), 0)
    assert begun is not None
    return begun


def test_nothing_is_different_where_no_image_is_damaged(root: Path, tmp_path: Path) -> None:
    save_image(root / BROKEN, seed=99)
    begin(root, tmp_path)
    assert (tmp_path / RECORD).is_file()
    assert not (tmp_path / DAMAGED).exists()
    assert images_begun_with(tmp_path, config(root), 0) is None


def test_a_repaired_image_is_read_and_leaves_the_identity(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = begin(root, tmp_path)
    save_image(root / BROKEN, seed=99, side=30)  # another size of the file
    assert load_images(config(root), 0).fingerprint != before.fingerprint
    begun = continued(root, tmp_path)
    assert begun.data.fingerprint == before.fingerprint
    assert f"the run goes on with 1 image as repaired: {BROKEN}" in capsys.readouterr().out
    data, clients = begun.without_gone(clients_of(begun.data))
    assert data.fingerprint != before.fingerprint, "tokens of other pixels are not taken"
    assert names(data.train) == names(before.train)
    assert sum(len(client.indices) for client in clients) == len(before.train)
    data.train.images.read_many(np.arange(len(data.train)), 8)


def test_an_image_that_is_left_out_leaves_all_others_where_they_are(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = begin(root, tmp_path)
    (root / BROKEN).unlink()
    begun = continued(root, tmp_path)
    assert begun.data.fingerprint == before.fingerprint
    assert f"the run goes on without 1 damaged image, left out: {BROKEN}" in capsys.readouterr().out
    data, clients = begun.without_gone(clients_of(begun.data))

    def paths(data: ImageData, split: Split) -> list[tuple[str, int, int]]:
        return list(zip(names(split), split.labels.tolist(), split.domains.tolist(), strict=True))

    lost = ("3.png", 0, data.domains.index("photo"))
    for split, expected in ((data.train, before.train), (data.test, before.test)):
        assert paths(data, split) == [row for row in paths(before, expected) if row != lost]
    assert len(data.train) + len(data.test) == 23
    for d, client in enumerate(clients):
        assert (data.train.domains[client.indices] == d).all()
    assert sorted(np.concatenate([client.indices for client in clients])) == list(range(len(data.train)))


def test_an_image_that_is_resized_without_a_filter_is_repaired_alike(root: Path, tmp_path: Path) -> None:
    before = begin(root, tmp_path, antialias=False)
    assert (tmp_path / DAMAGED).read_text().splitlines() == [BROKEN]
    save_image(root / BROKEN, seed=99, side=30)
    data, _ = continued(root, tmp_path, antialias=False).without_gone(clients_of(before))
    now = load_images(config(root, antialias=False), 0)
    for mine, expected in ((data.train, now.train), (data.test, now.test)):
        indices = np.arange(len(expected))
        np.testing.assert_array_equal(mine.images.read_many(indices, 8), expected.images.read_many(indices, 8))


def test_any_other_change_is_still_one(root: Path, tmp_path: Path) -> None:
    begin(root, tmp_path)
    (root / BROKEN).unlink()
    save_image(root / "art/dog/1.png", seed=5, side=30)
    assert images_begun_with(tmp_path, config(root), 0) is None


@pytest.mark.parametrize("option", [{"train_images": 4}, {"antialias": False}, {"domains": ("art",)}])
def test_the_options_of_the_continued_run_choose_its_images(root: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    before = begin(root, tmp_path)
    assert images_begun_with(tmp_path, config(root, **option), 0) is None
    assert images_begun_with(tmp_path, config(root), 1) is None, "the split is drawn with the seed"
    save_image(root / BROKEN, seed=99)
    now = load_images(config(root, **option), 0)
    assert now.fingerprint != before.fingerprint
    record_images(tmp_path, now, now.fingerprint, config(root, **option), 0, origin=tmp_path)
    assert continued(root, tmp_path, **option).data.fingerprint == now.fingerprint, "accepted: the record follows"


def test_a_folder_that_moved_and_another_augmentation_are_no_other_images(root: Path, tmp_path: Path) -> None:
    before = begin(root, tmp_path)
    (moved := root.rename(tmp_path / "elsewhere") / BROKEN).unlink()
    begun = continued(moved.parents[2], tmp_path, augmentation="flip", workers=2)
    assert begun.data.fingerprint == before.fingerprint


def test_a_client_without_images_is_named(root: Path, tmp_path: Path) -> None:
    begin(root, tmp_path)
    (root / BROKEN).unlink()
    begun = continued(root, tmp_path)
    gone = np.flatnonzero(~begun.train_there)
    test_gone = np.flatnonzero(~begun.test_there)
    assert len(gone) + len(test_gone) == 1
    alone = Client("alone", 0, gone[:0])
    with pytest.raises(DataError, match=r"there is none left for alone; repair them"):
        begun.without_gone([alone])


def test_a_run_that_begins_anew_forgets_and_one_that_continues_another_takes_over(root: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    data = begin(root, tmp_path)
    assert (tmp_path / DAMAGED).read_text().splitlines() == [BROKEN]
    record_images(run, data, data.fingerprint, config(root), 0, origin=tmp_path)
    assert (run / DAMAGED).read_text().splitlines() == [BROKEN]
    record_images(run, data, data.fingerprint, config(root), 0, origin=None)
    assert not (run / DAMAGED).exists()
    (other / "x").mkdir(parents=True)
    (other / RECORD).write_bytes(b"PK\3\4 cut")
    (other / DAMAGED).write_text(f"{BROKEN}\n")
    assert images_begun_with(other, config(root), 0) is None, "a damaged record is not used"


def options_of(root: Path) -> list[str]:
    """A test image is damaged, and the first evaluation comes with round 3."""
    return [
        "data.source=folder", f"data.root={root}", "data.cache=never", "model.prefix_cache=never", "rounds=4",
        "client.batch_size=2", "client.steps=1", "evaluation.every=3", "data.test_fraction=0.3",
    ]  # fmt: skip


def ended_by_broken(settings: Config) -> Fabric:
    """A run that has ended with the damaged image; returns the Fabric to continue with."""
    fabric = make_fabric(settings.fabric)
    fabric.launch()
    with pytest.raises(LorafairError, match=rf"{BROKEN} cannot be decoded"):
        run_federation(fabric, settings)
    return fabric


@pytest.mark.slow
@pytest.mark.parametrize("mend", ["repaired", "left out"])
def test_the_same_command_continues(
    tiny: Callable[..., Config], root: Path, mend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(*options_of(root))
    fabric = ended_by_broken(settings)
    saved = {path.name for path in (settings.folder / "checkpoints").iterdir()}
    assert "round_000002" in saved
    (root / BROKEN).unlink()
    if mend == "repaired":
        save_image(root / BROKEN, seed=99, side=30)
    run_federation(fabric, settings)
    assert json.loads((settings.folder / "result.json").read_text())["rounds"] == 4
    assert "continuing after round 2 of 4" in capsys.readouterr().out
    (root / BROKEN).unlink(missing_ok=True)
    run_federation(fabric, settings)
    assert "this run was finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_whose_checkpoints_were_damaged_keeps_what_is_known_of_its_images(
    tiny: Callable[..., Config], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(*options_of(root))
    fabric = ended_by_broken(settings)
    (root / BROKEN).unlink()
    for path in (settings.folder / "checkpoints").glob("*_0*"):
        if path.name.startswith("unfinished"):
            shutil.rmtree(path)
        else:
            (path / "state.json").write_text("{")
    run_federation(fabric, tiny(*options_of(root), "rounds=2"))
    assert "starting anew" in capsys.readouterr().out
    run_federation(fabric, settings)
    assert "continuing after round 2 of 4" in capsys.readouterr().out


@pytest.mark.slow
def test_another_option_of_the_images_is_refused_or_accepted_and_used(
    tiny: Callable[..., Config], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(root)
    settings = tiny(*options)
    fabric = ended_by_broken(settings)
    save_image(root / BROKEN, seed=99, side=30)
    options += ["data.train_images=4"]
    with pytest.raises(LorafairError, match=r"data\.train_images is None there and 4 here; images is"):
        run_federation(fabric, tiny(*options))
    capsys.readouterr()
    run_federation(fabric, tiny(*options, "accept=[data.train_images,images]"))
    said = capsys.readouterr().out
    assert "8 for training" in said
    assert "continuing after round 2 of 4" in said

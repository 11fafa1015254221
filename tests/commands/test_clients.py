"""`lorafair.count_labels`: who would have which images, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import lorafair
from lorafair.errors import LorafairError
from tests.conftest import TINY

SKEWED = (
    "data.train_images=40",
    "partition.scheme=dirichlet",
    "partition.clients_per_domain=2",
    "partition.min_images=1",
)


def test_every_image_is_counted_once_at_one_client() -> None:
    counts = lorafair.count_labels(TINY, *SKEWED)
    assert list(counts) == [f"{domain}-{k}" for domain in ("plain", "noisy", "inverted") for k in (0, 1)]
    classes = list(counts["plain-0"])
    assert len(classes) == 4
    for domain in ("plain", "noisy", "inverted"):
        for name in classes:
            assert sum(counts[f"{domain}-{k}"][name] for k in (0, 1)) == 10
    assert counts["plain-0"] != counts["noisy-0"], "the labels are skewed, each domain in its own way"
    assert counts != lorafair.count_labels(TINY, *SKEWED, "partition.seed=1")


def test_they_are_the_clients_that_a_run_has(tmp_path: Path) -> None:
    counts = lorafair.count_labels(TINY, SKEWED, seed=3)
    result = lorafair.run(TINY, SKEWED, seed=3, rounds=1, run_dir=tmp_path / "run")
    losses = [name.removeprefix("train/loss/") for name in result.metrics if name.startswith("train/loss/")]
    assert losses == list(counts)


def test_what_is_strange_about_the_images_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for domain, kind in (("day", "cat"), ("day", "dog"), ("night", "cat"), ("night", "dog"), ("night", "owl")):
        folder = tmp_path / domain / kind
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number, len(domain), len(kind))).save(folder / f"{kind}{number}.png")
    (tmp_path / "day" / "cat" / "notes.txt").write_text("")
    counts = lorafair.count_labels("data.source=folder", f"data.root={tmp_path}", TINY[1:])
    assert counts == {"day": {"cat": 4, "dog": 4, "owl": 0}, "night": {"cat": 4, "dog": 4, "owl": 4}}
    printed = capsys.readouterr().out
    assert "warning: 1 file left out, whose endings are not read (1 .txt)" in printed
    assert "warning: 1 class in one domain alone: owl (night)" in printed
    assert "2 domains, 3 classes, 20 images for training, 5 for the test; 2 clients" in printed


def test_a_wrong_partition_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LorafairError, match=r"partition\.clients=500 is more than the 192 training images there are"):
        lorafair.count_labels(TINY, "partition.scheme=iid", "partition.clients=500")

"""The layouts people have on disk: DomainNet's and NICO++'s list files, and plain folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorafair.config.schema import DataConfig
from lorafair.data.images import DataError, ImageData, Split
from lorafair.data.sources import load_images


def write_image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


def write_list(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def names(split: Split) -> list[str]:
    """The files of a split, relative to the root."""
    reader = split.images
    return [reader.images.entries[i].decode() for i in reader.indices]  # type: ignore[attr-defined]


# DomainNet

CLASSES = ("aircraft_carrier", "bee", "zebra")


@pytest.fixture
def domainnet(tmp_path: Path) -> Path:
    """2 domains, 3 classes, 2 training and 1 test image each, in the official layout."""
    for domain in ("sketch", "clipart"):
        for split, numbers in (("train", (1, 2)), ("test", (3,))):
            entries = [
                (f"{domain}/{name}/{domain}_{label:03d}_{n:06d}.jpg", label)
                for label, name in enumerate(CLASSES)
                for n in numbers
            ]
            for entry, _ in entries:
                write_image(tmp_path / entry)
            write_list(tmp_path / f"{domain}_{split}.txt", (f"{entry} {label}" for entry, label in entries))
    return tmp_path


def load(root: Path, source: str = "domainnet", **options: object) -> ImageData:
    return load_images(DataConfig(source=source, root=root, **options), seed=0)  # type: ignore[arg-type]


def test_domainnet(domainnet: Path) -> None:
    data = load(domainnet)
    assert data.name == "domainnet"
    assert data.domains == ("clipart", "sketch")
    assert data.classes == CLASSES
    assert names(data.train)[:3] == [
        "clipart/aircraft_carrier/clipart_000_000001.jpg",
        "clipart/aircraft_carrier/clipart_000_000002.jpg",
        "clipart/bee/clipart_001_000001.jpg",
    ]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert data.train.domains.tolist() == [0] * 6 + [1] * 6
    assert data.test.labels.tolist() == [0, 1, 2] * 2
    assert data.train.images.read(0, 16).shape == (16, 16, 3)


def test_labels_may_leave_gaps(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("bee", "zebra"):
            write_image(tmp_path / f"clipart/{name}/{split}.jpg")
        write_list(tmp_path / f"clipart_{split}.txt", [f"clipart/zebra/{split}.jpg 344", f"clipart/bee/{split}.jpg 20"])
    data = load(tmp_path)
    assert data.classes == ("bee", "zebra")
    assert data.train.labels.tolist() == [1, 0]


def test_the_first_classes_are_those_with_the_smallest_labels(domainnet: Path) -> None:
    data = load(domainnet, classes=2)
    assert data.classes == CLASSES[:2]
    assert set(data.train.labels) == set(data.test.labels) == {0, 1}


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_fine(domainnet: Path) -> None:
    file = domainnet / "clipart_train.txt"
    before = load(domainnet).fingerprint
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert load(domainnet).fingerprint == before


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("clipart/bee/clipart_001_000001.jpg", r"is not a path with a class folder, a blank and a label"),
        ("clipart/bee/clipart_001_000001.jpg one", r"is not a path"),
        ("clipart/bee/clipart_001_000001.jpg -1", r"is not a path"),
        ("clipart_001_000001.jpg 1", r"is not a path"),
        ("clipart/bee/clipart_001_000001.jpg 2", r"class bee has label 2 here, but 1 before"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(domainnet: Path, line: str, complaint: str) -> None:
    file = domainnet / "clipart_train.txt"
    with file.open("a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(DataError, match=rf"clipart_train\.txt:7: .*{complaint}"):
        load(domainnet)


def test_an_image_in_both_lists_is_refused_and_one_listed_twice_is_said(
    domainnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test, train = domainnet / "clipart_test.txt", domainnet / "clipart_train.txt"
    lines = train.read_text()
    train.write_text(lines + lines.splitlines()[0] + "\n")
    assert len(load(domainnet).train.labels) == 13
    said = capsys.readouterr().out
    assert f"warning: in {domainnet}: 1 image listed more than once, such as clipart/aircraft_carrier/" in said
    train.write_text(lines + test.read_text())
    message = r"^in .*: 3 images both in a training and in a test list, such as clipart/aircraft_carrier/clipart_000_"
    with pytest.raises(DataError, match=message):
        load(domainnet)
    assert load(domainnet, domains=("sketch",)).domains == ("sketch",), "another domain's lists do not matter"


def test_a_missing_list_is_named_unless_its_domain_is_left_out(domainnet: Path) -> None:
    (domainnet / "sketch_test.txt").unlink()
    assert load(domainnet, domains=("clipart",)).domains == ("clipart",)
    for domains in (None, ("clipart", "sketch")):
        with pytest.raises(DataError, match=r"sketch_test\.txt is missing; name the domains to use in data\.domains"):
            load(domainnet, domains=domains)


def test_a_folder_without_lists_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"has no lists named <domain>_train\.txt .*; it holds photos"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"data\.root=.*/absent is not a folder that exists"):
        load(tmp_path / "absent")


def test_damaged_files_of_the_chosen_domains_are_reported_before_training(domainnet: Path) -> None:
    (domainnet / "sketch/bee/sketch_001_000002.jpg").unlink()
    (domainnet / "sketch/bee/sketch_001_000003.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 12 .* 1 missing \(.*sketch_001_000002\.jpg\)"):
        load(domainnet)
    assert load(domainnet, domains=("clipart",)).domains == ("clipart",)


# NICO++


@pytest.mark.parametrize("lists", [".", "NICO_DG_official", "splits"])
@pytest.mark.parametrize("images", [".", "NICO_DG", "lists"], ids=["root", "NICO_DG", "beside the lists"])
def test_nico_entries_begin_in_one_of_three_folders_and_may_hold_blanks(
    tmp_path: Path, lists: str, images: str
) -> None:
    base = tmp_path / (lists if images == "lists" else images)
    for split in ("train", "test"):
        entries = [f"dim/{name}/dim light {split} 1.jpg" for name in ("hot air balloon", "bear")]
        for entry in entries:
            write_image(base / entry)
        write_list(tmp_path / lists / f"dim_{split}.txt", (f"{e} {label}" for label, e in enumerate(entries)))
    data = load(tmp_path, source="nico")
    assert data.name == "nico"
    assert data.domains == ("dim",)
    assert data.classes == ("hot air balloon", "bear")
    assert data.train.labels.tolist() == [0, 1]


# Plain folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """2 domains; class cat has 10 images in each, dog 10 in one and a single one in the other."""
    for domain, cats, dogs in (("day", 10, 10), ("night", 10, 1)):
        for n in range(cats):
            write_image(tmp_path / domain / "cat" / f"{n}.png")
        for n in range(dogs):
            write_image(tmp_path / domain / "dog" / f"{n}.png")
    return tmp_path


def load_folder(root: Path, seed: int = 0, **options: object) -> ImageData:
    config = DataConfig(source="folder", root=root, **{"test_fraction": 0.2, **options})  # type: ignore[arg-type]
    return load_images(config, seed)


def test_a_share_of_every_domains_class_is_held_out(photos: Path) -> None:
    data = load_folder(photos)
    assert data.domains == ("day", "night")
    assert data.classes == ("cat", "dog")

    def counts(split: Split) -> list[int]:
        return np.bincount(2 * split.domains + split.labels, minlength=4).tolist()

    assert counts(data.train) == [8, 8, 8, 1]
    assert counts(data.test) == [2, 2, 2, 0]
    assert set(names(data.train)).isdisjoint(names(data.test))


def test_the_seed_draws_the_held_out_images_of_a_domain_whatever_the_others_hold(photos: Path) -> None:
    first = names(load_folder(photos).test)
    assert names(load_folder(photos, seed=1).test) != first
    write_image(photos / "night" / "dog" / "1.png")
    assert names(load_folder(photos).test)[:4] == first[:4]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_two_images_are_one_for_training_and_one_for_the_test(tmp_path: Path, fraction: float) -> None:
    for name in ("cat", "dog"):
        for n in range(2):
            write_image(tmp_path / "day" / name / f"{n}.png")
    data = load_folder(tmp_path, test_fraction=fraction)
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]


def test_given_train_and_test_folders_are_the_split(tmp_path: Path) -> None:
    for split, numbers in (("train", range(3)), ("test", range(3, 5))):
        for name in ("cat", "dog"):
            for n in numbers:
                write_image(tmp_path / split / "day" / name / f"{n}.png")
    data = load_folder(tmp_path)
    assert names(data.test) == [f"test/day/{name}/{n}.png" for name in ("cat", "dog") for n in (3, 4)]
    assert len(data.train) == 6
    assert "split as in its folders" in data.description


def test_suffixes_in_any_case_count_and_other_files_do_not(photos: Path) -> None:
    expected = len(load_folder(photos).train) + len(load_folder(photos).test)
    write_image(photos / "day" / "cat" / "SHOUTED.JPG")
    (photos / "day" / "cat" / "Thumbs.db").touch()
    (photos / "day" / "notes.txt").touch()
    (photos / ".cache" / "cat").mkdir(parents=True)
    data = load_folder(photos)
    assert data.domains == ("day", "night")
    assert len(data.train) + len(data.test) == expected + 1


def test_files_of_other_systems_are_left_out_and_counted(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_folder(photos)
    of_class = next(path for path in sorted(photos.glob("*/*")) if path.is_dir())
    for name in ("._im0.jpg", "._im1.jpg", "Thumbs.db", ".DS_Store"):
        (of_class / name).write_bytes(b"\0\5\26\7")
    (photos / "__MACOSX" / "art").mkdir(parents=True)
    capsys.readouterr()
    after = load_folder(photos)
    assert names(after.train) == names(before.train)
    assert after.domains == before.domains
    assert f"warning: 2 files of other systems left out, such as {of_class / '._im0.jpg'}" in capsys.readouterr().out


def test_an_empty_domain_is_an_error_unless_it_is_left_out(photos: Path) -> None:
    (photos / "fog").mkdir()
    with pytest.raises(DataError, match=r"domain fog of folder has no training images .*data\.domains"):
        load_folder(photos)
    assert load_folder(photos, domains=("night", "day")).domains == ("night", "day")


def test_a_folder_without_images_says_what_is_expected(tmp_path: Path) -> None:
    write_image(tmp_path / "too-high-up.png")
    with pytest.raises(DataError, match=r"holds no images as domain/class/image.*\.jpg"):
        load_folder(tmp_path)

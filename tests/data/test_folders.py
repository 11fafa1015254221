"""The layouts people have on disk: DomainNet's and NICO++'s list files, and plain folders."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorafair.config.schema import DataConfig
from lorafair.data import files as files_module
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


@pytest.mark.parametrize("name", ["@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"])
def test_folders_of_other_systems_are_no_domains_and_no_classes(
    photos: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = load_folder(photos)
    domain = photos / before.domains[0]
    for folder in (photos / name / "cat", domain / name):
        write_image(folder / "im.jpg")
    capsys.readouterr()
    after = load_folder(photos)
    assert (after.domains, after.classes, names(after.train)) == (before.domains, before.classes, names(before.train))
    assert "2 folders of other systems left out, such as" in capsys.readouterr().out


@pytest.mark.parametrize("link", ["art/cat_old -> art/cat", "latest -> art", "photo/dog -> art/dog"])
def test_folders_that_are_one_by_a_link_are_refused(tmp_path: Path, link: str) -> None:
    """Their images would count twice, and be in training and test by the draw."""
    for domain, name, n in itertools.product(("art", "photo"), ("cat", "cow"), range(2)):
        write_image(tmp_path / domain / name / f"{n}.png")
    write_image(tmp_path / "art" / "dog" / "0.png")
    new, _, old = link.partition(" -> ")
    (tmp_path / new).symlink_to(tmp_path / old)
    with pytest.raises(DataError, match="are one folder by a link, whose images would count twice"):
        load_folder(tmp_path)
    if new == "latest":
        assert load_folder(tmp_path, domains=("art", "photo")).domains == ("art", "photo")


def test_an_empty_domain_is_an_error_unless_it_is_left_out(photos: Path) -> None:
    (photos / "fog").mkdir()
    with pytest.raises(DataError, match=r"domain fog of folder has no training images .*data\.domains"):
        load_folder(photos)
    assert load_folder(photos, domains=("night", "day")).domains == ("night", "day")


def test_a_folder_without_images_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images as domain/class/image.*it holds nothing; .*\.jpg"):
        load_folder(tmp_path)
    write_image(tmp_path / "too-high-up.png")
    with pytest.raises(DataError, match=r"some in no folder of a class, such as .*/too-high-up\.png: put each into"):
        load_folder(tmp_path)


def test_images_of_every_usual_ending_count_and_others_are_counted_by_ending(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(load_folder(photos).train.labels) + len(load_folder(photos).test.labels)
    for suffix in (".tif", ".TIFF", ".gif", ".ppm", ".jfif"):
        picture = Image.new("RGB", (8, 8))
        picture.save(photos / "day" / "cat" / f"more{suffix}", {".jfif": "JPEG"}.get(suffix))
    for name in ("list.txt", "more.txt", "raw.heic", "nothing"):
        (photos / "day" / "cat" / name).write_bytes(b"x")
    capsys.readouterr()
    data = load_folder(photos)
    assert len(data.train) + len(data.test) == before + 5
    said = capsys.readouterr().out
    assert "warning: 4 files left out, whose endings are not read " in said
    assert f"(2 .txt, 1 no ending, 1 .heic): {photos / 'day/cat/list.txt'}, " in said


def test_images_that_lie_deeper_or_higher_are_counted(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(load_folder(photos).train)
    write_image(photos / "day" / "cat" / "more" / "still" / "deep.png")
    write_image(photos / "day" / "high.png")
    capsys.readouterr()
    assert names(load_folder(photos).train) == before
    said = capsys.readouterr().out
    assert f"1 folder of images left out, which lie deeper than domain/class: {photos / 'day/cat/more'}" in said
    assert f"1 image left out, in no folder of a class: {photos / 'day/high.png'}" in said


def test_images_beside_the_folders_of_domains_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write_image(tmp_path / split / "day" / name / "0.png")
    before = load_folder(tmp_path)
    beside = [tmp_path / name for name in ("0.png", "test/0.png", "train/0.png")]
    for file in (*beside, tmp_path / ".0.png"):
        write_image(file)
    (tmp_path / "train" / "folder.png").mkdir()
    (tmp_path / "test" / "notes.txt").touch()
    capsys.readouterr()
    after = load_folder(tmp_path, domains=("day",))
    assert after.fingerprint == before.fingerprint
    said = capsys.readouterr().out
    assert f"warning: 3 images left out, in no folder of a class: {', '.join(map(str, beside))}\n" in said


@pytest.mark.parametrize(
    ("image", "hint"),
    [
        ("set/day/cat/0.png", r"some deeper, in .*set/day/cat: give the folder whose folders are the domains"),
        ("cat/0.png", r"some higher, such as .*cat/0\.png: put the folders of classes .*such as .*/all/cat$"),
        ("train/cat/0.png", r"some higher, .* such as .*/train/all/cat$"),
        ("day/cat/0.heic", r"other files, such as .*0\.heic; images end in \.jpg"),
    ],
)
def test_a_folder_of_another_depth_says_what_to_give(tmp_path: Path, image: str, hint: str) -> None:
    file = tmp_path / image
    file.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(file, "PNG")
    if image.startswith("train"):
        write_image(tmp_path / "test" / "cat" / "1.png")
    with pytest.raises(
        DataError, match=rf"holds no images as domain/class/image, also not below train and test; .*{hint}"
    ):
        load_folder(tmp_path)


@pytest.mark.parametrize("folders", [("train", "val"), ("Train", "Test"), ("training", "day")])
def test_folders_of_a_split_are_no_domains_unless_they_are_named(tmp_path: Path, folders: tuple[str, str]) -> None:
    for domain in folders:
        for name in ("cat", "dog"):
            for n in range(3):
                write_image(tmp_path / domain / name / f"{n}.png")
    with pytest.raises(DataError, match=rf"{folders[0]}.* named like a split .*root/train/domain/class.*data\.domains"):
        load_folder(tmp_path)
    assert load_folder(tmp_path, domains=folders).domains == folders


def test_domains_with_a_split_of_their_own_have_no_classes_named_so(tmp_path: Path) -> None:
    for domain in ("day", "night"):
        for split in ("train", "val"):
            for n in range(3):
                write_image(tmp_path / domain / split / f"{n}.png")
    with pytest.raises(DataError, match=r"the classes of data\.root=.* would be train, val, the names of a split"):
        load_folder(tmp_path)


def test_what_lies_beside_train_and_test_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test", "val"):
        for name in ("cat", "dog"):
            write_image(tmp_path / split / "day" / name / "0.png")
    assert len(load_folder(tmp_path).train) == 2
    assert "warning: data.root=" in (said := capsys.readouterr().out)
    assert "left out beside them val" in said


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("pair", [("Cat", "cat"), (NFC, NFD), ("cat ", "cat")])
def test_a_class_of_two_spellings_is_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    for domain, name in zip(("day", "night"), pair, strict=True):
        for of_class in (name, "dog"):
            for n in range(3):
                write_image(tmp_path / domain / of_class / f"{n}.png")
    with pytest.raises(DataError, match=r"^classes '.*' \((day|night)\) and '.*' \((day|night)\) .* only in case"):
        load_folder(tmp_path)


def test_letters_that_differ_in_case_are_classes_where_a_domain_has_both(tmp_path: Path) -> None:
    for domain in ("day", "night"):
        for letter in "aA":
            for n in range(3):
                write_image(tmp_path / domain / letter / f"{n}.png")
    assert load_folder(tmp_path).classes == ("A", "a")


def test_all_spellings_are_compared_and_not_with_the_first_alone(tmp_path: Path) -> None:
    """DOG and Dog are beside each other, and so are DOG and dog; Dog and dog are not."""
    for domain, names_there in (("day", ("DOG", "Dog")), ("night", ("DOG", "dog"))):
        for name in names_there:
            for n in range(3):
                write_image(tmp_path / domain / name / f"{n}.png")
    with pytest.raises(DataError, match=r"^classes 'Dog' \(day\) and 'dog' \(night\) .* only in case"):
        load_folder(tmp_path)


def test_a_domain_of_two_spellings_is_refused(tmp_path: Path) -> None:
    for split, domain in (("train", "day"), ("test", "Day")):
        write_image(tmp_path / split / domain / "cat" / "0.png")
    with pytest.raises(DataError, match=r"^domains 'Day' \(test\) and 'day' \(train\) .* only in case"):
        load_folder(tmp_path)


def test_classes_that_one_domain_alone_has_are_named(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_folder(photos)
    assert "in one domain alone" not in capsys.readouterr().out
    for n in range(3):
        write_image(photos / "night" / "owl" / f"{n}.png")
    load_folder(photos)
    assert "warning: 1 class in one domain alone: owl (night)" in capsys.readouterr().out
    load_folder(photos, domains=("day",))
    assert "warning: 1 class without images in the domains of this run: owl" in capsys.readouterr().out


def test_a_copy_of_a_training_image_in_the_test_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            file = tmp_path / split / "day" / name / "0.png"
            file.parent.mkdir(parents=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    load_folder(tmp_path)
    assert "copy" not in capsys.readouterr().out
    copy = tmp_path / "test" / "day" / "dog" / "renamed.png"
    copy.write_bytes((tmp_path / "train/day/cat/0.png").read_bytes())
    load_folder(tmp_path)
    assert f"warning: 1 test image is a copy of a training image, such as {copy} of " in capsys.readouterr().out


def test_a_copy_is_found_among_images_of_one_border(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files without compression end in their upper border: size and end are those of all."""
    read: list[Path] = []
    content = files_module._content
    monkeypatch.setattr(files_module, "_content", lambda path: (read.append(path), content(path))[1])
    random = np.random.default_rng(0)
    for split, name, n in itertools.product(("train", "test"), ("cat", "dog"), range(3)):
        file = tmp_path / split / "day" / name / f"{n}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 16, 3), 255, np.uint8)
        pixels[2:14, 2:14] = random.integers(0, 256, (12, 12, 3))
        Image.fromarray(pixels).save(file)
    image, copy = tmp_path / "train/day/cat/1.bmp", tmp_path / "test/day/dog/2.bmp"
    copy.write_bytes(image.read_bytes())
    load_folder(tmp_path)
    said = f"1 test image is a copy of a training image, such as {copy} of {image}: "
    assert f"warning: {said}" in capsys.readouterr().out
    assert len(read) == len(set(read)) == 12, "each once"
    monkeypatch.setattr(files_module, "_COMPARED", 4)
    copy.write_bytes((tmp_path / "train/day/cat/0.bmp").read_bytes())
    (tmp_path / "test/day/cat/0.bmp").write_bytes(copy.read_bytes())
    load_folder(tmp_path)
    assert "warning: at least 1 test image is a copy" in capsys.readouterr().out
    assert len(read) == 12 + 4 + 4


def test_a_folder_that_cannot_be_read_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"a folder of data\.root=.* cannot be read: .*Permission denied"):
        load_folder(photos)


# Lists as people have them


def rewrite(file: Path, change: Callable[[str], str]) -> None:
    file.write_text("".join(f"{change(line)}\n" for line in file.read_text().splitlines()))


@pytest.mark.parametrize("prefix", ["DomainNet/", "/home/someone/data/DomainNet/", "./", "C:/data/", "/"])
def test_paths_may_begin_with_folders_of_another_machine(
    domainnet: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = names(load(domainnet).train)
    for file in domainnet.glob("*.txt"):
        rewrite(file, lambda line: prefix + line)
    capsys.readouterr()
    assert [name.removeprefix("./") for name in names(load(domainnet).train)] == expected
    said = "paths are read without their first folders: clipart/aircraft_carrier/clipart_000_000001.jpg for "
    assert (said in capsys.readouterr().out) == (prefix != "./")


def test_tabs_backslashes_and_utf_16_are_read(domainnet: Path) -> None:
    expected = load(domainnet).fingerprint
    tabs, windows = domainnet / "clipart_train.txt", domainnet / "sketch_train.txt"
    rewrite(tabs, lambda line: "\t".join(line.rsplit(" ", 1)) + " \t")
    windows.write_bytes(windows.read_text().replace("/", "\\").replace("\n", "\r\n").encode("utf-16"))
    assert load(domainnet).fingerprint == expected


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_names_of_either_unicode_form_and_of_none_are_found(tmp_path: Path, written: str) -> None:
    stored = {"NFC": NFD, "NFD": NFC}[written]
    for split in ("train", "test"):
        write_image(tmp_path / "art" / stored / f"{split}.jpg")
        write_image(tmp_path / "art" / "dog" / f"{split}.jpg")
        lines = [f"art/{unicodedata.normalize(written, stored)}/{split}.jpg 0", f"art/dog/{split}.jpg 1"]
        write_list(tmp_path / f"art_{split}.txt", lines)
    assert len(load(tmp_path).train) == 2
    os.rename(os.fsencode(tmp_path / "art" / "dog"), os.fsencode(tmp_path / "art") + b"/dog\xe9")
    for split in ("train", "test"):
        file = tmp_path / f"art_{split}.txt"
        file.write_bytes(file.read_bytes().replace(b"dog", b"dog\xe9"))
    data = load(tmp_path)
    assert data.classes[1] == r"dog\xe9", "a name that can be printed and written"
    assert data.train.images.read(1, 8).shape == (8, 8, 3)


def test_lists_of_other_systems_are_no_domains(domainnet: Path) -> None:
    for split in ("train", "test"):
        (domainnet / f"._clipart_{split}.txt").write_bytes(b"\0\5\26\7")
    assert load(domainnet).domains == ("clipart", "sketch")


def test_a_test_image_under_another_spelling_of_its_path_is_a_leak(domainnet: Path) -> None:
    train = domainnet / "clipart_train.txt"
    line = (domainnet / "clipart_test.txt").read_text().splitlines()[0]
    train.write_text(train.read_text() + f"clipart/./{line.removeprefix('clipart/')}\n")
    with pytest.raises(DataError, match=r"1 image both in a training and in a test list"):
        load(domainnet)


@pytest.mark.parametrize("written", ["{root}/{entry}", "../{root.name}/{entry}", "link/{inner}"])
def test_a_test_image_by_a_path_from_elsewhere_is_a_leak(domainnet: Path, written: str) -> None:
    entry = (domainnet / "sketch_test.txt").read_text().split()[0]
    (domainnet / "link").symlink_to(domainnet / "sketch")
    with (domainnet / "sketch_train.txt").open("a") as lines:
        lines.write(f"{written.format(root=domainnet, entry=entry, inner=entry.partition('/')[2])} 0\n")
    with pytest.raises(DataError, match="1 image both in a training and in a test list"):
        load(domainnet)


@pytest.mark.parametrize("content", ["a/b/c.jpg 0\n".encode("utf-16-le"), b"\x1f\x8b\x08\0\0"])
def test_a_list_that_is_no_text_is_said(domainnet: Path, content: bytes) -> None:
    (domainnet / "sketch_train.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"sketch_train\.txt is no text in UTF-8"):
        load(domainnet)


def test_labels_that_two_classes_share_are_said_and_those_too_long_are_refused(
    domainnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(domainnet / "clipart/wasp/1.jpg")
    train = domainnet / "clipart_train.txt"
    lines = train.read_text()
    train.write_text(f"{lines}clipart/wasp/1.jpg 1\n")
    load(domainnet)
    assert "warning: 1 label of the lists with folders of several names" in (said := capsys.readouterr().out)
    assert "label 1 of bee, wasp" in said
    train.write_text(f"{lines}clipart/wasp/1.jpg {'9' * 5000}\n")
    with pytest.raises(DataError, match=r"clipart_train\.txt:7: "):
        load(domainnet)


def test_a_class_of_two_spellings_in_lists_is_refused(domainnet: Path) -> None:
    for split in ("train", "test"):
        rewrite(domainnet / f"sketch_{split}.txt", lambda line: line.replace("/bee/", "/Bee/").replace("g 1", "g 7"))
    with pytest.raises(DataError, match=r"^classes 'Bee' \(sketch_.*\) and 'bee' \(clipart_.*\) .* only in case"):
        load(domainnet)
    assert load(domainnet, domains=("clipart",)).domains == ("clipart",), "another domain's spelling does not matter"


def test_two_spellings_of_one_label_are_one_class(domainnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = load(domainnet)
    (domainnet / "sketch/bee").rename(domainnet / "sketch/Bee")
    for split in ("train", "test"):
        rewrite(domainnet / f"sketch_{split}.txt", lambda line: line.replace("/bee/", "/Bee/"))
    data = load(domainnet)
    assert data.classes == CLASSES, "named as in the first list"
    assert data.train.labels.tolist() == expected.train.labels.tolist()
    assert "label 1 of bee, Bee" in capsys.readouterr().out

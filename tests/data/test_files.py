"""Image files: what is read, and which damages are found before the first round."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from lorafair.data.files import ImageFiles, inspect_files
from lorafair.data.images import DataError, ImagesInMemory, Split, StoredImages

FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"}


def encode(format_: str, side: int = 24, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format_)
    return buffer.getvalue()


@pytest.fixture
def good(tmp_path: Path) -> list[Path]:
    files = []
    for format_, suffix in FORMATS.items():
        files.append(tmp_path / f"good{suffix}")
        files[-1].write_bytes(encode(format_))
    return files


def reader(path: Path) -> ImageFiles:
    return ImageFiles(path.parent, np.array([path.name.encode()]))


# Reading


def test_an_image_is_resized_to_a_square_bicubic(tmp_path: Path) -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    wide.save(tmp_path / "wide.png")
    pixels = reader(tmp_path / "wide.png").read(0, 16)
    assert (pixels.shape, pixels.dtype, pixels.flags.writeable) == ((16, 16, 3), np.uint8, True)
    np.testing.assert_array_equal(pixels, np.asarray(wide.resize((16, 16), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "image.png").write_bytes(encode("PNG", mode=mode))
    assert reader(tmp_path / "image.png").read(0, 24).shape == (24, 24, 3)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff and then nothing of the kind\xff\xd9")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be decoded .*data\.root"):
        reader(tmp_path / "broken.jpg").read(0, 16)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_noted_as_damaged(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Image.Image, *arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    file = tmp_path / "image.png"
    file.write_bytes(encode("PNG"))
    files = replace(reader(file), note=tmp_path / "run" / "damaged.txt")
    if number == errno.ENOENT:
        file.unlink()
    else:
        monkeypatch.setattr(PngImageFile, "load", fail)
    for read in (lambda: files.read(0, 8), lambda: files.picture(0)):
        with pytest.raises(DataError, match=rf"image\.png cannot be read now \(.*{os.strerror(number)}.*continues$"):
            read()
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    file.write_bytes(encode("PNG")[:-60] + bytes(60))
    with pytest.raises(DataError, match=r"image\.png cannot be decoded"):
        files.read(0, 8)
    assert (tmp_path / "run" / "damaged.txt").read_text() == "image.png\n"


def test_readers_travel_to_worker_processes_small(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((50, 64, 64, 3), np.uint8))
    stored = StoredImages(tmp_path / "images.npy", np.zeros((50, 32), np.uint8))
    stored.read(0, 8)  # opens the file
    travelled = pickle.dumps(stored)
    assert len(travelled) < 5000
    np.testing.assert_array_equal(pickle.loads(travelled).read(3, 8), np.zeros((8, 8, 3)))


def test_a_selection_of_a_selection_reads_the_right_images() -> None:
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    split = Split(ImagesInMemory(pixels), labels=np.arange(10), domains=np.arange(10) % 2)
    chosen = split.select(np.array([9, 2, 5])).select(np.array([2, 0]))
    assert len(chosen) == len(chosen.images) == 2
    assert chosen.labels.tolist() == [5, 9]
    assert chosen.domains.tolist() == [1, 1]
    assert [int(chosen.images.read(i, 4)[0, 0, 0]) for i in range(2)] == [5, 9]


# Checking beforehand


def test_good_files_pass_and_their_sizes_are_returned(good: list[Path]) -> None:
    assert [file.size for file in inspect_files(good)] == [file.stat().st_size for file in good]


def test_a_suffix_may_lie_and_bytes_may_follow_the_end(tmp_path: Path) -> None:
    (tmp_path / "png.jpg").write_bytes(encode("PNG"))
    (tmp_path / "padded.jpg").write_bytes(encode("JPEG") + b"\0" * 10)
    inspect_files([tmp_path / "png.jpg", tmp_path / "padded.jpg"])


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.95])
def test_a_truncated_file_is_found(tmp_path: Path, format_: str, kept: float) -> None:
    file = tmp_path / f"cut{FORMATS[format_]}"
    whole = encode(format_)
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=r"1 of 1 image files cannot be used: 1 truncated or damaged \(.*cut"):
        inspect_files([file])


def test_all_damages_are_counted_and_the_first_of_each_kind_are_named_in_one_line(
    tmp_path: Path, good: list[Path]
) -> None:
    empty = [tmp_path / f"empty{i}.jpg" for i in range(5)]
    for file in empty:
        file.touch()
    (tmp_path / "page.jpg").write_text("<html>404 not found</html>")
    (tmp_path / "folder.jpg").mkdir()
    bad = [tmp_path / "absent.jpg", *empty, tmp_path / "page.jpg", tmp_path / "folder.jpg"]
    with pytest.raises(DataError) as caught:
        inspect_files([*good, *bad])
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("8 of 12 image files cannot be used: ")
    assert f"1 missing ({tmp_path}/absent.jpg)" in message
    assert f"5 empty ({tmp_path}/empty0.jpg, {tmp_path}/empty1.jpg, {tmp_path}/empty2.jpg, …)" in message
    assert f"1 not an image ({tmp_path}/page.jpg)" in message
    assert f"1 unreadable ({tmp_path}/folder.jpg)" in message
    assert message.endswith("change data.root")


def test_the_digest_sees_order_names_and_sizes(tmp_path: Path) -> None:
    for name, side in (("a.png", 8), ("b.png", 9)):
        (tmp_path / name).write_bytes(encode("PNG", side))
    files = ImageFiles(tmp_path, np.array([b"a.png", b"b.png"]))
    digests = [files.digest(np.array(indices)) for indices in ([0, 1], [1, 0], [0])]
    (tmp_path / "b.png").write_bytes(encode("PNG", 10))
    digests.append(files.digest(np.array([0, 1])))
    assert len(set(digests)) == 4


def png_header(width: int, height: int) -> bytes:
    """A complete file to look at, whose header promises so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_headers_that_promise_too_much_or_nothing_are_found_beforehand(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    jpeg = bytearray(encode("JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "bomb.jpg").write_bytes(jpeg)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff and then nothing of the kind\xff\xd9")
    with pytest.raises(DataError) as caught:
        inspect_files([tmp_path / name for name in ("bomb.png", "bomb.jpg", "broken.jpg")])
    assert "2 of more pixels than can be decoded" in str(caught.value)
    assert "1 not an image" in str(caught.value)


def test_the_digest_of_deep_images_differs_from_that_of_versions_that_cut_them_off(tmp_path: Path) -> None:
    for name, kind in (("a.png", np.uint8), ("b.png", np.uint16)):
        Image.fromarray(np.zeros((4, 4), kind)).save(tmp_path / name)
    files = ImageFiles(tmp_path, np.array([b"a.png", b"b.png"]))

    def sizes(index: int) -> bytes:
        size = files.path(index).stat().st_size
        return hashlib.sha256(b"%s\0%d\0" % (files.entries[index], size)).digest()

    assert files.digest(np.array([0])) == sizes(0), "as it was: runs with such images continue"
    assert files.digest(np.array([1])) != sizes(1)

"""The perceptual hash: ImageHash's to within two bits, from the bytes alone, and none where an image has nothing to tell."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import combinations
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.storage import Storage
from pipeline.shards.duplicates import phash
from pipeline.shards.duplicates.phash import hash_grey, perceptual_hash
from pipeline.shards.verify import verify
from tests.unit.shards.copies import CHANGES, views, write_pictures
from tests.unit.stream.photographs import encoded, photographs


def bits(one: int | None, other: int | None) -> int:
    assert one is not None and other is not None
    return (one ^ other).bit_count()


def theirs(image: Image.Image) -> int:
    return int(str(imagehash.phash(image)), 16)


@pytest.mark.parametrize("quality", [95, 70])
def test_it_is_that_of_imagehash(quality: int) -> None:
    """To the bit from the same pixels; within two bits from a JPEG, which is decoded at a part of its size."""
    for picture in [*photographs(), *views()]:
        assert hash_grey(picture.convert("L")) == theirs(picture)
        data = encoded(picture, "JPEG", quality=quality)
        assert bits(perceptual_hash(data), theirs(Image.open(io.BytesIO(data)))) <= 2


def test_it_survives_what_copies_go_through() -> None:
    for picture in [*photographs(), *views()]:
        whole = perceptual_hash(encoded(picture, "JPEG", quality=95))
        assert all(bits(whole, perceptual_hash(change(picture))) <= 4 for change in CHANGES.values())


def test_different_pictures_are_far_apart() -> None:
    hashes = [perceptual_hash(encoded(picture, "JPEG", quality=95)) for picture in views()]
    assert min(bits(a, b) for a, b in combinations(hashes, 2)) > 12


def test_it_is_the_same_everywhere() -> None:
    """Of pixels that whole numbers alone make, kept without loss."""
    y, x = np.mgrid[0:90, 0:120]
    pixels = ((x * x * 7 + y * x * 13 + y * y * 3) // 64 % 256).astype(np.uint8)
    assert perceptual_hash(encoded(Image.fromarray(pixels), "PNG")) == 9223656879071100702


def test_a_picture_with_nothing_in_it_has_none() -> None:
    flat = [Image.new("RGB", (200, 150), color) for color in ((0, 0, 0), (255, 255, 255), (90, 20, 200))]
    noisy = Image.fromarray(np.random.default_rng(0).integers(126, 130, (200, 200)).astype(np.uint8))
    for picture in [*flat, noisy, Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90)]:
        assert perceptual_hash(encoded(picture, "PNG")) is None and perceptual_hash(encoded(picture, "JPEG", quality=80)) is None


def test_kinds_of_images() -> None:
    picture = views()[0]
    whole = perceptual_hash(encoded(picture, "PNG"))
    clear = picture.copy()
    clear.putalpha(255)
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    same = [encoded(clear, "PNG"), encoded(deep, "PNG"), encoded(picture.convert("L"), "PNG"), encoded(picture, "WEBP", lossless=True)]
    assert [bits(whole, perceptual_hash(data)) <= 2 for data in same] == [True] * 4
    assert bits(whole, perceptual_hash(encoded(picture.convert("CMYK"), "JPEG", quality=95))) <= 4


def test_what_cannot_be_decoded_has_none() -> None:
    good = encoded(views()[0], "JPEG")
    assert [perceptual_hash(data) for data in (b"", b"<html>", good[: len(good) // 2], encoded(views()[0], "PNG")[:500])] == [None] * 4


def test_a_bomb_is_not_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    assert perceptual_hash(bomb) is None


def test_it_is_written_to_the_index_and_verified(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    flat = encoded(Image.new("RGB", (64, 64), "red"), "PNG")
    files = [("a", encoded(views()[0], "JPEG")), ("b", encoded(views()[1], "PNG")), ("flat", flat)]
    write_pictures(directory, {"train": files})
    index = pq.read_table(tmp_path / "train-00000.index.parquet")
    assert index["phash"].to_pylist() == [perceptual_hash(data) for _, data in files] and index["phash"][2].as_py() is None
    assert list(verify(directory)) == []
    wrong = index.set_column(index.column_names.index("phash"), "phash", pa.array([1, 2, None], pa.uint64()))
    pq.write_table(wrong, tmp_path / "train-00000.index.parquet")
    assert [p.what.startswith("the index is wrong: phash is 1") for p in verify(directory)] == [True, False]


def test_amplitudes_of_the_threshold() -> None:
    """The contrast that counts is a quarter of a grey level, of a frequency across the whole image."""
    x = np.mgrid[0:32, 0:32][1]
    wave = np.cos(np.pi * (2 * x + 1) * 3 / 64)
    low = (phash._COSINES @ (128 + 0.25 * wave) @ phash._COSINES.T)[0, 3]
    assert low == pytest.approx(2 * phash._CONTRAST, rel=0.01)

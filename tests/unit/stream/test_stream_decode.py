from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from photographs import encoded, photograph, photographs
from PIL import Image as Picture

from pipeline.stream.decode import (
    decode,
    decode_box,
    evaluation_view,
    evaluation_view_of,
    normalize,
    reduction,
    resize,
    resize_into,
    size_of,
)


def bomb() -> bytes:
    """A PNG whose header says 60,000 pixels square."""
    data = encoded(photograph(40, 30), "PNG")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


BROKEN = [
    b"",
    b"not an image",
    b"\xff\xd8 cut",
    b"\xff\xd8",
    b"\xff\xd8" + b"\xff" * 40,
    encoded(photograph(40, 30), "PNG")[:200],
    encoded(photograph(40, 30), "PNG").replace(b"IDAT", b"IDAX"),
    b"\xf8\xe5B@".join(encoded(photograph(250, 250), "PNG").rsplit(b"IDAT", 1)),  # a chunk without a name: Pillow's SyntaxError
    bomb(),
    encoded(photograph(40, 30), "GIF"),  # shards hold none
    encoded(photograph(40, 30), "WEBP")[:100],
    encoded(photograph(40, 30), "JPEG")[:300],
    encoded(photograph(40, 30), "JPEG")[:-60],
]


def tensor(picture: Picture.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))


def apart(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(a).astype(int) - np.asarray(b))


def pillow_view(picture: Picture.Image, pixels: int) -> np.ndarray:
    width, height = picture.size
    factor = pixels / min(width, height)
    size = (max(pixels, round(width * factor)), max(pixels, round(height * factor)))
    left, top = (size[0] - pixels) // 2, (size[1] - pixels) // 2
    return np.asarray(picture.resize(size, Picture.Resampling.BICUBIC).crop((left, top, left + pixels, top + pixels)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode(kind: str, mode: str) -> None:
    data = encoded(photograph(40, 30).convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = decode(data)
    assert pixels.dtype == torch.uint8 and pixels.shape == (30, 40, 3) and size_of(data) == (30, 40)
    expected = np.asarray(Picture.open(io.BytesIO(data)).convert("RGB"))
    assert apart(pixels, expected).mean() <= (0.5 if kind == "JPEG" else 0)


@pytest.mark.parametrize("data", BROKEN)
def test_what_cannot_be_decoded(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data)
    with pytest.raises(ValueError, match=r"."):
        evaluation_view_of(data, 16, torch.empty(16, 16, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"."):
        size_of(data)
        decode_box(data, (0, 0, 4, 4), 4)  # a header may be whole where the rest is not


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damage_is_a_value_error_or_nothing(kind: str) -> None:
    """Bytes changed at random, most of them near the front, where the headers are."""
    whole, random, refused = encoded(photograph(24, 20), kind), np.random.default_rng(0), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            data[random.integers(min(len(data), random.choice([30, 200, 5000])))] = random.choice([0, 255, 0xC0, random.integers(256)])
        try:
            height, width = size_of(bytes(data))
            if height * width < 10**6:
                assert decode(bytes(data)).shape == (height, width, 3)
                decode_box(bytes(data), (0, 0, height, width), 8)
        except ValueError:
            refused += 1
    assert 40 < refused < 400


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("pixels", [32, 160, 224, 384, 500])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_evaluation_view_is_that_of_pillow(which: int, pixels: int, kind: str) -> None:
    """Bicubic with antialiasing, then the centre: on average less than half a level of 255 apart, never more than three."""
    data = encoded(photographs()[which], kind, **({"quality": 90} if kind == "JPEG" else {}))
    batch = torch.full((3, pixels, pixels, 3), 7, dtype=torch.uint8)
    evaluation_view_of(data, pixels, batch[1])
    difference = apart(batch[1], pillow_view(Picture.open(io.BytesIO(data)).convert("RGB"), pixels))
    assert difference.mean() < 0.5 and difference.max() <= 3
    assert (batch[0] == 7).all() and (batch[2] == 7).all()
    assert torch.equal(batch[1], evaluation_view(decode(data), pixels))


@pytest.mark.parametrize(("width", "height", "pixels"), [(97, 103, 32), (8, 8, 16), (65, 33, 32), (64, 64, 64), (48, 48, 17), (3, 50, 5)])
def test_evaluation_view_of_odd_sizes(width: int, height: int, pixels: int) -> None:
    picture = photograph(width, height)
    difference = apart(evaluation_view(tensor(picture), pixels), pillow_view(picture, pixels))
    assert difference.shape == (pixels, pixels, 3) and difference.mean() < 0.5 and difference.max() <= 2


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = tensor(photograph(20, 10))
    assert resize(image, 10, 20) is image
    out = torch.zeros_like(image)
    resize_into(image, out)
    assert torch.equal(out, image)


@pytest.mark.parametrize("box", [(0, 0, 427, 640), (13, 57, 300, 310), (400, 600, 20, 30)])
def test_resize_of_a_part(box: tuple[int, int, int, int]) -> None:
    """A view of a larger image, as a crop is; and the same memory order as a batch has."""
    top, left, height, width = box
    picture = photographs()[1]
    out = torch.zeros(2, 64, 48, 3, dtype=torch.uint8)
    resize_into(tensor(picture)[top : top + height, left : left + width], out[1])
    expected = picture.crop((left, top, left + width, top + height)).resize((48, 64), Picture.Resampling.BICUBIC)
    assert apart(out[1], expected).mean() < 0.5 and not out[0].any()
    assert torch.equal(out[1], resize(tensor(picture)[top : top + height, left : left + width], 64, 48))


def jpegs(width: int, height: int) -> list[bytes]:
    """The ways of coding a JPEG that bear on its rows."""
    picture = photograph(width, height)
    sampled = [simplejpeg.encode_jpeg(np.asarray(picture), 90, "RGB", s) for s in ("444", "422", "420", "440", "411")]
    others = [
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"restart_marker_blocks": 3, "progressive": True},
        {"comment": b"\xff\xc0" * 9},
    ]
    return [*sampled, *(encoded(picture, "JPEG", **o) for o in others), encoded(picture.convert("L"), "JPEG")]


@pytest.mark.parametrize("least", [300, 32, 16, 8])
def test_the_first_rows_are_those_of_the_whole_image(least: int) -> None:
    """Bit by bit, for every coding, at full size and at 1/2, 1/4 and 1/8."""
    width, height = 131, 203
    for data in jpegs(width, height):
        assert size_of(data) == (height, width)
        for rows in (*range(64, 100, 3), 160, 186, 194, 203):
            box = (0, 0, rows, width)
            factor = max(f for f in (1, 2, 4, 8) if f == 1 or min(rows, width) >= f * least)
            smaller = {} if factor == 1 else {"min_height": -(-height // factor), "min_width": -(-width // factor)}
            whole = simplejpeg.decode_jpeg(data, "RGB", **smaller)
            assert whole.shape[0] == -(-height // factor)
            part, _ = decode_box(data, box, least)
            assert part.shape == (-(-rows // factor), -(-width // factor), 3) and np.array_equal(part, whole[: len(part)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_box_at_full_size(kind: str) -> None:
    data = encoded(photograph(120, 90), kind)
    for top, left, height, width in ((0, 0, 90, 120), (5, 7, 40, 50), (70, 100, 20, 20), (89, 119, 1, 1)):
        part, extent = decode_box(data, (top, left, height, width), 64)
        assert extent is None and np.array_equal(part, decode(data)[top : top + height, left : left + width])


def test_a_smaller_decode_never_has_to_be_enlarged() -> None:
    data = encoded(photographs()[0], "JPEG", quality=90)
    random, factors = np.random.default_rng(0), set()
    for _ in range(60):
        height, width, least = random.integers(8, 428), random.integers(8, 641), int(random.choice([8, 15, 32, 61]))
        top, left = random.integers(0, 428 - height), random.integers(0, 641 - width)
        part, extent = decode_box(data, (int(top), int(left), int(height), int(width)), least)
        assert min(part.shape[:2]) >= min(least, height, width)
        factor = reduction(int(height), int(width), least)
        assert factor in (1, 2, 4, 8) and (factor == 8 or min(height, width) < 2 * factor * least)
        assert part.shape[:2] == (-(-height // factor), -(-width // factor))
        assert extent == (None if factor == 1 else (height / factor, width / factor))
        factors.add(factor)
    assert factors == {1, 2, 4, 8}


def moved(view: np.ndarray, picture: Picture.Image, box: tuple[int, int, int, int]) -> tuple[float, float]:
    """By how many of its own pixels what `view` shows lies below and to the right of the box (top, left, height, width) of the picture:
    Lucas and Kanade's least squares (1981), repeated until nothing is left."""
    top, left, height, width = box
    size, down, right = len(view), 0.0, 0.0
    for _ in range(4):
        y, x = top + down * height / size, left + right * width / size
        there = (max(0, x), max(0, y), min(picture.width, x + width), min(picture.height, y + height))
        expected = np.asarray(picture.resize((size, size), Picture.Resampling.BICUBIC, there)).astype(float)
        inner = np.s_[4:-4, 4:-4]
        slopes = np.stack([slope[inner].ravel() for slope in np.gradient(expected, axis=(0, 1))], 1)
        step = np.linalg.lstsq(slopes, (view - expected)[inner].ravel(), rcond=None)[0]
        down, right = down + step[0], right + step[1]
    return down, right


BOXES = [(8, 8, 300, 301), (40, 72, 310, 303), (96, 152, 303, 307), (0, 0, 427, 511), (24, 40, 401, 413), (0, 208, 302, 304)]


@pytest.mark.parametrize(
    ("least", "factor", "most"), [(230, 1, 0.1), (150, 2, 2.6), (110, 2, 1.7), (75, 4, 2.7), (55, 4, 1.8), (37, 8, 3.6)]
)
def test_a_smaller_decode_is_at_its_place(least: int, factor: int, most: float) -> None:
    """Resized, it is what Pillow makes of the box at full size, less than a fiftieth of a pixel beside it, though heights and widths
    are no multiples of the factor. What is left is the filter, libjpeg's; edges rounded to whole pixels made 1.5 times as much."""
    places, differences = [], []
    for picture in photographs():
        data = encoded(picture, "JPEG", quality=95)
        decoded = Picture.open(io.BytesIO(data)).convert("RGB")
        for top, left, height, width in BOXES:
            left = min(left, (picture.width - width) // 8 * 8)
            assert reduction(height, width, least) == factor
            part, extent = decode_box(data, (top, left, height, width), least)
            view = torch.empty(least, least, 3, dtype=torch.uint8)
            resize_into(torch.from_numpy(np.ascontiguousarray(part)), view, extent)
            whole = decoded.crop((left, top, left + width, top + height)).resize((least, least), Picture.Resampling.BICUBIC)
            differences.append(apart(view, whole).mean())
            places.append(moved(view.numpy(), decoded, (top, left, height, width)))
    assert np.abs(places).mean(axis=0).max() < 0.02 and np.mean(differences) < most


def test_an_estimate_of_the_place_is_one() -> None:
    picture, box = photographs()[0], (40, 72, 300, 304)
    for down, right in ((0.0, 0.0), (0.1, -0.3), (-0.5, 0.02)):
        there = (72 + right * 304 / 75, 40 + down * 4, 376 + right * 304 / 75, 340 + down * 4)
        view = np.asarray(picture.resize((75, 75), Picture.Resampling.BICUBIC, there))
        assert moved(view, picture, box) == pytest.approx((down, right), abs=0.01)


def test_a_box_between_pixels_begins_with_the_one_before() -> None:
    data = encoded(photographs()[0], "JPEG")
    asked, given = (decode_box(data, (top, left, 301, 303), 75) for top, left in ((43, 70), (40, 68)))
    assert np.array_equal(asked[0], given[0]) and asked[1] == given[1] == (75.25, 75.75)


def test_a_file_that_was_cut_off_is_refused_even_where_its_first_rows_are_whole() -> None:
    data = encoded(photographs()[0], "JPEG")
    assert decode_box(data, (0, 0, 32, 32), 32)[0].shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r"."):
        decode_box(data[:-100], (0, 0, 32, 32), 32)


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 1.0)
    out = normalize(images, mean, std)
    assert out.shape == (2, 3, 4, 5) and out.dtype == torch.float32
    expected = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(out.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16

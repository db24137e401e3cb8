from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.config.shard import ShardImages
from pipeline.shards.images import Checked, Dropped, check_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
Photo = Callable[..., Image.Image]
Encoded = Callable[..., bytes]


def check(data: bytes, **images: object) -> Checked:
    checked = check_image(data, ShardImages.model_validate(images))
    assert isinstance(checked, Checked), checked
    with Image.open(io.BytesIO(checked.data)) as image:
        assert image.size == (checked.width, checked.height)
        assert image.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[checked.extension]
    return checked


def dropped(data: bytes, **images: object) -> str:
    result = check_image(data, ShardImages.model_validate(images))
    assert isinstance(result, Dropped)
    assert result.detail and " at 0x" not in result.detail
    return result.reason


def pixels(checked: Checked) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(checked.data))).astype(int)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_fine_image_keeps_its_bytes(photo: Photo, encoded: Encoded, kind: str, extension: str, mode: str) -> None:
    data = encoded(photo().convert(mode), kind)
    assert check(data) == Checked(data, extension, 48, 32)
    assert check(data, resize={"pixels": 32}).data == data
    assert check(data, resize={"pixels": 100}).data == data  # never enlarged unasked


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_become_png(photo: Photo, encoded: Encoded, kind: str) -> None:
    checked = check(encoded(photo(), kind))
    assert checked.extension == "png"
    assert abs(pixels(checked) - np.asarray(photo())).max() <= (60 if kind == "GIF" else 0)


def test_reasons(photo: Photo, encoded: Encoded) -> None:
    assert dropped(b"") == "empty"
    assert dropped(b"<html>not found</html>") == "not-an-image"
    assert dropped(encoded(photo(), "JPEG"), max_pixels=48 * 32 - 1) == "too-large"
    assert dropped(encoded(photo(), "PNG"), min_pixels=33) == "too-small"
    assert dropped(encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")) == "unsupported"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_truncated_file_is_corrupt(photo: Photo, encoded: Encoded, kind: str, share: float) -> None:
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noisy, kind)
    assert dropped(data[: int(len(data) * share)]) == "corrupt"


def test_a_header_cut_off_is_corrupt(photo: Photo, encoded: Encoded) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        assert dropped(encoded(photo(), kind)[:12]) == "corrupt"


def test_bombs_are_refused_before_they_are_decoded() -> None:
    assert dropped(png_header(60000, 60000)) == "too-large"  # beyond Pillow's error
    assert dropped(png_header(10000, 10000)) == "too-large"  # beyond Pillow's warning
    assert dropped(png_header(20000, 20000), max_pixels=2**31) == "corrupt"  # the limit is the config's, not Pillow's
    assert Image.MAX_IMAGE_PIXELS is not None


def test_enlarging_a_sliver_does_not_make_a_bomb(encoded: Encoded) -> None:
    sliver = encoded(Image.new("RGB", (2, 4000)), "PNG")
    assert dropped(sliver, resize={"pixels": 1000, "enlarge": True}) == "too-large"


def test_damage_inside_is_found(photo: Photo, encoded: Encoded) -> None:
    noisy = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    png = bytearray(encoded(noisy, "PNG"))
    png[-30] ^= 0xFF  # in the last rows: the chunk's checksum alone tells
    assert dropped(bytes(png)) == "corrupt"


def test_stray_bytes_in_a_jpeg_are_cleaned(photo: Photo, encoded: Encoded) -> None:
    data = encoded(photo(), "JPEG")
    checked = check(data[:-2] + b"\0\0\0" + data[-2:])  # "extraneous bytes before marker": common, harmless
    assert checked.extension == "jpg"
    assert check(checked.data).data == checked.data
    assert abs(pixels(checked) - np.asarray(photo())).mean() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_upright(photo: Photo, encoded: Encoded, kind: str, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that lay an upright image down
    stored = photo() if orientation == 1 else photo().transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif)
    checked = check(data)
    assert (checked.width, checked.height) == (48, 32)
    assert abs(pixels(checked) - np.asarray(photo())).mean() < 5
    assert (checked.data == data) == (orientation == 1 and kind != "TIFF")
    assert check(checked.data).data == checked.data  # not turned twice


def test_damaged_exif_does_not_cost_the_image(photo: Photo, encoded: Encoded) -> None:
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")
    assert check(data).data == data


def test_cmyk_jpeg_becomes_rgb(encoded: Encoded) -> None:
    checked = check(encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"))
    assert checked.extension == "jpg"
    assert abs(pixels(checked)[10, 10] - [255, 0, 0]).max() < 5


def test_16_bit_grey_is_scaled(encoded: Encoded) -> None:
    grey = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    checked = check(encoded(Image.fromarray(grey), "PNG"))
    assert abs(pixels(checked)[..., 0] - grey / 257).max() <= 0.51


def test_transparent_pixels_lie_on_white(encoded: Encoded) -> None:
    rgba = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    rgba.putpixel((3, 3), (200, 0, 0, 255))
    palette = rgba.convert("RGB").convert("P")
    for data in (encoded(rgba, "PNG"), encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))):
        checked = check(data)
        assert pixels(checked)[0, 0].tolist() == [255, 255, 255]
        assert pixels(checked)[3, 3, 0] > 150 and pixels(checked)[3, 3, 1] < 60


def test_an_animation_gives_its_first_frame(photo: Photo, encoded: Encoded) -> None:
    frames = [photo(seed=n) for n in range(3)]
    for kind in ("WEBP", "PNG"):
        checked = check(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})))
        assert checked.extension == "png"
        assert (pixels(checked) == np.asarray(frames[0])).all()


def test_random_damage_never_escapes(photo: Photo, encoded: Encoded) -> None:
    random = np.random.default_rng(2)
    images = ShardImages.model_validate({"resize": {"pixels": 16}})
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encoded(photo(), kind)
        for _ in range(150):
            damaged = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 6)):
                damaged[place] = random.integers(0, 256)
            assert isinstance(check_image(bytes(damaged[: random.integers(1, len(data) + 1)]), images), Checked | Dropped)
            assert isinstance(check_image(bytes(damaged), images), Checked | Dropped)

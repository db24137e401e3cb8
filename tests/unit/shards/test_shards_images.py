from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_resize(encoded: Encoded, kind: str) -> None:
    y, x = np.mgrid[0:600, 0:900]
    large = Image.fromarray(np.stack([x % 256 // 2 + 50, y % 200, (x + y) // 8 % 256], axis=-1).astype(np.uint8))
    data = encoded(large, kind, **({"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}))
    checked = check(data, resize={"pixels": 64})
    assert (checked.width, checked.height, checked.extension) == (96, 64, "jpg" if kind == "JPEG" else "png")
    expected = np.asarray(large.resize((96, 64), Image.Resampling.BICUBIC)).astype(int)
    assert abs(pixels(checked) - expected).mean() < 4  # a scaled decode and JPEG's loss; nothing for the others
    assert kind == "JPEG" or abs(pixels(checked) - expected).mean() < 0.1
    assert check(data, resize={"pixels": 64}) == checked


def test_bounds_on_bytes_come_first(photo: Photo, encoded: Encoded) -> None:
    data = encoded(photo(), "PNG")
    assert check(data, min_bytes=len(data), max_bytes=len(data)).data == data
    assert dropped(data, min_bytes=len(data) + 1) == "too-short"
    assert dropped(data, max_bytes=len(data) - 1) == "too-long"
    assert dropped(b"", min_bytes=100) == "empty"
    assert dropped(b"<html>" * 100, max_bytes=100) == "too-long"


def test_bounds_on_the_shape(encoded: Encoded) -> None:
    for size in ((90, 30), (30, 90)):
        data = encoded(Image.new("RGB", size), "JPEG")
        assert check(data, max_aspect=3).data == data
        assert dropped(data, max_aspect=2.99) == "bad-aspect"
    assert dropped(png_header(30000, 2), max_aspect=100) == "bad-aspect"  # before it is decoded: it could not be


@pytest.mark.parametrize("side", ["shorter", "longer", "crop"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_every_way_to_resize(photo: Photo, encoded: Encoded, kind: str, side: str) -> None:
    checked = check(encoded(photo(), kind), resize={"side": side, "pixels": 24})
    assert (checked.width, checked.height) == {"shorter": (36, 24), "longer": (24, 16), "crop": (24, 24)}[side]
    assert checked.extension == ("jpg" if kind == "JPEG" else "png")
    kept = check(encoded(photo(), kind), resize={"side": side, "pixels": 64})
    assert (kept.width, kept.height) == ((32, 32) if side == "crop" else (48, 32))  # a crop is square, whatever its size
    larger = check(encoded(photo(), kind), resize={"side": side, "pixels": 64, "enlarge": True})
    assert (larger.width, larger.height) == {"shorter": (96, 64), "longer": (64, 43), "crop": (64, 64)}[side]


def ink(cmyk: Image.Image) -> np.ndarray:
    return np.asarray(cmyk.convert("RGB")).astype(int)


def test_ycck_jpeg_becomes_rgb(photo: Photo) -> None:
    inks = photo().convert("CMYK")
    data = simplejpeg.encode_jpeg(255 - np.asarray(inks), quality=95, colorspace="CMYK", colorsubsampling="444")  # Adobe's are inverted
    assert b"Adobe" in data and data[data.index(b"Adobe") + 11] == 2  # its transform: YCCK
    checked = check(data)
    assert checked.extension == "jpg" and abs(pixels(checked) - ink(inks)).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours(photo: Photo, encoded: Encoded, kind: str, mode: str) -> None:
    picture = photo().convert(mode)
    checked = check(encoded(picture, kind))
    assert checked.extension == "png"
    assert (pixels(checked) == np.asarray(picture if mode == "L" and kind == "PNG" else picture.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_lies_on_white(photo: Photo, encoded: Encoded, kind: str) -> None:
    for mode in ("LA", "RGBA"):
        picture = photo().convert(mode)
        picture.putalpha(51)  # a fifth
        checked = check(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {})))
        expected = 255 * 0.8 + np.asarray(photo().convert(mode[:-1]).convert("RGB")) * 0.2
        assert checked.extension == "png" and abs(pixels(checked) - expected).max() <= 1.5


def test_16_bits_of_other_kinds(encoded: Encoded) -> None:
    grey = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    checked = check(encoded(Image.fromarray(grey), "TIFF"))
    assert abs(pixels(checked)[..., 0] - grey / 257).max() <= 0.51

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for colour, channels in ((2, 3), (4, 2), (6, 4)):  # RGB, grey and alpha, RGB and alpha (ISO 15948, 11.2.2)
        rows = np.broadcast_to(grey[..., None], (20, 20, channels)).astype(">u2").copy()
        if channels != 3:
            rows[..., -1] = 65535
        body = b"".join(b"\0" + row.tobytes() for row in rows)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 16, colour, 0, 0, 0))
        checked = check(data + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))
        assert checked.extension == "png" and checked.data[24] == 8
        assert abs(pixels(checked)[..., 0] - grey / 257).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several_frames(photo: Photo, encoded: Encoded, kind: str) -> None:
    frames = [photo(seed=n).convert("P" if kind == "GIF" else "RGB") for n in range(4)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 4  # type: ignore[attr-defined]
    for how in ("decode", "ends"):
        checked = check(data, check=how)
        assert checked.extension == "png"
        assert (pixels(checked) == np.asarray(frames[0].convert("RGB"))).all()


def test_a_jpeg_of_too_many_scans_is_refused(photo: Photo, encoded: Encoded) -> None:
    """Each is a pass over the whole picture: a small file can keep a decoder busy for hours."""
    data = encoded(photo(), "JPEG", progressive=True)
    assert check(data).data == data
    last = data.rindex(b"\xff\xda")
    assert dropped(data[:-2] + data[last:-2] * 200 + data[-2:]) == "corrupt"

"""One image file as bytes in: bytes fit for a shard out, or the reason why not.

The header is read first, so that an image too large or too small is never decoded; then all of it is decoded, because a
truncated file has a perfect header. An image that needs no change keeps its own bytes.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import zlib
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.config.shard import Resize, ShardImages

JPEG_QUALITY = 95
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that a shard holds as they are
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
# What Pillow's plugins raise on damaged files.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
# Of libjpeg's warnings, those after which pixels are missing; the others (stray bytes, an odd JFIF version) are harmless.
_DAMAGE = ("premature end", "bad huffman", "bad arithmetic", "instead of rst")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_open_lock = threading.Lock()


@dataclass(frozen=True)
class Checked:
    """An image for a shard: `extension` is jpg, png or webp, by content; sizes are in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


@dataclass(frozen=True)
class Dropped:
    """Why a sample is left out. Reasons of images: empty, not-an-image, too-large, too-small, corrupt, unsupported."""

    reason: str
    detail: str


class Drop(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.dropped = Dropped(reason, detail)


def check_image(data: bytes, images: ShardImages) -> Checked | Dropped:
    """Verify, and where the config or the file needs it, turn upright, convert to RGB and resize.

    Transparent pixels are laid on white paper; 16-bit grey is scaled to 8 bits. Only the first frame is kept. A JPEG stays
    a JPEG (quality 95), everything else that has to be encoded anew becomes PNG. The same bytes give the same bytes.
    """
    try:
        return _check(data, images)
    except Drop as e:
        return e.dropped
    except Image.DecompressionBombError as e:
        return Dropped("too-large", str(e))
    except BROKEN as e:
        return Dropped("corrupt", describe_error(e))


def _check(data: bytes, images: ShardImages) -> Checked:
    if not data:
        raise Drop("empty", "the file has no bytes")
    with open_image(data) as image:
        _check_size(image.size, images)
        size = resized(image.size, images.resize)
        if size[0] * size[1] > images.max_pixels:
            raise Drop("too-large", f"would be {size[0]}x{size[1]}, the most is {images.max_pixels} pixels")
        if image.format == "JPEG":
            return _check_jpeg(data, image, size)
        if image.format == "PNG":
            with open_image(data) as again:
                again.verify()  # the checksums of all chunks, which decoding does not look at
        still = image.format != "GIF" and getattr(image, "n_frames", 1) == 1
        image.load()
        turn = _orientation(image)
        plain = image.mode in ("RGB", "L") and not image.has_transparency_data and not (image.format == "PNG" and data[24] != 8)
        if image.format in _EXTENSIONS and plain and still and turn is None and size == image.size:
            return Checked(data, _EXTENSIONS[str(image.format)], *image.size)
        return _encode(_finish(_to_rgb(image), size, turn), "png")


def _check_jpeg(data: bytes, image: Image.Image, size: tuple[int, int]) -> Checked:
    turn = _orientation(image)
    pixels = _decode_jpeg(data, image, size) if image.mode in ("RGB", "L") else None
    if pixels is not None and turn is None and size == image.size:
        return Checked(data, "jpg", *image.size)
    return _encode(_finish(_to_rgb(image if pixels is None else Image.fromarray(pixels)), size, turn), "jpg")


def _decode_jpeg(data: bytes, image: Image.Image, size: tuple[int, int]) -> np.ndarray | None:
    """Pixels at full size, or at 1/2, 1/4 or 1/8 where that is at least twice `size`; None where only Pillow can read it."""
    width, height = image.size
    factor = next((f for f in (8, 4, 2) if width >= 2 * f * size[0] and height >= 2 * f * size[1]), 1)
    least = {} if factor == 1 else {"min_width": -(-width // factor), "min_height": -(-height // factor)}
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="gray" if image.mode == "L" else "rgb", **least)
    except ValueError as e:
        if is_damage(e):
            raise Drop("corrupt", describe_error(e)) from e
        return None
    return pixels[..., 0] if image.mode == "L" else pixels


def is_damage(error: ValueError) -> bool:
    """Whether what libjpeg complains of means that pixels are missing."""
    return any(words in str(error).lower() for words in _DAMAGE)


def open_image(data: bytes) -> Image.Image:
    """Header only. Pillow's own limit on pixels is lifted meanwhile: it would warn, and refuse what the config allows."""
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.UnidentifiedImageError as e:
            if data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
                raise Drop("corrupt", "the header is damaged or cut off") from e
            raise Drop("not-an-image", f"begins with {data[:16]!r}") from e
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.format == "MPO":  # a JPEG with further pictures behind it
        image.format = "JPEG"
    return image


def _check_size(size: tuple[int, int], images: ShardImages) -> None:
    width, height = size
    if width * height > images.max_pixels:
        raise Drop("too-large", f"{width}x{height}, the most is {images.max_pixels} pixels")
    if min(size) < images.min_pixels:
        raise Drop("too-small", f"{width}x{height}, the shorter side needs {images.min_pixels} pixels")


def resized(size: tuple[int, int], resize: Resize | None) -> tuple[int, int]:
    """(width, height) after `resize`: the chosen side exact, the other rounded, never larger unless `enlarge`."""
    if resize is None:
        return size
    side = min(size) if resize.side == "shorter" else max(size)
    if side == resize.pixels or (side < resize.pixels and not resize.enlarge):
        return size
    width, height = (max(1, (n * resize.pixels + side // 2) // side) for n in size)
    return width, height


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How to turn the image upright. A damaged EXIF block says nothing about the pixels, so it counts as upright."""
    try:
        return _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except BROKEN:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):
        raise Drop("unsupported", f"pixels of kind {image.mode!r} have no agreed range of brightness")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _finish(image: Image.Image, size: tuple[int, int], turn: Image.Transpose | None) -> Image.Image:
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image if turn is None else image.transpose(turn)


def _encode(image: Image.Image, extension: str) -> Checked:
    if extension == "jpg":
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    else:
        image.info.clear()  # the colour profile of the pixels as they were
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=6)
        data = buffer.getvalue()
    return Checked(data, extension, *image.size)


def describe_error(error: BaseException) -> str:
    """The error's own words, without memory addresses, which would differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).strip()[:200] or type(error).__name__

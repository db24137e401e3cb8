"""One image file as bytes in: bytes fit for a shard out, or the reason why not.

The header is read first, so that an image too large, too small or too long is never decoded; then all of it is decoded,
because a truncated file has a perfect header, unless `check: ends` says that its end will do (`ends.py`). An image that needs
no change keeps its own bytes. What happens to pixels is in `pixels.py`.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from dataclasses import dataclass

from PIL import Image

from pipeline.config.shard import ShardImages
from pipeline.shards import ends, pixels
from pipeline.shards.dropped import Drop as Drop
from pipeline.shards.dropped import Dropped as Dropped
from pipeline.shards.dropped import describe_error as describe_error
from pipeline.shards.pixels import Change

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
_SCANS = 100  # of one JPEG; encoders make about ten, and each of them is a pass over the whole picture
_open_lock = threading.Lock()


@dataclass(frozen=True)
class Checked:
    """An image for a shard: `extension` is jpg, png or webp, by content; sizes are in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def check_image(data: bytes, images: ShardImages) -> Checked | Dropped:
    """Verify, and where the config or the file needs it, turn upright, convert to RGB, resize and crop.

    Transparent pixels are laid on white paper; 16-bit grey is scaled to 8 bits. Only the first frame is kept. A JPEG stays
    a JPEG (of `images.quality`), everything else that has to be encoded anew becomes PNG. The same bytes give the same bytes.
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
    _check_bytes(len(data), images)
    if (canvas := ends.webp_size(data)) is not None:  # before Pillow's WebP sets memory aside for it
        _check_size(canvas, images)
    with open_image(data) as image:
        _check_size(image.size, images)
        width, height = Change.of(image.size, images.resize).scaled
        if width * height > images.max_pixels:
            raise Drop("too-large", f"would be {width}x{height}, the most is {images.max_pixels} pixels")
        return _check_jpeg(data, image, images) if image.format == "JPEG" else _check_other(data, image, images)


def _check_jpeg(data: bytes, image: Image.Image, images: ShardImages) -> Checked:
    if (scans := data.count(b"\xff\xda")) > _SCANS:
        raise Drop("corrupt", f"it has {scans} scans, the most is {_SCANS}")
    change = Change.of(image.size, images.resize, _orientation(image))
    is_plain = image.mode in ("RGB", "L")
    if is_plain and change.is_none:
        is_kept = (images.check == "ends" and ends.jpeg_ends(data)) or pixels.is_whole_jpeg(data, image.size)
        if is_kept:
            return Checked(data, "jpg", *image.size)
    decoded = pixels.decode_jpeg(data, image.size, change.scaled) if is_plain else None
    made = change.apply(pixels.to_rgb(image) if decoded is None else decoded)
    return Checked(pixels.encode_jpeg(made, images.quality, images.subsampling), "jpg", made.shape[1], made.shape[0])


def _check_other(data: bytes, image: Image.Image, images: ShardImages) -> Checked:
    kind = str(image.format)
    is_plain = kind in _EXTENSIONS and image.mode in ("RGB", "L") and not image.has_transparency_data
    is_plain = is_plain and getattr(image, "n_frames", 1) == 1 and not (kind == "PNG" and data[24] != 8)
    if images.check == "ends" and is_plain and ends.ends(data, kind) and Change.of(image.size, images.resize, _orientation(image)).is_none:
        return Checked(data, _EXTENSIONS[kind], *image.size)
    if kind == "PNG":
        with open_image(data) as again:
            again.verify()  # the checksums of all chunks, which decoding does not look at
    image.load()
    change = Change.of(image.size, images.resize, _orientation(image))
    if is_plain and change.is_none and not image.has_transparency_data:
        return Checked(data, _EXTENSIONS[kind], *image.size)
    made = change.apply(pixels.to_rgb(image))
    return Checked(pixels.encode_png(made), "png", made.shape[1], made.shape[0])


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


def _check_bytes(count: int, images: ShardImages) -> None:
    if not count:
        raise Drop("empty", "the file has no bytes")
    if count < images.min_bytes:
        raise Drop("too-short", f"{count} bytes, the least is {images.min_bytes}")
    if count > images.max_bytes:
        raise Drop("too-long", f"{count} bytes, the most is {images.max_bytes}")


def _check_size(size: tuple[int, int], images: ShardImages) -> None:
    """The size as it is stored: none of these bounds changes as an image is turned upright."""
    width, height = size
    if width * height > images.max_pixels:
        raise Drop("too-large", f"{width}x{height}, the most is {images.max_pixels} pixels")
    if min(size) < images.min_pixels:
        raise Drop("too-small", f"{width}x{height}, the shorter side needs {images.min_pixels} pixels")
    if images.max_aspect is not None and max(size) > images.max_aspect * min(size):
        raise Drop("bad-aspect", f"{width}x{height}, the longer side may be {images.max_aspect:g} times the shorter")


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8. A damaged EXIF block says nothing about the pixels, so it counts as upright."""
    try:
        found = image.getexif().get(0x0112, 1)
    except BROKEN:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1

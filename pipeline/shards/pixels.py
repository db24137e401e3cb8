"""Pixels of one image: decoded, resized, turned upright, cropped, encoded.

H height, W width; pixels are uint8 RGB, (H, W, 3); sizes are (width, height), as Pillow has them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.config.shard import Resize
from pipeline.shards.dropped import Drop, describe_error

Size = tuple[int, int]

# Of libjpeg's warnings, those after which pixels are missing; the others (stray bytes, an odd JFIF version) are harmless.
_DAMAGE = ("premature end", "bad huffman", "bad arithmetic", "instead of rst")
# A JPEG is decoded at 1/factor of its size where that is so many times the size it gets. libjpeg's small transforms are another
# filter than ours: with what is left to ours, photographs differ by less than 1/255 from those decoded whole. At factors other
# than these, libjpeg-turbo has no vector code.
_LEFT = {8: 3.0, 4: 2.5, 2: 2.0}
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}


@dataclass(frozen=True)
class Change:
    """What is done to an image of `size` as it is stored: resized to `scaled`, turned by its EXIF `orientation` (1: it is
    upright), then cut to the middle `square` pixels of both sides, where that is not None."""

    size: Size
    scaled: Size
    orientation: int = 1
    square: int | None = None

    @staticmethod
    def of(size: Size, resize: Resize | None, orientation: int = 1) -> Change:
        """The chosen side exact, the other rounded; never larger unless `enlarge`. Turning an image changes none of it."""
        if resize is None:
            return Change(size, size, orientation)
        side = max(size) if resize.side == "longer" else min(size)
        is_kept = side == resize.pixels or (side < resize.pixels and not resize.enlarge)
        pixels = side if is_kept else resize.pixels
        width, height = (max(1, (n * pixels + side // 2) // side) for n in size)
        square = pixels if resize.side == "crop" and width != height else None
        return Change(size, (width, height), orientation, square)

    @property
    def is_none(self) -> bool:
        return self.scaled == self.size and self.orientation not in _UPRIGHT and self.square is None

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """`pixels` may also be those of the whole image at 1/2, 1/4 or 1/8 of its size."""
        pixels = _resize(pixels, self.size, self.scaled)
        if self.orientation in _UPRIGHT:
            pixels = _UPRIGHT[self.orientation](pixels)
        if self.square is not None:
            top, left = (pixels.shape[0] - self.square) // 2, (pixels.shape[1] - self.square) // 2
            pixels = pixels[top : top + self.square, left : left + self.square]
        return np.ascontiguousarray(pixels)


def prepare() -> None:
    """Import what resizes, torch, which takes seconds: before hosts wait for us, and only where something is resized."""
    import pipeline.shards.resample

    assert pipeline.shards.resample


def _resize(pixels: np.ndarray, whole: Size, size: Size) -> np.ndarray:
    """Bicubic and antialiased; `whole` is the size of the image at full scale."""
    (width, height), have = size, (pixels.shape[1], pixels.shape[0])
    if have == size and have == whole:
        return pixels
    import torch  # see `prepare`

    from pipeline.shards.resample import resize_into

    out = np.empty((height, width, 3), np.uint8)
    if have == whole:
        resize_into(torch.from_numpy(pixels), torch.from_numpy(out))
    else:
        factor = next(f for f in (2, 4, 8) if have == (-(-whole[0] // f), -(-whole[1] // f)))
        resize_into(torch.from_numpy(pixels), torch.from_numpy(out), (whole[1] / factor, whole[0] / factor))
    return out


def decode_jpeg(data: bytes, size: Size, scaled: Size) -> np.ndarray | None:
    """A JPEG of `size`, at full size or at 1/2, 1/4 or 1/8 where `scaled` is small enough; None where only Pillow can read it.

    Raises Drop where pixels are missing.
    """
    left = min(size[0] / scaled[0], size[1] / scaled[1])
    factor = next((f for f, least in _LEFT.items() if left >= f * least), 1)
    return _decode_at(data, size, factor)


def is_whole_jpeg(data: bytes, size: Size) -> bool:
    """Decode all of a JPEG's data, to nothing; whether libjpeg reads it without a complaint. Raises Drop where pixels are missing.

    At 1/8 of its size, since it is the data that can be damaged; what turns them into pixels cannot fail.
    """
    return _decode_at(data, size, 8) is not None


def _decode_at(data: bytes, size: Size, factor: int) -> np.ndarray | None:
    least = {} if factor == 1 else {"min_width": -(-size[0] // factor), "min_height": -(-size[1] // factor)}
    try:
        return simplejpeg.decode_jpeg(data, colorspace="rgb", **least)
    except ValueError as e:
        if is_damage(e):
            raise Drop("corrupt", describe_error(e)) from e
        return None


def is_damage(error: ValueError) -> bool:
    """Whether what libjpeg complains of means that pixels are missing."""
    return any(words in str(error).lower() for words in _DAMAGE)


def to_rgb(image: Image.Image) -> np.ndarray:
    """The first frame: transparent pixels laid on white paper, 16-bit grey scaled to 8 bits. Raises Drop for kinds without a meaning."""
    image.load()
    if image.mode.startswith("I;16"):
        grey = ((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F", "LAB"):
        raise Drop("unsupported", f"pixels of kind {image.mode!r} have no agreed range of brightness")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def encode_jpeg(pixels: np.ndarray, quality: int, subsampling: str) -> bytes:
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling=subsampling)


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()

"""Image bytes to pixels, and the view of an image that evaluation uses.

Shapes: H height, W width, P model input; pixels are uint8 RGB, (H, W, 3), until `normalize` on the device. All of it may
run in several threads at once: decoding and resizing release the interpreter's lock, and nothing before `normalize` starts
threads of its own (copies are numpy's, as torch's would).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from PIL import Image

from pipeline.shards.pixels import is_damage
from pipeline.shards.resample import resize_into as resize_into

_BROKEN = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on damaged files, beside ValueError
_OTHERS = ("PNG", "WEBP")  # what shards hold beside JPEG
_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # frame headers, SOF: baseline, extended, progressive
_BELOW = 8  # rows of pixels, more than colour is ever interpolated from


def decode(data: bytes) -> torch.Tensor:
    """JPEG, PNG or WebP bytes to uint8 (H, W, 3). Raises ValueError for bytes that are none of these."""
    return torch.from_numpy(_decode_jpeg(data) if data[:2] == _JPEG else _decode_other(data))


def size_of(data: bytes) -> tuple[int, int]:
    """(H, W) by the header alone. Raises ValueError."""
    if data[:2] == _JPEG:
        at = _frame(data)
        return data[at] << 8 | data[at + 1], data[at + 2] << 8 | data[at + 3]
    try:
        with Image.open(io.BytesIO(data), formats=_OTHERS) as image:
            return image.height, image.width
    except _BROKEN as e:
        raise ValueError(f"not a readable image ({e})") from e


def reduction(height: int, width: int, least: int) -> int:
    """1, 2, 4 or 8: the part of a JPEG is decoded at 1 / so much of its size, where it still has `least` pixels a side."""
    ratio = min(height, width) // least
    # libjpeg-turbo has vector code for these factors alone; at others it is slower than at full size.
    return 8 if ratio >= 8 else 4 if ratio >= 4 else 2 if ratio >= 2 else 1


def decode_box(
    data: bytes, box: tuple[int, int, int, int], least: int, is_sound: bool = True
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """The part `box` (top, left, height, width; in pixels of the whole image) as uint8 (h, w, 3), a view of what was decoded; and
    the height and width of the box in these pixels, for `resize_into`, where they are not h and w.

    A JPEG is decoded at 1 / `reduction` of its size, and only down to the part's last row, where `is_sound`. There a box begins
    with a whole pixel: its top and left are multiples of the reduction, or moved to the one before. Its height and width are
    kept, so of the last row and column a part may lie outside. Raises ValueError.
    """
    top, left, height, width = box
    if data[:2] != _JPEG:
        return _decode_other(data)[top : top + height, left : left + width], None
    factor = reduction(height, width, least)
    top, left = top // factor, left // factor
    bottom, right = top + -(-height // factor), left + -(-width // factor)
    pixels = _decode_rows(data, bottom if is_sound else 1 << 16, factor)[top:bottom, left:right]
    return pixels, None if factor == 1 else (height / factor, width / factor)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(H, W, 3) to (height, width, 3), uint8, bicubic and antialiased (Pillow's filter)."""
    if image.shape[:2] == (height, width):
        return image
    out = torch.empty(height, width, 3, dtype=torch.uint8)
    resize_into(image, out)
    return out


def evaluation_view(image: torch.Tensor, pixels: int) -> torch.Tensor:
    """Resize the shorter side to P, crop the centre: (P, P, 3)."""
    height, width = image.shape[:2]
    factor = pixels / min(height, width)
    image = resize(image, max(pixels, round(height * factor)), max(pixels, round(width * factor)))
    top, left = (image.shape[0] - pixels) // 2, (image.shape[1] - pixels) // 2
    return image[top : top + pixels, left : left + pixels]


def evaluation_view_of(data: bytes, pixels: int, out: torch.Tensor) -> None:
    """`evaluation_view` of image bytes into `out` (P, P, 3), decoded at full size, as Pillow would. Raises ValueError."""
    image = decode(data)
    if image.shape[0] == image.shape[1]:
        resize_into(image, out)
    else:
        out.numpy()[:] = evaluation_view(image, pixels).numpy()


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (B, H, W, 3) to `dtype` (B, 3, H, W), (x / 255 - mean) / std, on the device of `images`."""
    width = images.shape[2]
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).repeat(width)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).repeat(width)
    # By rows: a CPU takes ten times as long where the innermost dimension is the three channels.
    return images.float().flatten(2).mul_(scale).add_(shift).view(images.shape).permute(0, 3, 1, 2).to(dtype)


def _decode_other(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=_OTHERS) as image:
            return np.array(image.convert("RGB"))
    except _BROKEN as e:
        raise ValueError(f"not a readable image ({e})") from e


def _decode_rows(data: bytes, rows: int, factor: int) -> np.ndarray:
    """The JPEG at 1 / `factor` of its size, at least its first `rows` rows of that size: (h, ceil(W / factor), 3).

    No library here decodes a part, but a frame header that names a smaller height makes libjpeg stop there. What comes after
    is a warning, so warnings are let pass: the caller has compared the bytes with their checksum, and a file that was cut
    off lacks its end mark.
    """
    at = _frame(data)
    height, width = data[at] << 8 | data[at + 1], data[at + 2] << 8 | data[at + 3]
    enough = rows * factor + _BELOW
    cut = enough < height and data.endswith(_JPEG_END)
    if cut:
        data, height = data[:at] + enough.to_bytes(2, "big") + data[at + 2 :], enough
    least = {} if factor == 1 else {"min_height": -(-height // factor), "min_width": -(-width // factor)}
    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False, **least) if cut else _decode_jpeg(data, **least)


def _decode_jpeg(data: bytes, **least: int) -> np.ndarray:
    """Raises ValueError where pixels are missing; libjpeg's other complaints, such as of stray bytes, are let pass."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", **least)
    except ValueError as e:
        if is_damage(e):
            raise
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False, **least)


def _frame(data: bytes) -> int:
    """Where a JPEG's frame header holds its height and width, two bytes each (ITU-T T.81, B.2.2)."""
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        kind = data[at + 1]
        if kind in _FRAMES:
            return at + 5
        if kind == 0xFF:  # padding
            at += 1
        elif kind == 0xDA:  # the pixels begin
            break
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    raise ValueError("no frame header of a JPEG that can be read")

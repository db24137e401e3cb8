"""The view of an image that training uses; its randomness is keyed, so it depends on nothing else.

In DeiT's order (arXiv 2012.12877, table 9; timm): crop, flip, RandAugment, colour jitter, random erasing.
Shapes: P model input; pixels are uint8 RGB.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image as Picture

from pipeline.config.inputs import Image
from pipeline.stream.decode import decode_box, evaluation_view_of, reduction, resize_into, size_of
from pipeline.stream.randaugment import color_jitter, rand_augment
from pipeline.stream.random import Random

_ERASED_AREA = (0.02, 1 / 3)  # DeiT's, of the view
_ERASED_RATIO = 0.3
_ATTEMPTS = 10  # draws of a box that fits
_SERIAL = 2**15 - 1  # values that torch handles without further threads


def training_view(data: bytes, how: Image, random: Random, out: torch.Tensor, is_sound: bool = True) -> None:
    """Image bytes to `out`, uint8 (P, P, 3), contiguous: one row of a batch. Raises ValueError for what cannot be decoded.

    `is_sound`: the whole image was decoded once, before it came into a shard, and its bytes are still those; else every
    pixel is decoded, so that damage anywhere is found.
    """
    if how.crop == "none":
        evaluation_view_of(data, how.pixels, out)
    else:
        height, width = size_of(data)
        draw = _resized_crop if how.crop == "random-resized" else _square_crop
        part, extent = decode_box(data, draw(height, width, how, random), how.pixels, is_sound)
        resize_into(torch.from_numpy(np.ascontiguousarray(part)), out, extent)
    if how.flip and random.uniform() < 0.5:
        out.numpy()[:] = _flipped(out.numpy()).numpy()
    if how.rand_augment or how.color_jitter:
        picture = before = Picture.fromarray(out.numpy())
        if how.rand_augment:
            picture = rand_augment(picture, how.rand_augment, how.mean, random)
        if how.color_jitter:
            picture = color_jitter(picture, how.color_jitter, random)
        if picture is not before:
            out.numpy()[:] = np.asarray(picture)
    if how.erase and random.uniform() < how.erase:
        _erase(out, how, random)


def _resized_crop(height: int, width: int, how: Image, random: Random) -> tuple[int, int, int, int]:
    """Inception's crop (arXiv 1409.4842, section 6): a random share of the area at a random aspect ratio; top, left, h, w."""
    for _ in range(_ATTEMPTS):
        area = height * width * random.uniform(*how.scale)
        ratio = math.exp(random.uniform(math.log(how.ratio[0]), math.log(how.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _somewhere(height, width, h, w, how, random)
    w, h = min(width, round(height * how.ratio[1])), min(height, round(width / how.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _square_crop(height: int, width: int, how: Image, random: Random) -> tuple[int, int, int, int]:
    """CLIP (arXiv 2103.00020, section 2.5): a random square as large as the shorter side; top, left, h, w."""
    side = min(height, width)
    return _somewhere(height, width, side, side, how, random)


def _somewhere(height: int, width: int, h: int, w: int, how: Image, random: Random) -> tuple[int, int, int, int]:
    """Drawn in steps of a pixel of the size that a JPEG is decoded at, so that it begins with a whole one, exactly where drawn."""
    step = reduction(h, w, how.pixels)
    return step * random.integer((height - h) // step + 1), step * random.integer((width - w) // step + 1), h, w


def _flipped(part: np.ndarray) -> torch.Tensor:
    """(h, w, 3), left to right, contiguous. By torch, as numpy takes ten times as long; and where torch might use threads, in
    pieces too small for them: on busy cores these cost more than all of the view."""
    image = torch.from_numpy(part)
    if torch.get_num_threads() == 1:
        return image.flip(1)
    out = torch.empty(part.shape, dtype=torch.uint8)
    rows = max(1, _SERIAL // part[0].size)
    for to, piece in zip(out.split(rows), image.split(rows), strict=True):
        to.copy_(piece.flip(1))
    return out


def _erase(view: torch.Tensor, how: Image, random: Random) -> None:
    """Random erasing (arXiv 1708.04896, algorithm 1) with normal noise a pixel, as DeiT: `how.mean` and `how.std`."""
    size = view.shape[0]
    for _ in range(_ATTEMPTS):
        area = size * size * random.uniform(*_ERASED_AREA)
        ratio = math.exp(random.uniform(math.log(_ERASED_RATIO), -math.log(_ERASED_RATIO)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < size and 0 < w < size:
            top, left = random.integer(size - h + 1), random.integer(size - w + 1)
            view.numpy()[top : top + h, left : left + w] = _noise(h * w, how, random).reshape(h, w, 3)
            return


def _noise(count: int, how: Image, random: Random) -> np.ndarray:
    """uint8 (count, 3): round(255 N(mean, std)), clipped, drawn by inverting its distribution on 16 bits a value."""
    bits = (random.uniforms(count) * 2.0**48).astype("<u8").view("<u2").reshape(count, 4)
    noise = np.empty((count, 3), dtype=np.uint8)
    for channel, (mean, std) in enumerate(zip(how.mean, how.std, strict=True)):
        np.take(_levels(mean, std), bits[:, channel], out=noise[:, channel], mode="clip")
    return noise


@lru_cache(maxsize=16)
def _levels(mean: float, std: float) -> np.ndarray:
    """uint8 (65536,): the level at each quantile of round(255 N(mean, std)), clipped."""
    ends = [0.5 * (1 + math.erf((level + 0.5 - 255 * mean) / (255 * std * math.sqrt(2)))) for level in range(255)]
    return np.searchsorted(ends, (np.arange(65536) + 0.5) / 65536).astype(np.uint8)

"""The 64-bit perceptual hash of an image: what is left of it when size, format, quality and brightness change.

The image in grey is made 32 x 32; a bit for each of the 8 x 8 lowest frequencies of its discrete cosine transform tells whether it
lies above their median (Krawetz, "Looks Like It", 2011; the layout is that of ImageHash's `phash`, the first bit the highest). The hash
is a function of the image's bytes alone, as they lie in a shard, and the same on every machine: libjpeg's decoder and Pillow's resizer
count in whole numbers, and so does the transform here. Like the loader, it does not turn images by their EXIF block.
"""

from __future__ import annotations

import math

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.shards import images, pixels

PHASH = "phash"  # the column of an index
BITS = 64
_SIDE = 32  # pixels of the image that is transformed
_LOW = 8  # frequencies a direction
_DECODED = 64  # pixels of the shorter side that a JPEG is decoded to at least; fewer differ in more bits
_MOST = 2**26  # pixels that are decoded
_UNIT = 2**12
# Of 8 frequencies, (8, 32): sums of 32 x 32 products stay far below 2^53, so that float64 has them without rounding, in any order.
_COSINES = np.array(
    [[round(_UNIT * math.cos(math.pi * u * (2 * x + 1) / (2 * _SIDE))) for x in range(_SIDE)] for u in range(_LOW)], dtype=np.float64
)
_TOLD = 24  # of the 63 frequencies above 0 that need a contrast, or the bits tell of noise
_CONTRAST = _UNIT**2 * _SIDE * _SIDE // 4 // 4  # amplitude of a quarter of a grey level


def perceptual_hash(data: bytes) -> int | None:
    """The hash of an image's bytes, 0 to 2^64 - 1.

    None where there is none: the image cannot be decoded, or only at more than 2^26 pixels; or it has too little in it. Of a flat image
    every frequency is 0 but for noise, so all flat images would be near duplicates of each other; without a hash they have equal files
    as their only duplicates.
    """
    try:
        grey = _grey(data)
        return None if grey is None else hash_grey(grey)
    except (*images.BROKEN, images.Drop, Image.DecompressionBombError):
        return None


def hash_grey(grey: Image.Image) -> int | None:
    """The hash of an image of mode L; None where it has too little contrast."""
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_COSINES @ small @ _COSINES.T).ravel()
    if np.count_nonzero(np.abs(low[1:]) >= _CONTRAST) < _TOLD:
        return None
    middle = np.partition(low, (BITS // 2 - 1, BITS // 2))
    above = 2 * low > middle[BITS // 2 - 1] + middle[BITS // 2]
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def _grey(data: bytes) -> Image.Image | None:
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            # Only these factors have vector code.
            factor = next((f for f in (8, 4, 2) if min(width, height) >= f * _DECODED), 1)
            if width * height > _MOST * factor**2:
                return None
            least = {} if factor == 1 else {"min_width": -(-width // factor), "min_height": -(-height // factor)}
            return Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="gray", **least)[..., 0])
        except ValueError as e:
            if pixels.is_damage(e):
                raise
            # Kinds that only Pillow reads.
    with images.open_image(data) as image:
        if image.width * image.height > _MOST:
            return None
        return Image.fromarray(pixels.to_rgb(image)).convert("L")

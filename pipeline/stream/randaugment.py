"""RandAugment (arXiv 1909.13719) and colour jitter, made of Pillow's operations.

The operations and their scales are those of DeiT, timm's `rand-m9-mstd0.5-inc1`: each of `ops` drawn operations happens
with probability 1/2, at a magnitude drawn from N(magnitude, deviation) and clipped to [0, 10]; all but four grow with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageEnhance, ImageOps

from pipeline.config.inputs import RandAugment
from pipeline.stream.random import Random

Color = tuple[int, int, int]
Operation = Callable[[Image.Image, float, Random, Color], Image.Image]  # picture, magnitude / 10, draws, fill

_MOST = 10.0  # magnitude
_DEGREES, _SHEAR, _SHIFT, _ENHANCE, _ADD, _BITS = 30.0, 0.3, 0.45, 0.9, 110, 4  # at the largest magnitude


def rand_augment(picture: Image.Image, how: RandAugment, mean: Sequence[float], random: Random) -> Image.Image:
    """RGB to RGB of the same size, the very object where nothing was drawn. What moves in is filled with `mean` (0 to 1)."""
    r, g, b = (min(255, round(255 * m)) for m in mean)
    for _ in range(how.ops):
        operation = _ALL[random.integer(len(_ALL))]
        if random.uniform() < 0.5:
            magnitude = min(_MOST, max(0.0, random.normal(how.magnitude, how.deviation)))
            picture = operation(picture, magnitude / _MOST, random, (r, g, b))
    return picture


def color_jitter(picture: Image.Image, most: float, random: Random) -> Image.Image:
    """Brightness, contrast and saturation, each times uniform [1 - most, 1 + most], in random order (as torchvision)."""
    for which in random.permutation(3):
        factor = random.uniform(1 - most, 1 + most)
        picture = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which](picture).enhance(factor)
    return picture


def _signed(value: float, random: Random) -> float:
    return value if random.uniform() < 0.5 else -value


def _affine(picture: Image.Image, matrix: tuple[float, ...], fill: Color) -> Image.Image:
    """Output (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _rotate(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return picture.rotate(_signed(_DEGREES * level, random), Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    """At least a bit is kept: with none, as timm had it at the very largest magnitude, every picture is black."""
    return ImageOps.posterize(picture, max(1, _BITS - int(_BITS * level)))


def _solarize(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * level))


def _solarize_add(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    """The dark half becomes brighter."""
    return picture.point([min(255, i + int(_ADD * level)) if i < 128 else i for i in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def operation(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
        return kind(picture).enhance(max(0.1, 1 + _signed(_ENHANCE * level, random)))

    return operation


def _auto_contrast(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return ImageOps.equalize(picture)


def _invert(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return ImageOps.invert(picture)


def _shear_x(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return _affine(picture, (1, _signed(_SHEAR * level, random), 0, 0, 1, 0), fill)


def _shear_y(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return _affine(picture, (1, 0, 0, _signed(_SHEAR * level, random), 1, 0), fill)


def _shift_x(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return _affine(picture, (1, 0, _signed(_SHIFT * level, random) * picture.width, 0, 1, 0), fill)


def _shift_y(picture: Image.Image, level: float, random: Random, fill: Color) -> Image.Image:
    return _affine(picture, (1, 0, 0, 0, 1, _signed(_SHIFT * level, random) * picture.height), fill)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _shift_x,
    "TranslateYRel": _shift_y,
}
_ALL = tuple(OPERATIONS.values())

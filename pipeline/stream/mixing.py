"""mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): each sample of a micro-batch mixed with a partner.

The partner of sample i of B is B - 1 - i, so `x.flip(0)` holds the partners; where B is odd, the middle one keeps to itself.
One draw holds for a whole micro-batch, keyed by its index, so that it does not depend on the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.config.inputs import Image
from pipeline.stream.random import Random

_SALT = 0x6D697865  # keeps these draws apart from a sample's


@dataclass(frozen=True)
class Mix:
    """`lam`: the share of a sample itself, its partner has the rest. `box` (top, left, height, width in pixels) is the
    partner's part of the picture in CutMix; None in mixup, where every pixel is shared."""

    lam: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(how: Image, seed: int, epoch: int, index: int) -> Mix | None:
    """How micro-batch `index` is mixed, None where the config asks for no mixing. With both, a coin is tossed."""
    if not how.mixup and not how.cutmix:
        return None
    random = Random(seed, epoch, index, _SALT)
    heads = random.uniform() < 0.5
    if how.mixup and (heads or not how.cutmix):
        return Mix(_beta(how.mixup, random))
    return _cut(_beta(how.cutmix, random), how.pixels, random)


def mixed(images: torch.Tensor, mix: Mix | None) -> torch.Tensor:
    """(B, C, P, P) to the same shape, on any device: each image with its partner's part. `images` is left as it is."""
    if mix is None:
        return images
    if mix.box is None:
        return torch.lerp(images.flip(0), images, mix.lam)
    top, left, height, width = mix.box
    rows, columns = slice(top, top + height), slice(left, left + width)
    out = images.clone()
    out[:, :, rows, columns] = images[:, :, rows, columns].flip(0)
    return out


def _cut(lam: float, pixels: int, random: Random) -> Mix:
    """Section 3.1: a box of sqrt(1 - lam) a side, its centre anywhere; `lam` becomes what the border leaves of it."""
    side = int(pixels * math.sqrt(1 - lam))
    top, left = (random.integer(pixels) - side // 2 for _ in range(2))
    bottom, right = min(pixels, top + side), min(pixels, left + side)
    top, left = max(0, top), max(0, left)
    return Mix(1 - (bottom - top) * (right - left) / pixels**2, (top, left, bottom - top, right - left))


def _beta(alpha: float, random: Random) -> float:
    """Beta(alpha, alpha): x / (x + y) of two Gamma(alpha). In logarithms, as both may be less than the smallest float."""
    x, y = _log_gamma(alpha, random), _log_gamma(alpha, random)
    return 0.5 * (1 + math.tanh(0.5 * (x - y)))


def _log_gamma(alpha: float, random: Random) -> float:
    """The logarithm of a Gamma(alpha) draw: Marsaglia and Tsang (2000), sections 4 and 6 (a power of a uniform below 1)."""
    boost = math.log(1 - random.uniform()) / alpha if alpha < 1 else 0.0
    d = (alpha + 1 if alpha < 1 else alpha) - 1 / 3
    while True:
        x = random.normal()
        v = (1 + x / math.sqrt(9 * d)) ** 3
        if v > 0 and math.log(1 - random.uniform()) < 0.5 * x * x + d - d * v + d * math.log(v):
            return boost + math.log(d * v)

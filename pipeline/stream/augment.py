"""The view of an image that training uses; its randomness is keyed by (seed, epoch, sample), so by nothing else."""

from __future__ import annotations

import math

import numpy as np
import torch

from pipeline.config.schema import Image
from pipeline.stream.decode import evaluation_view, resize


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, (epoch << 40) ^ sample], dtype=np.uint64)))


def training_view(image: torch.Tensor, how: Image, random: np.random.Generator) -> torch.Tensor:
    """uint8 (H, W, 3) to (P, P, 3), cropped and flipped as the config says."""
    match how.crop:
        case "random-resized":
            top, left, height, width = _resized_crop(image.shape[0], image.shape[1], how, random)
            image = resize(image[top : top + height, left : left + width], how.pixels, how.pixels)
        case "random-square":
            image = _square_crop(image, how.pixels, random)
        case _:
            image = evaluation_view(image, how.pixels)
    return image.flip(1) if how.flip and random.random() < 0.5 else image


def _resized_crop(height: int, width: int, how: Image, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Inception's crop (Szegedy et al. 2015): a random share of the area at a random aspect ratio; top, left, h, w."""
    for _ in range(10):
        area = height * width * random.uniform(*how.scale)
        ratio = math.exp(random.uniform(math.log(how.ratio[0]), math.log(how.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w, h = min(width, round(height * how.ratio[1])), min(height, round(width / how.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _square_crop(image: torch.Tensor, pixels: int, random: np.random.Generator) -> torch.Tensor:
    """CLIP, section 2.5: a random square crop from the image resized to have its shorter side at P."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
    return resize(image[top : top + side, left : left + side], pixels, pixels)

"""Image bytes to pixels, and the view of an image that evaluation uses.

Shapes: H height, W width, P model input; pixels are uint8 RGB, (H, W, 3), until `normalize` on the device.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image


def decode(data: bytes) -> torch.Tensor:
    """JPEG, PNG or WebP bytes to uint8 (H, W, 3). Raises ValueError for bytes that are none of these."""
    if data[:2] == b"\xff\xd8":
        return torch.from_numpy(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    try:
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except OSError as e:
        raise ValueError(f"not a readable image ({e})") from e


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(H, W, 3) to (height, width, 3), uint8, bicubic and antialiased (Pillow's filter)."""
    if image.shape[:2] == (height, width):
        return image
    channels_first = image.permute(2, 0, 1).unsqueeze(0)
    out = F.interpolate(channels_first, size=(height, width), mode="bicubic", antialias=True)
    return out[0].permute(1, 2, 0)


def evaluation_view(image: torch.Tensor, pixels: int) -> torch.Tensor:
    """Resize the shorter side to P, crop the centre: (P, P, 3)."""
    height, width = image.shape[:2]
    factor = pixels / min(height, width)
    image = resize(image, max(pixels, round(height * factor)), max(pixels, round(width * factor)))
    top, left = (image.shape[0] - pixels) // 2, (image.shape[1] - pixels) // 2
    return image[top : top + pixels, left : left + pixels]


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (B, H, W, 3) to `dtype` (B, 3, H, W), (x / 255 - mean) / std, on the device of `images`."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return (images * scale + shift).permute(0, 3, 1, 2).to(dtype)

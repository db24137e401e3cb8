"""Published sizes (arXiv 2010.11929, table 1; arXiv 2106.04560, table 2; DeiT's Ti and S)."""

from __future__ import annotations

from typing import NamedTuple


class ViTSize(NamedTuple):
    width: int
    depth: int
    mlp: int
    heads: int


VIT = {
    "ti": ViTSize(192, 12, 768, 3),
    "s": ViTSize(384, 12, 1536, 6),
    "b": ViTSize(768, 12, 3072, 12),
    "l": ViTSize(1024, 24, 4096, 16),
    "h": ViTSize(1280, 32, 5120, 16),
    "g": ViTSize(1408, 40, 6144, 16),
    "gg": ViTSize(1664, 48, 8192, 16),
}

# Model name -> size and patch, in pixels.
VIT_MODELS = {
    "vit_ti16": ("ti", 16),
    "vit_s16": ("s", 16),
    "vit_s32": ("s", 32),
    "vit_b16": ("b", 16),
    "vit_b32": ("b", 32),
    "vit_l16": ("l", 16),
    "vit_l32": ("l", 32),
    "vit_h14": ("h", 14),
    "vit_g14": ("g", 14),
    "vit_gg14": ("gg", 14),
}

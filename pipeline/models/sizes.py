"""Published sizes, and the names they go by: `published("vit_b16")` is the family and the options that make it.

ViT: arXiv 2010.11929, table 1; arXiv 2106.04560, table 2 (g, G); arXiv 2303.15343 (So400m). DeiT: arXiv 2012.12877, table 1.
MAE: arXiv 2111.06377, section 4. iGPT: Chen et al. 2020, section 3.1; CLIP: arXiv 2103.00020, tables 19 and 20. BiT: arXiv 1912.11370.
"""

from __future__ import annotations

import re
from typing import Any

# Letter -> width, depth, hidden width of the MLP, heads.
VIT = {
    "ti": (192, 12, 768, 3),
    "s": (384, 12, 1536, 6),
    "b": (768, 12, 3072, 12),
    "l": (1024, 24, 4096, 16),
    "h": (1280, 32, 5120, 16),
    "so400m": (1152, 27, 4304, 16),
    "g": (1408, 40, 6144, 16),
    "bigg": (1664, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}
# Letter -> width, depth, heads. The paper does not give XL's heads: 128 channels a head here.
IGPT = {"s": (512, 24, 8), "m": (1024, 36, 8), "l": (1536, 48, 16), "xl": (3072, 60, 24)}
# Vision tower -> embedding; width, depth and heads of the text tower. B and L are OpenAI's; H, g and bigG as open_clip trained them on
# LAION; Ti and S are ours, with B's text tower.
CLIP_TEXT = {
    "ti": (512, 512, 12, 8),
    "s": (512, 512, 12, 8),
    "b": (512, 512, 12, 8),
    "l": (768, 768, 12, 12),
    "h": (1024, 1024, 24, 16),
    "g": (1024, 1024, 24, 16),
    "bigg": (1280, 1280, 32, 20),
}
# Name -> pixels, depths of the stages, width, embedding; width and heads of the text tower, which has 12 layers.
CLIP_RESNET = {
    "rn50": (224, (3, 4, 6, 3), 64, 1024, 512, 8),
    "rn101": (224, (3, 4, 23, 3), 64, 512, 512, 8),
    "rn50x4": (288, (4, 6, 10, 6), 80, 640, 640, 10),
    "rn50x16": (384, (6, 8, 18, 8), 96, 768, 768, 12),
    "rn50x64": (448, (3, 15, 36, 10), 128, 1024, 1024, 16),
}
RESNET = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
# Patch of the whole hybrid (16 or 32 pixels) -> stages of the ResNet stem (arXiv 2010.11929, section 4.1 and appendix B.1.3).
HYBRID = {16: (3, 4, 9), 32: (3, 4, 6, 3)}

_SIZE = "|".join(VIT)
_PATTERNS = {
    "vit": re.compile(rf"vit_({_SIZE})(\d+)"),
    "hybrid": re.compile(rf"vit_r50_({_SIZE})(16|32)"),
    "deit": re.compile(r"deit_(ti|s|b)(\d+)"),
    "mae": re.compile(rf"mae_({_SIZE})(\d+)"),
    "igpt": re.compile(r"igpt_(s|m|l|xl)"),
    "clip": re.compile(rf"(clip|caption)_vit_({'|'.join(CLIP_TEXT)})(\d+)(?:_(\d+))?"),
    "clip-resnet": re.compile(r"(clip|caption)_(rn50|rn101|rn50x4|rn50x16|rn50x64)"),
    "bit": re.compile(r"bit_r(50|101|152)x(\d+)"),
    "resnet": re.compile(r"resnet(50|101|152)"),
}

LISTED = [
    *("vit_ti16", "vit_s16", "vit_s32", "vit_b16", "vit_b32", "vit_l16", "vit_l32", "vit_h14"),
    *("vit_so400m14", "vit_g14", "vit_bigg14", "vit_e14"),
    *("vit_r50_b16", "vit_r50_b32", "vit_r50_l16", "vit_r50_l32"),
    *("deit_ti16", "deit_s16", "deit_b16"),
    *("mae_b16", "mae_l16", "mae_h14"),
    *("igpt_s", "igpt_m", "igpt_l", "igpt_xl"),
    *("clip_vit_b32", "clip_vit_b16", "clip_vit_l14", "clip_vit_l14_336", "clip_vit_h14", "clip_vit_g14", "clip_vit_bigg14"),
    *(f"clip_{name}" for name in CLIP_RESNET),
    *("caption_vit_b32", "caption_rn50"),
    *("bit_r50x1", "bit_r50x3", "bit_r101x1", "bit_r101x3", "bit_r152x2", "bit_r152x4"),
    "resnet50",
]  # fmt: skip


def published(name: str) -> tuple[str, dict[str, Any]] | None:
    """(family, its options) of a published model, or of a published size at another patch; None for another name."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(name):
            return _make(kind, *found.groups())
    return None


def _make(kind: str, *parts: str) -> tuple[str, dict[str, Any]]:
    match kind:
        case "vit":
            return "vit", {**_vit(parts[0]), "patch": int(parts[1])}
        case "hybrid":
            return "vit", {**_vit(parts[0]), "patch": int(parts[1]), "stem": HYBRID[int(parts[1])]}
        case "deit":
            return "vit", {**_vit(parts[0]), "patch": int(parts[1]), "distilled": True}
        case "mae":
            return "mae", {**_vit(parts[0]), "patch": int(parts[1])}
        case "igpt":
            width, depth, heads = IGPT[parts[0]]
            return "igpt", {"width": width, "depth": depth, "heads": heads}
        case "clip":
            return parts[0], _tower(parts[0], _clip_vit(parts[1], int(parts[2]), int(parts[3] or 224)))
        case "clip-resnet":
            return parts[0], _tower(parts[0], _clip_resnet(parts[1]))
        case "bit":
            return "bit", {"depths": RESNET[parts[0]], "factor": int(parts[1])}
        case _:
            return "resnet", {"depths": RESNET[parts[0]]}


def _vit(size: str) -> dict[str, Any]:
    return dict(zip(("width", "depth", "mlp", "heads"), VIT[size], strict=True))


def _tower(family: str, options: dict[str, Any]) -> dict[str, Any]:
    """A captioner has CLIP's towers, but embeds nothing."""
    return options if family == "clip" else {key: value for key, value in options.items() if key != "embed"}


def _clip_vit(size: str, patch: int, pixels: int) -> dict[str, Any]:
    embed, width, depth, heads = CLIP_TEXT[size]
    vision = {"kind": "vit", **_vit(size), "patch": patch}
    if size in ("ti", "s", "b", "l"):  # as OpenAI's: 64 channels a head
        vision["heads"] = vision["width"] // 64
        activation = "quick-gelu"
    else:
        activation = "gelu"
    text = {"kind": "transformer", "width": width, "depth": depth, "heads": heads}
    return {"pixels": pixels, "embed": embed, "activation": activation, "vision": vision, "text": text}


def _clip_resnet(name: str) -> dict[str, Any]:
    pixels, depths, width, embed, text_width, heads = CLIP_RESNET[name]
    text = {"kind": "transformer", "width": text_width, "depth": 12, "heads": heads}
    return {
        "pixels": pixels,
        "embed": embed,
        "activation": "quick-gelu",
        "vision": {"kind": "resnet", "depths": depths, "width": width},
        "text": text,
    }

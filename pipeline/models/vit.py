"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1).

Shapes: B batch, P input pixels a side, N = (P / patch)^2 patches, D width, C classes. Parameter names are timm's, so
that weights travel. Initialised as Google's Flax code does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.blocks import LAYER_NORM_EPS, Block


class PatchEmbed(nn.Module):
    """Cut (B, 3, P, P) into patches and project each: (B, N, D); equation 1."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """`classes=0` leaves the head out. `pool` is `token` (the class token) or `gap` (the mean of the patches)."""

    def __init__(
        self,
        *,
        pixels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        classes: int,
        pool: str = "token",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pixels, self.patch, self.width, self.pool = pixels, patch, width, pool
        side = pixels // patch
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, mlp, heads, dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()
        self.apply(_initialise)
        nn.init.normal_(self.pos_embed, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to what the head sees (B, D)."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0] if self.pool == "token" else x[:, 1:].mean(dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to logits (B, C)."""
        return self.head(self.features(images))

    def flops(self) -> float:
        """Floating-point operations of one forward pass of one image, two a multiply-add; norms and GELU left out."""
        patches = (self.pixels // self.patch) ** 2
        tokens = patches + 1
        linear = sum(m.weight.numel() for b in self.blocks for m in b.modules() if isinstance(m, nn.Linear))
        attention = 2 * tokens * tokens * self.width * len(self.blocks)  # q k^T and the weights times v
        head = self.head.weight.numel() if isinstance(self.head, nn.Linear) else 0
        return 2.0 * (patches * self.patch_embed.proj.weight.numel() + tokens * linear + attention + head)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        # LeCun normal, truncated at two standard deviations; .8796 is the standard deviation that is left.
        std = math.sqrt(1 / module.weight[0].numel()) / 0.87962566
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    if isinstance(module, Block):
        for kernel in module.attn.qkv.weight.chunk(3):  # three kernels of their own in Flax
            nn.init.xavier_uniform_(kernel)
        for layer in (module.mlp.fc1, module.mlp.fc2):
            nn.init.normal_(layer.bias, std=1e-6)


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate the position embeddings (1, 1 + n^2, D) to a grid of side x side patches; the class token's is kept.

    Bilinear with aligned corners, as Google's own code (scipy's zoom of order 1); section 3.2 of the paper.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    old = math.isqrt(grid.shape[1])
    assert old * old == grid.shape[1], "positions are of a square grid"
    if old == side:
        return positions
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(side, side), mode="bilinear", align_corners=True).to(positions.dtype)
    return torch.cat([token, grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)

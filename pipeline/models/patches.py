"""Images as sequences of patches.

Shapes: B batch, P pixels a side, p pixels a patch's side, N = (P / p)^2 patches in rows from the top left, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.models.hybrid import lecun_normal_


class PatchEmbed(nn.Module):
    """Cut (B, 3, P, P) into patches and project each: (B, N, D) (arXiv 2010.11929, equation 1)."""

    def __init__(self, patch: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=bias)
        lecun_normal_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, 3, P, P) to the values of each patch, (B, N, p * p * 3), in the order row, column, colour."""
    b, c, side = images.shape[0], images.shape[1], images.shape[2] // patch
    return images.view(b, c, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1).reshape(b, side * side, patch * patch * c)

"""Where a patch is: fixed sine-cosine embeddings, relative attention, and learned embeddings on another grid.

Shapes: B batch, S patches a side, N = S^2 patches in rows from the top left, K tokens before them (class, distillation), D width, h heads.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

Convention = Literal["google", "timm-npz", "timm-hybrid", "hf"]

# How the published code of each interpolates a grid of position embeddings, as arguments of `F.interpolate`.
CONVENTIONS: dict[Convention, dict[str, Any]] = {
    "google": {"mode": "bilinear", "align_corners": True},  # scipy.ndimage.zoom of order 1, as in vit_jax and big_vision
    "timm-npz": {"mode": "bilinear", "align_corners": False},  # timm's reading of Google's .npz files
    "timm-hybrid": {"mode": "bicubic", "align_corners": False, "antialias": True},  # the same of a hybrid's
    "hf": {"mode": "bicubic", "align_corners": False},  # transformers, and DeiT's own code
}


def sincos_2d(side: int, width: int, tokens: int = 0) -> torch.Tensor:
    """Fixed embeddings of a grid of side x side patches, (1, tokens + side^2, width); zero for the tokens before the patches.

    The form of MAE (arXiv 2111.06377, appendix A.1): [sin x w, cos x w, sin y w, cos y w] with x the column, y the row and
    w_i = 10000^(-4 i / width). MoCo v3 has the same numbers with the grid transposed; big_vision divides by width / 4 - 1 instead.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width: {width} is not a multiple of 4, which 2-D sine-cosine positions need")
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64), omega)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return join_axes(waves[None], waves[None], tokens).to(torch.get_default_dtype())


def join_axes(x: torch.Tensor, y: torch.Tensor, tokens: int = 0) -> torch.Tensor:
    """Embeddings of the columns and of the rows, (L, S, D / 2) each, side by side for every patch: (L, tokens + S^2, D).

    The X and Y halves of arXiv 2010.11929, appendix D.4. The `tokens` before the patches are nowhere in the grid: zeros.
    """
    layers, side, half = x.shape
    shape = (layers, side, side, half)
    grid = torch.cat([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.pad(grid.flatten(1, 2), (0, 0, tokens, 0))


def resize_positions(positions: torch.Tensor, side: int, convention: Convention = "google") -> torch.Tensor:
    """Interpolate learned embeddings (L, K + n^2, D) to a grid of side x side patches; those of the K <= 2 tokens are kept.

    Section 3.2 of arXiv 2010.11929. A `convention` is named after the code that resizes so; see `CONVENTIONS`.

    Raises:
        ValueError: the embeddings are not of a square grid.
    """
    rows = positions.shape[1]
    old = math.isqrt(rows)
    tokens = rows - old * old
    if tokens > 2:
        raise ValueError(f"pos_embed: {rows} rows are not those of a square grid with at most two tokens before it")
    if old == side:
        return positions
    grid = positions[:, tokens:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    return torch.cat([positions[:, :tokens], _interpolate(grid, (side, side), convention).permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def resize_axis(positions: torch.Tensor, side: int, convention: Convention = "google") -> torch.Tensor:
    """The same of the embeddings of one axis, (L, n, D / 2) to (L, side, D / 2)."""
    if positions.shape[1] == side:
        return positions
    # As a whole grid with equal columns: of a single column, torch's antialiased bicubic makes something else.
    grid = positions.transpose(1, 2)[..., None].expand(-1, -1, -1, positions.shape[1])
    return _interpolate(grid, (side, side), convention)[..., 0].transpose(1, 2)


def _interpolate(grid: torch.Tensor, size: tuple[int, int], convention: Convention) -> torch.Tensor:
    exact = grid if grid.dtype == torch.float64 else grid.float()
    return F.interpolate(exact, size=size, **CONVENTIONS[convention]).to(grid.dtype)


class RelativePositions(nn.Module):
    """What 1-dimensional relative attention adds to the logits (arXiv 2010.11929, appendix D.4).

    A patch's place is its number in reading order, so a query at p_q and a key at p_k have the offset p_q - p_k, one of 2 N - 1.
    Each offset has an embedding of width D, split over the heads as keys are: the logit is q . r / sqrt(D / h) with the query of the
    attention itself. The paper speaks of pairs of patches: pairs with one of the `tokens` before them get 0 (so the last block's are idle
    where only the class token is read). Every block has its own.
    """

    def __init__(self, patches: int, width: int, heads: int, tokens: int = 0) -> None:
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.weight = nn.Parameter(torch.empty(2 * patches - 1, width))  # row i is of p_k - p_q = i - (patches - 1)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries (B, h, K + N, D / h) to logits (B, h, K + N, K + N)."""
        queries = queries[:, :, self.tokens :]
        b, h, n, d = queries.shape
        offsets = self.weight.reshape(2 * n - 1, h, d).permute(1, 2, 0)
        logits = (queries / math.sqrt(d)) @ offsets
        # From [.., query, offset] to [.., query, key]: one column more, and reading it in rows of 2 N - 1 shifts each row by one.
        logits = F.pad(logits, (0, 1)).flatten(2)
        logits = F.pad(logits, (0, n - 1)).reshape(b, h, n + 1, 2 * n - 1)[:, :, :n, n - 1 :]
        return F.pad(logits, (self.tokens, 0, self.tokens, 0))

"""Multi-head attention pooling, "MAP" (Zhai et al. 2022, arXiv 2106.04560, section 3.2; a head of the Set Transformer).

Shapes: B batch, N tokens, D width, h heads. Parameter names are timm's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.blocks import Mlp


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens: z = MHA(probe, x, x); z + MLP(LN(z)). (B, N, D) -> (B, D)."""

    def __init__(self, width: int, hidden: int, heads: int, *, eps: float = 1e-6, activation: str = "gelu") -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, activation=activation)
        nn.init.xavier_uniform_(self.latent[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        size = d // self.heads
        q = self.q(self.latent).view(1, 1, self.heads, size).transpose(1, 2).expand(b, -1, -1, -1)
        k, v = self.kv(x).view(b, n, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        z = self.proj(F.scaled_dot_product_attention(q, k, v).reshape(b, d))
        return z + self.mlp(self.norm(z))

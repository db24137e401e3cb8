"""The pre-norm Transformer block that all families share (ViT: arXiv 2010.11929, equations 2 and 3).

Shapes: B batch, N tokens, D width, M hidden width of the MLP, h heads, T tokens in a cache. Parameter names are timm's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.fused import RMSNorm, quick_gelu


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation (arXiv 1606.08415, section 2), JAX's default."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "gelu-tanh": gelu_tanh, "quick-gelu": quick_gelu}
NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": RMSNorm}


class KeyValues:
    """What attention has seen so far, so that sampling looks at each token once. Keys and values (B, h, T, D / h)."""

    def __init__(self, batch: int, heads: int, length: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.keys, self.values = (torch.empty(batch, heads, length, width // heads, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of the next tokens (B, h, N, D / h); all so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D); equations 5 to 8.

    `causal`: a token sees itself and those before it. `qk_norm`: queries and keys are normalised a head (ViT-22B,
    arXiv 2302.05442, section 2). A `bias` (B or 1, h, N, N) is added to the logits, and what the module `relative` makes of the
    queries (B, h, N, D / h), where one is set.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        causal: bool = False,
        qk_norm: bool = False,
        norm: str = "layer",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.relative: nn.Module | None = None
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = NORMS[norm](width // heads, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = NORMS[norm](width // heads, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, cache: KeyValues | None = None, causal: bool | None = None
    ) -> torch.Tensor:
        """`causal` overrules the module's own, for a model that is trained either way."""
        b, n, d = x.shape
        causal = self.causal if causal is None else causal
        # Three parts of one row each, not one permutation: their gradients come back as rows, and are copied once instead of twice.
        q, k, v = (part.view(b, n, self.heads, d // self.heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.relative is not None:
            logits = self.relative(q)
            bias = logits if bias is None else bias + logits
        if cache is not None:
            assert cache.length == 0 or n == 1, "after the first tokens a cache takes one at a time"
            k, v = cache.extend(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal and n > 1)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Two layers with an activation between, (B, N, D) -> (B, N, M) -> (B, N, D)."""

    def __init__(self, width: int, hidden: int, *, activation: str = "gelu", bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.activation(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: leaves a residual branch out for a whole sample with probability p (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class LayerScale(nn.Module):
    """A gain a channel on a residual branch, small at first (arXiv 2103.17239, equation 4)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """z' = MSA(LN(z)) + z; z = MLP(LN(z')) + z'."""

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        *,
        norm: str = "layer",
        eps: float = 1e-6,
        activation: str = "gelu",
        bias: bool = True,
        causal: bool = False,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[norm](width, eps=eps)
        self.attn = Attention(width, heads, bias=bias, causal=causal, qk_norm=qk_norm, norm=norm, eps=eps)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = NORMS[norm](width, eps=eps)
        self.mlp = Mlp(width, hidden, activation=activation, bias=bias, dropout=dropout)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, cache: KeyValues | None = None, causal: bool | None = None
    ) -> torch.Tensor:
        x = x + self.drop_path(self.drop(self.ls1(self.attn(self.norm1(x), bias, cache, causal))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Growing linearly from 0 in the first of `depth` blocks to `rate` in the last (arXiv 1603.09382, equation 4)."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]

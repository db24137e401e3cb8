"""Linear layers whose three products are of 8-bit floating-point numbers (arXiv 2209.05433): e4m3 for weights and what they are applied
to, e5m2 for gradients, one scale a tensor, from the largest number of that same tensor. Weights, sums and results stay in bf16.

Shapes: M rows (of all images' tokens), K in, N out; all multiples of 16, as the hardware wants. Needs compute capability 8.9 or 9.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def quantize(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in `kind`, the scale () in fp32 that brings it back)."""
    most = torch.finfo(kind).max
    scale = most / x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-most, most).to(kind), scale.reciprocal()


def product(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """a (M, K) in rows times b (K, N) in columns. `fast` adds up in fewer bits, which suffices forwards."""
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


class _Product(torch.autograd.Function):
    """x (M, K), weight (N, K) -> x weight^T (M, N)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x8, scale_x = quantize(x.contiguous(), torch.float8_e4m3fn)
        w8, scale_w = quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, scale_x, w8, scale_w)
        return product(x8, w8.t(), scale_x, scale_w, x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x8, scale_x, w8, scale_w = ctx.saved_tensors
        g8, scale_g = quantize(grad.contiguous(), torch.float8_e5m2)
        dx = product(g8, w8.t().contiguous().t(), scale_g, scale_w, grad.dtype, fast=False)
        dw = product(g8.t().contiguous(), x8.t().contiguous().t(), scale_g, scale_x, grad.dtype, fast=False)
        return dx, dw


class Linear8(nn.Linear):
    """As `nn.Linear`, whose parameters it keeps in their type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


def convert(module: nn.Module) -> int:
    """Have all linear layers below `module` multiply in 8 bits; how many there are."""
    found = [each for each in module.modules() if type(each) is nn.Linear]
    for each in found:
        each.__class__ = Linear8
    return len(found)

"""Norm and activation with gradients written by hand: the passes over memory are what they cost, most of all on a CPU.

Compiled, the plain formulas are better, and used: the compiler fuses them with their neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

SLOPE = 1.702


class _QuickGelu(torch.autograd.Function):
    """x sigmoid(a x) is silu(a x) / a, whose derivative is that of SiLU at a x: keep a x, and the gradient takes one pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        scaled = SLOPE * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / SLOPE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.silu_backward(grad, ctx.saved_tensors[0])


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x), which GPT-1's code, iGPT and CLIP use; of any shape."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(SLOPE * x)
    if torch.is_grad_enabled():
        return _QuickGelu.apply(x)
    return F.silu(SLOPE * x).mul_(1 / SLOPE)


def _rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(mean x^2 + eps)^-1/2 over the last dimension, which is kept."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = x r g with r = (mean x^2 + eps)^-1/2 a row. dx = r (dy g - x r^2 mean(dy g x)), dg = sum over rows of dy x r."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = _rms_scale(rows, eps)
        ctx.save_for_backward(rows, gain, scale)
        return torch.mul(rows, scale).mul_(gain).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, gain, scale = ctx.saved_tensors
        dy = grad.reshape(rows.shape)
        product = dy * rows
        mean = torch.mv(product, gain).unsqueeze(1).mul_(scale.square()).div_(-rows.shape[1])
        dx = torch.mul(dy, gain).addcmul_(rows, mean).mul_(scale)
        return dx.view(grad.shape), torch.mv(product.t(), scale.squeeze(1)), None


class RMSNorm(nn.RMSNorm):
    """x (mean x^2 + eps)^-1/2 g over the last dimension. PyTorch has a kernel for it on GPUs, on a CPU a dozen passes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling() or x.dtype != self.weight.dtype or x.dtype.itemsize < 4:
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, eps)
        return torch.mul(x, _rms_scale(x, eps)).mul_(self.weight)

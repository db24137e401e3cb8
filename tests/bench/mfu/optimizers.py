"""AdamW (arXiv 1711.05101) over weights in bf16 with fp32 behind them, or over fp32 weights.

`FlatAdamW` keeps all of a kind end to end, as ZeRO does, and updates them in one pass: it reads gradient, weight and moments and writes
weights (both), moments, and zeros for the next gradient. Compiled that is one kernel, of 30 bytes a parameter.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.1
_ALIGNED = 64  # numbers: each parameter begins where vectors of 16 bytes may be loaded
_CHUNK = 2**28  # numbers a kernel, so that it counts in 32 bits


class Updates(Protocol):
    def step(self) -> None:
        """Update the weights by their gradients, and have these gone or zero."""


def groups(model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """(parameters, weight decay): matrices decay, biases and gains do not."""
    found: dict[float, list[nn.Parameter]] = {DECAY: [], 0.0: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found[DECAY if parameter.ndim > 1 else 0.0].append(parameter)
    return [(parameters, decay) for decay, parameters in found.items() if parameters]


class FlatAdamW:
    """Takes the parameters of `model` over: they become views of one tensor in `dtype`, and so do their gradients."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, lr: float, compiled: str | None) -> None:
        self._lr = lr
        self._parts = [_Flat(parameters, dtype, decay) for parameters, decay in groups(model)]
        # On the device, so that a CUDA graph counts too.
        self._count = torch.zeros((), device=self._parts[0].master.device)
        self._update = torch.compile(adamw, dynamic=False, backend=compiled) if compiled else adamw

    @torch.no_grad()
    def step(self) -> None:
        self._count += 1
        first, second = 1 - BETAS[0] ** self._count, (1 - BETAS[1] ** self._count).sqrt()
        for part in self._parts:
            for chunk in part.chunks:
                self._update(*chunk, first, second, self._lr, part.decay)


class _Flat:
    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype, decay: float) -> None:
        self.decay = decay
        starts, total = [], 0
        for parameter in parameters:
            starts.append(total)
            total += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        like = parameters[0]
        self.master = torch.zeros(total, device=like.device)
        weights = self.master if dtype == torch.float32 else torch.zeros(total, device=like.device, dtype=dtype)
        for parameter, start in zip(parameters, starts, strict=True):
            place = slice(start, start + parameter.numel())
            self.master[place].copy_(parameter.detach().reshape(-1))
            weights[place].copy_(self.master[place])
            parameter.data = weights[place].view(parameter.shape)  # gives up the old memory before the moments are made
        gradients = torch.zeros(total, device=like.device, dtype=dtype)
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.grad = gradients[start : start + parameter.numel()].view(parameter.shape)
        tensors = (weights, gradients, self.master, torch.zeros_like(self.master), torch.zeros_like(self.master))
        self.chunks = list(zip(*(each.split(_CHUNK) for each in tensors), strict=True))


def adamw(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    lr: float,
    decay: float,
) -> None:
    """In place; `first` is 1 - beta1^t and `second` the root of 1 - beta2^t, both (). `weights` may be `master` itself."""
    gradient = gradients.float()
    mean.lerp_(gradient, 1 - BETAS[0])
    square.lerp_(gradient * gradient, 1 - BETAS[1])
    master.mul_(1 - lr * decay).sub_(lr * (mean / first) / (square.sqrt() / second + EPS))
    if weights.dtype != torch.float32:
        weights.copy_(master)
    gradients.zero_()


class TorchAdamW:
    """torch's own, `fused` or `foreach`. Of weights in 16 bits it steps copies in fp32, which then are written back."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, lr: float, kind: str, capturable: bool) -> None:
        self._pairs: list[tuple[list[nn.Parameter], list[torch.Tensor]]] = []
        settings: list[dict[str, Any]] = []
        for parameters, decay in groups(model):
            masters: list[torch.Tensor] = [p.detach().float().clone() for p in parameters] if dtype != torch.float32 else list(parameters)
            for parameter in parameters:
                parameter.data = parameter.data.to(dtype)
            self._pairs.append((parameters, masters))
            settings.append({"params": masters, "weight_decay": decay})
        self._is_split = dtype != torch.float32
        self._inner = torch.optim.AdamW(settings, lr=lr, betas=BETAS, eps=EPS, capturable=capturable, **{kind: True})

    @torch.no_grad()
    def step(self) -> None:
        if self._is_split:
            for parameters, masters in self._pairs:
                for parameter, master in zip(parameters, masters, strict=True):
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        if self._is_split:
            for parameters, masters in self._pairs:
                torch._foreach_copy_([p.data for p in parameters], masters)


def make(model: nn.Module, name: str, dtype: torch.dtype, lr: float, *, compiled: str | None, capturable: bool) -> Updates:
    if name == "flat":
        return FlatAdamW(model, dtype, lr, compiled)
    return TorchAdamW(model, dtype, lr, name, capturable)

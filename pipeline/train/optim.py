"""Optimisers by name, and which parameters weight decay leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.config.schema import Optimizer

_NO_DECAY = ("cls_token", "pos_embed")


def _adamw(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)


def _adam(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    """Adam with weight decay as L2 in the gradient; adamw decouples it."""
    return torch.optim.Adam(groups, lr=o.lr, betas=o.betas, eps=o.eps)


def _sgd(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)


# torch's own classes, never an optimiser named to DeepSpeed: that one would compile a kernel before the first step.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Optimizer], torch.optim.Optimizer]] = {"adamw": _adamw, "adam": _adam, "sgd": _sgd}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, gains, the class token and the position embeddings do not."""
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (keep if parameter.ndim <= 1 or name in _NO_DECAY else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.name](decay_groups(model, config.weight_decay), config)

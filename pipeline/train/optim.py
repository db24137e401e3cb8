"""Optimisers by name, and which parameters weight decay leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.config.pretrain import Optimizer
from pipeline.models import Model


def _adamw(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _adam(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    """Adam with weight decay as L2 in the gradient; adamw decouples it."""
    return torch.optim.Adam(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _sgd(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, fused=True)


# Fused, an update goes over memory once instead of a dozen times: 22 ms instead of 130 of one core for ViT-S/16 in fp32.
# torch's own classes, never an optimiser named to DeepSpeed: that one would compile a kernel before the first step.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Optimizer], torch.optim.Optimizer]] = {"adamw": _adamw, "adam": _adam, "sgd": _sgd}


def decay_groups(model: Model, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and filters decay; biases, gains, and what the model names (tokens, position embeddings), do not."""
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (keep if parameter.ndim <= 1 or name.endswith(tuple(model.unpenalised)) else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def build_optimizer(model: Model, config: Optimizer) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.name](decay_groups(model, config.weight_decay), config)

"""Optimisers by name, and which parameters weight decay leaves alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from pipeline.config.pretrain import Optimizer
from pipeline.models import Model
from pipeline.train.optimizers import Adafactor, StableAdamW

_BLOCK = re.compile(r"^(.*?)blocks\.(\d+)\.")


def _adamw(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _adam(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    """Adam with weight decay as L2 in the gradient; adamw decouples it."""
    return torch.optim.Adam(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _sgd(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, fused=True)


def _stable_adamw(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return StableAdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)


def _adafactor(groups: list[dict[str, Any]], o: Optimizer) -> torch.optim.Optimizer:
    return Adafactor(groups, lr=o.lr, betas=o.betas)


# torch's own classes (fused: one pass over all tensors) or ours, never one named to DeepSpeed, which would compile a kernel first.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Optimizer], torch.optim.Optimizer]] = {
    "adamw": _adamw, "adam": _adam, "sgd": _sgd, "stable-adamw": _stable_adamw, "adafactor": _adafactor,
}  # fmt: skip


def parameter_groups(model: Model, config: Optimizer) -> list[dict[str, Any]]:
    """Parameters with the same weight decay and the same part of the learning rate (`lr_scale`) together.

    Matrices and filters decay; biases, gains, what the model names (tokens, position embeddings) and what the config does, do not.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    depths = _depths(model) if config.layer_decay else {}
    for name, parameter in model.named_parameters():
        is_spared = parameter.ndim <= 1 or name.endswith(tuple(model.unpenalised)) or any(fnmatch(name, p) for p in config.undecayed)
        decay = config.weight_decay
        if name in model.head_names and config.head_weight_decay is not None:
            decay = config.head_weight_decay
        scale = config.layer_decay ** depths[name] if config.layer_decay else 1.0
        groups.setdefault((0.0 if is_spared else decay, scale), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0], reverse=True)  # what decays most comes first
    return [{"params": members, "weight_decay": decay, "lr_scale": scale} for (decay, scale), members in ordered]


def _depths(model: Model) -> dict[str, int]:
    """How many layers lie above each parameter (arXiv 2106.08254, section 3: layer-wise decay): none above head and last norm, one above
    the last block, and all blocks of the tower above what comes before them."""
    names = [name for name, _ in model.named_parameters()]
    places = {name: match.groups() for name in names if (match := _BLOCK.search(name))}
    count: dict[str, int] = {}  # blocks of each tower
    first: dict[str, int] = {}  # where the parameters of its first block begin
    for i, name in enumerate(names):
        if name in places:
            tower, block = places[name]
            count[tower] = max(count.get(tower, 0), int(block) + 1)
            first.setdefault(tower, i)

    def depth(i: int, name: str) -> int:
        if name in places:
            tower, block = places[name]
            return count[tower] - int(block)
        towers = [tower for tower in count if name.startswith(tower)]
        tower = max(towers, key=len, default=None)
        return count[tower] + 1 if tower is not None and i < first[tower] else 0

    return {name: depth(i, name) for i, name in enumerate(names)}


def build_optimizer(model: Model, config: Optimizer) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.name](parameter_groups(model, config), config)

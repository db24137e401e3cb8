"""What is done to each Transformer block of a model for training: computing it once more instead of keeping it, and compiling it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.blocks import Block
from pipeline.models.caption import DecoderBlock


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (Block, DecoderBlock))]


def recompute_blocks(model: nn.Module) -> None:
    """Keep of each block its input alone, and compute it once more in the backward pass (arXiv 1604.06174): activations of one block at a
    time instead of all, for a third more computation. Random draws are the same both times."""
    for block in blocks_of(model):
        _wrap(block, _recomputed)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block at its first call. Blocks of the same shapes share what is compiled, so that a deep model compiles as fast as a
    shallow one; what lies between blocks is little."""
    for block in blocks_of(model):
        _wrap(block, lambda forward: torch.compile(forward))


def _recomputed(forward: Any) -> Any:
    def run(x: torch.Tensor, *others: Any, **how: Any) -> Any:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return forward(x, *others, **how)
        # Reentrant, since under ZeRO-3 parameters are gathered and given up again in hooks, which the other way takes for a difference.
        return checkpoint(partial(forward, **how), x, *others, use_reentrant=True)

    return run


def _wrap(block: nn.Module, wrapper: Any) -> None:
    block.forward = wrapper(block.forward)

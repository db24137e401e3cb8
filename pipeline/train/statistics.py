"""How large weights, gradients and updates are: over the whole model and by parameter, exact at every ZeRO stage.

Taken inside the optimiser's own step, where each rank has its parts of the fp32 weights and the gradients that they are stepped with
(averaged, unscaled, clipped): before it the weights are copied, after it they are compared. Sums of squares over the parts of all ranks,
added up by one all-reduce, are those of whole tensors. Only steps that are watched (of the rows, one in ten steps) cost anything: as long
as some reads and two writes of the rank's fp32 weights take, and as much memory, for the time of the step, as the weights that are stepped
at once (at stage 3 a sub-group, below that a group of the optimiser; at stage 0 a share of all).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from pipeline.checkpoint.fragments import WEIGHT, own_share
from pipeline.core.world import World
from pipeline.train.speed import Row
from pipeline.train.state import Part, State

LAYERS = "layers/"  # before a parameter's name and what is told of it
_WEIGHT, _GRADIENT, _UPDATE = range(3)


class Statistics:
    """Of the last watched step: `read` gives `train/update_ratio`, the 2-norm of what the optimiser changed over that of the weights
    before, all parameters taken together; by layer also that of each parameter, and its norms. What keeps a parameter within its limits
    after the step is not counted."""

    def __init__(self, state: State, world: World) -> None:
        self.world, self.names = world, list(state.names.values())
        places = {name: place for place, name in enumerate(self.names)}
        self._parts: dict[int, list[tuple[int, torch.Tensor, int, int]]] = defaultdict(list)  # by tensor: parameter, tensor, from, to
        for part in state.parts:
            if (bounds := _own(part, world) if state.stage == 0 else (part.offset, part.offset + part.numel)) is not None:
                self._parts[id(part.flat)].append((places[part.name], part.flat, *bounds))
        self._is_watching = self._has_gradients = False
        self._before: list[torch.Tensor] = []
        self._found: list[tuple[int, list[int], torch.Tensor]] = []  # what, of which parameters, norms of this rank's parts
        state.base.register_step_pre_hook(self._copy)
        state.base.register_step_post_hook(self._compare)

    def watch(self, is_wanted: bool, by_layer: bool = False) -> None:
        """Whether the next step is to be looked at, and whether what is found will be read by layer."""
        self._is_watching, self._has_gradients = is_wanted, by_layer
        self._found.clear()

    def _stepped(self, optimizer: torch.optim.Optimizer) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of what the optimiser steps: parameter, this rank's part of its weights, and of its gradient."""
        found = []
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for place, flat, start, stop in self._parts.get(id(tensor), ()) if tensor.grad is not None else ():
                    weights, gradients = flat.detach().view(-1), tensor.grad.reshape(-1)
                    found.append((place, weights[start:stop], gradients[start:stop]))
        return found

    def _copy(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._is_watching:
            return
        stepped = self._stepped(optimizer)
        self._before = [weights.clone() for _, weights, _ in stepped]
        self._keep(_WEIGHT, stepped, self._before)
        if self._has_gradients:
            self._keep(_GRADIENT, stepped, [gradients for _, _, gradients in stepped])

    def _compare(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._is_watching:
            return
        stepped = self._stepped(optimizer)
        if stepped:
            torch._foreach_sub_(self._before, [weights for _, weights, _ in stepped])
        self._keep(_UPDATE, stepped, self._before)
        self._before = []

    def _keep(self, what: int, stepped: list[tuple[int, torch.Tensor, torch.Tensor]], tensors: list[torch.Tensor]) -> None:
        if stepped:
            norms = torch.stack([each.float() for each in torch._foreach_norm(tensors)])
            self._found.append((what, [place for place, _, _ in stepped], norms))

    def read(self, by_layer: bool = False) -> Row:
        """Empty where the step was not watched, or no update was made. All ranks call this together, and get the same."""
        sums = torch.zeros(3, len(self.names), dtype=torch.float64)
        for what, places, norms in self._found:
            sums[what].index_add_(0, torch.tensor(places), norms.double().cpu().square())
        whole = torch.tensor(self.world.sum((sums if by_layer else sums.sum(dim=1)).flatten().tolist()), dtype=torch.float64).view(3, -1)
        row = _ratio("train/update_ratio", float(whole[_UPDATE].sum()), float(whole[_WEIGHT].sum()))
        if not row or not by_layer:
            return row
        for name, weight, gradient, update in zip(self.names, *whole.tolist(), strict=True):
            row |= {f"{LAYERS}{name}/weight_norm": math.sqrt(weight), f"{LAYERS}{name}/grad_norm": math.sqrt(gradient)}
            row |= _ratio(f"{LAYERS}{name}/update_ratio", update, weight)
        return row


def _own(part: Part, world: World) -> tuple[int, int] | None:
    """From where to where this rank counts a parameter that all hold whole."""
    share = own_share(WEIGHT, part.name, part.flat, world.rank, world.size)
    return (share.start, share.start + share.tensor.numel()) if share else None


def _ratio(name: str, update: float, weight: float) -> Row:
    """Of two sums of squares; nothing where there is nothing to compare with: a parameter that begins as zeros."""
    return {name: math.sqrt(update / weight)} if weight > 0 else {}

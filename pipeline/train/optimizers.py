"""Optimisers whose update depends on a whole parameter, not on each number alone: StableAdamW and Adafactor.

Under ZeRO they are given tensors that hold this rank's parts of many parameters. `bind` tells them where which lies; unbound, each tensor
is one whole parameter, as in a plain PyTorch loop. Either way the update is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.train.layout import Layout, alone, rectangles

_LEAST = 1e-30  # Adafactor's epsilon 1 (arXiv 1804.04235, section 6): what is added to squares


@dataclass(frozen=True)
class Extra:
    """State of one parameter beside what lies as the parameters do. `start`: where in the flattened parameter it begins; None: it is no
    part of that, and every rank has the whole of it."""

    key: str
    name: str
    start: int | None
    tensor: torch.Tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of these. `params` and groups as in torch; numbers that lie as the parameters do are in `state`, others are its own."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._layouts: dict[int, Layout] = {}

    def bind(self, layouts: Mapping[torch.Tensor, Layout]) -> None:
        """Learn where parameters lie in the tensors to come."""
        self._layouts = {id(flat): layout for flat, layout in layouts.items()}

    def layout(self, flat: torch.Tensor) -> Layout:
        found = self._layouts.get(id(flat))
        return found or self._layouts.setdefault(id(flat), alone(flat))

    def extras(self, flat: torch.Tensor) -> list[Extra]:
        """What is kept for `flat` beside `state`."""
        return []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self.update(flat, flat.grad, group)

    def update(self, flat: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class StableAdamW(ShardedOptimizer):
    """AdamW with Adafactor's update clipping (arXiv 2304.13013, algorithm 2): a parameter whose second moment lags behind its gradients,
    by RMS_t = sqrt(mean(g^2 / max(v, eps^2))) > 1, is moved by lr / RMS_t."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, flat: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, layout, eps = self.state[flat], self.layout(flat), group["eps"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        state["step"] += 1
        t, (beta1, beta2) = float(state["step"]), group["betas"]
        # Moments that begin unbiased: the same as Adam's, corrected (Adafactor, section 7.1).
        first, second = ((1 - beta ** (t - 1)) / (1 - beta**t) * beta for beta in (beta1, beta2))
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        ratios = gradient.square().div_(state["exp_avg_sq"].clamp(min=eps**2))
        rates = group["lr"] / layout.means(ratios).sqrt_().clamp_(min=1)
        update = torch.div(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(eps), out=ratios)
        for part in layout.slices:
            rate, weights = rates[part.index], part.of(flat)
            weights.mul_(1 - rate * group["weight_decay"]).addcmul_(part.of(update), rate, value=-1)


class Adafactor(ShardedOptimizer):
    """Second moments of matrices as an outer product of their rows' and columns' means (arXiv 1804.04235, algorithms 4 and 5), as ViT-G was
    trained (arXiv 2106.04560, section 3.4): a learning rate of its own, not scaled by the weights' norm; momentum kept in bf16; the second
    moment's decay min(beta_2, 1 - t^-0.8). Updates are clipped at an RMS of 1 a parameter (section 6). Weight decay is decoupled.

    Matrices with fewer than `factored_from` rows or columns, and vectors, keep a second moment of each number. `betas[0]` 0: no momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        factored_from: int = 32,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "factored_from": factored_from})
        self._moments: dict[int, list[_Moment]] = {}

    def moments(self, flat: torch.Tensor) -> list[_Moment]:
        """Of each parameter that `flat` is made of."""
        found = self._moments.get(id(flat))
        if found is None:
            layout, least = self.layout(flat), self.defaults["factored_from"]
            found = self._moments[id(flat)] = [_Moment.zeros(layout, i, least, flat.device) for i in range(len(layout.wholes))]
        return found

    def extras(self, flat: torch.Tensor) -> list[Extra]:
        extras = []
        for whole, moment in zip(self.layout(flat).wholes, self.moments(flat), strict=True):
            if moment.rows is not None and moment.columns is not None:
                extras += [
                    Extra("exp_avg_sq_row", whole.name, None, moment.rows),
                    Extra("exp_avg_sq_col", whole.name, None, moment.columns),
                ]
        for part in self.layout(flat).slices:
            if (each := self.moments(flat)[part.index].each) is not None:
                extras.append(Extra("exp_avg_sq", self.layout(flat).wholes[part.index].name, part.start, each))
        return extras

    def update(self, flat: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, layout, moments = self.state[flat], self.layout(flat), self.moments(flat)
        if not state:
            state["step"] = torch.zeros(())
            if group["betas"][0]:
                state["exp_avg"] = torch.zeros_like(flat, dtype=torch.bfloat16)
        state["step"] += 1
        momentum, cap = group["betas"]
        decay = min(cap, 1 - float(state["step"]) ** -0.8)
        update = gradient.square().add_(_LEAST)
        self._average(update, layout, moments, decay)
        # From squares to g / sqrt(their estimate), in place.
        for part in layout.slices:
            moment, mine = moments[part.index], part.of(update)
            if moment.each is not None:
                mine.copy_(moment.each)
            else:
                moment.estimate(part, layout.wholes[part.index].columns, update)
            # The product of a row's and a column's mean may be too small for fp32.
            torch.div(part.of(gradient), mine.clamp_(min=_LEAST).sqrt_(), out=mine)
        clips = layout.means(update.square()).sqrt_().clamp_(min=1)
        for part in layout.slices:
            part.of(update).div_(clips[part.index])
        if momentum:
            moving = state["exp_avg"].float().mul_(momentum).add_(update, alpha=1 - momentum)
            state["exp_avg"].copy_(moving)
            update = moving
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    @staticmethod
    def _average(squares: torch.Tensor, layout: Layout, moments: list[_Moment], decay: float) -> None:
        """Take the squares of this step into all moments, with one collective."""
        factored = [m for m in moments if m.each is None]
        sums = torch.zeros(sum(m.size for m in factored), device=squares.device)
        at, places = 0, {}
        for moment in factored:
            places[id(moment)] = (sums[at : at + moment.height], sums[at + moment.height : at + moment.size])
            at += moment.size
        for part in layout.slices:
            moment = moments[part.index]
            if moment.each is not None:
                moment.each.lerp_(part.of(squares), 1 - decay)
                continue
            by_row, by_column = places[id(moment)]
            for row, column, view in rectangles(part, moment.width, squares):
                by_row[row : row + view.shape[0]] += view.sum(dim=1)
                by_column[column : column + view.shape[1]] += view.sum(dim=0)
        layout.sum(sums)
        for moment in factored:
            by_row, by_column = places[id(moment)]
            assert moment.rows is not None and moment.columns is not None, "factored"
            moment.rows.lerp_(by_row / moment.width, 1 - decay)
            moment.columns.lerp_(by_column / moment.height, 1 - decay)


@dataclass(frozen=True)
class _Moment:
    """The second moment of a parameter seen as a matrix of `height` rows and `width` columns: their means, on every rank; or of each number
    that this rank has (None where it has none of them: `rows` is None too)."""

    height: int
    width: int
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    each: torch.Tensor | None

    @staticmethod
    def zeros(layout: Layout, index: int, least: int, device: torch.device) -> _Moment:
        whole = layout.wholes[index]
        height, width = whole.rows, whole.columns
        if min(height, width) >= least:
            return _Moment(height, width, torch.zeros(height, device=device), torch.zeros(width, device=device), None)
        mine = sum(part.numel for part in layout.slices if part.index == index)
        return _Moment(height, width, None, None, torch.zeros(mine, device=device))

    @property
    def size(self) -> int:
        return self.height + self.width

    def estimate(self, part: Any, columns: int, out: torch.Tensor) -> None:
        """Write rows x columns / their mean (algorithm 4, line 6) to where `part` lies in `out`."""
        assert self.rows is not None and self.columns is not None, "factored"
        rows = self.rows / self.rows.mean()
        for row, column, view in rectangles(part, columns, out):
            torch.outer(rows[row : row + view.shape[0]], self.columns[column : column + view.shape[1]], out=view)

"""Optimisers whose update depends on a whole parameter, not on each number alone: StableAdamW and Adafactor.

Under ZeRO they are given tensors that hold this rank's parts of many parameters. `bind` tells them where which lies; unbound, each tensor
is one whole parameter, as in a plain PyTorch loop. Either way the update is the same.

Where each rank has all of every parameter (stage 0) it could work out their means alone; yet another number of threads rounds a sum
differently, and the ranks' weights would drift apart. There rank 0's sums are everyone's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.train.layout import Layout, alone, rectangles

_BLOCK = 1024  # numbers
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
        self._is_replicated = False

    def bind(self, layouts: Mapping[torch.Tensor, Layout], is_replicated: bool = False) -> None:
        """Learn where parameters lie in the tensors to come. `is_replicated`: there are several ranks, and each has all of them."""
        self._layouts = {id(flat): layout for flat, layout in layouts.items()}
        self._is_replicated = is_replicated

    def layout(self, flat: torch.Tensor) -> Layout:
        found = self._layouts.get(id(flat))
        return found or self._layouts.setdefault(id(flat), alone(flat))

    def extras(self, flat: torch.Tensor) -> list[Extra]:
        """What is kept for `flat` beside `state`."""
        return []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there already"
        stepped = [(flat, group) for group in self.param_groups for flat in group["params"] if flat.grad is not None]
        if self._is_replicated:
            _in_step([self.update(flat, flat.grad, group) for flat, group in stepped])
            return
        for flat, group in stepped:
            for sums in self.update(flat, flat.grad, group):
                self.layout(flat).sum(sums)

    def update(self, flat: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> Updating:
        """Change `flat`. What it yields are sums over this rank's part; when it goes on they are those of all ranks. `gradient` is of no
        use to anybody afterwards."""
        raise NotImplementedError


Updating = Generator[torch.Tensor, None, None]


def _in_step(updates: list[Updating]) -> None:
    """Go through them side by side, with rank 0's sums of all of them in one collective each time."""
    while updates:
        waiting = [(update, sums) for update in updates if (sums := next(update, None)) is not None]
        if waiting:
            agreed = torch.cat([sums for _, sums in waiting])
            dist.broadcast(agreed, src=0)
            for (_, sums), part in zip(waiting, agreed.split([len(sums) for _, sums in waiting]), strict=True):
                sums.copy_(part)
        updates = [update for update, _ in waiting]


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

    def update(self, flat: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> Updating:
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
        yield (means := layout.means(gradient.square().div_(state["exp_avg_sq"].clamp(min=eps**2))))
        rates = group["lr"] / means.sqrt_().clamp_(min=1)
        update = state["exp_avg_sq"].sqrt().add_(eps)
        torch.div(state["exp_avg"], update, out=update)
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

    def update(self, flat: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> Updating:
        state, layout, moments = self.state[flat], self.layout(flat), self.moments(flat)
        if not state:
            state["step"] = torch.zeros(())
            if group["betas"][0]:
                state["exp_avg"] = torch.zeros_like(flat, dtype=torch.bfloat16)
        state["step"] += 1
        momentum, cap = group["betas"]
        decay = min(cap, 1 - float(state["step"]) ** -0.8)
        yield (sums := self._sums(gradient.square().add_(_LEAST), layout, moments, decay))
        self._average(sums, moments, decay)
        self._divide(update := gradient, layout, moments)  # in place: nothing is held while other parameters get as far
        yield (means := layout.means(update.square()))
        clips = means.sqrt_().clamp_(min=1)
        for part in layout.slices:
            part.of(update).div_(clips[part.index])
        if momentum:
            moving = state["exp_avg"].float().mul_(momentum).add_(update, alpha=1 - momentum)
            state["exp_avg"].copy_(moving)
            update = moving
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    @staticmethod
    def _sums(squares: torch.Tensor, layout: Layout, moments: list[_Moment], decay: float) -> torch.Tensor:
        """Of the rows and columns of all factored moments; the others have taken the squares of this step in."""
        sums = torch.zeros(sum(m.size for m in moments), device=squares.device)
        places = dict(zip(map(id, moments), sums.split([m.size for m in moments]), strict=True))
        for part in layout.slices:
            moment = moments[part.index]
            if moment.each is not None:
                moment.each.lerp_(part.of(squares), 1 - decay)
                continue
            by_row, by_column = places[id(moment)].split([moment.height, moment.width])
            for row, column, view in rectangles(part, moment.width, squares):
                by_row[row : row + view.shape[0]] += view.sum(dim=1)
                by_column[column : column + view.shape[1]] += view.sum(dim=0)
        return sums

    @staticmethod
    def _average(sums: torch.Tensor, moments: list[_Moment], decay: float) -> None:
        """Take them into the factored moments."""
        for moment, own in zip(moments, sums.split([m.size for m in moments]), strict=True):
            if moment.rows is not None and moment.columns is not None:
                by_row, by_column = own.split([moment.height, moment.width])
                moment.rows.lerp_(by_row / moment.width, 1 - decay)
                moment.columns.lerp_(by_column / moment.height, 1 - decay)

    @staticmethod
    def _divide(gradient: torch.Tensor, layout: Layout, moments: list[_Moment]) -> None:
        """By the root of the second moment."""
        estimate = torch.empty_like(gradient)
        for part in layout.slices:
            moment, mine = moments[part.index], part.of(estimate)
            if moment.each is not None:
                mine.copy_(moment.each)
            else:
                moment.estimate(part, layout.wholes[part.index].columns, estimate)
            # The product of a row's and a column's mean may be too small for fp32.
            part.of(gradient).div_(mine.clamp_(min=_LEAST).sqrt_())


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
        """Rows and columns that are summed up; none where nothing is factored."""
        return 0 if self.each is not None else self.height + self.width

    def estimate(self, part: Any, columns: int, out: torch.Tensor) -> None:
        """Write rows x columns / their mean (algorithm 4, line 6) to where `part` lies in `out`."""
        assert self.rows is not None and self.columns is not None, "factored"
        rows = self.rows / _mean(self.rows)
        for row, column, view in rectangles(part, columns, out):
            torch.outer(rows[row : row + view.shape[0]], self.columns[column : column + view.shape[1]], out=view)


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Rounded alike by any number of threads, among which torch shares a sum of more than 32,768 numbers."""
    blocks = F.pad(values, (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
    return blocks.sum(dim=1).sum() / values.numel()

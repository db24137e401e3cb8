"""Gradients summed over the ranks while the backward pass goes on, where each rank has whole ones: at ZeRO stage 0, in fp32.

    backward   a bucket's gradients are all there ─▶ one flat tensor, of which they are parts from now on ─▶ all-reduce, beside the rest
    finish     what the loss never saw counts as zero ─▶ the buckets that are left ─▶ wait for all

DeepSpeed sums at stage 0 once the backward pass is done, through a copy to a flat tensor and a copy back. This is DDP's way (Li et al.
2020, arXiv 2006.15704, section 3.2.3), with its bucket size and its order: the last parameters first, as their gradients come first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from pipeline.plan.setup import SUM_BUCKET


class OverlappedSum:
    """Sums gradients over all ranks in place, each step anew. Divided by nothing: the loss is. Every rank has the same parameters.

    Args:
        is_early: send a bucket as soon as it is full; else all of them in `finish`. Where blocks are computed once more, a gradient may
            come in parts, of which nobody knows which is the last.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], is_early: bool = True) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._buckets = _cut(trained[::-1], SUM_BUCKET)
        self._number = {id(parameter): number for number, bucket in enumerate(self._buckets) for parameter in bucket}
        self._missing: list[int] = []
        self._works: list[dist.Work] = []
        self._is_on = False
        if is_early:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self) -> None:
        """The backward pass that comes now is the last before the update."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._is_on = True

    def _arrived(self, parameter: torch.Tensor) -> None:
        if not self._is_on:
            return
        number = self._number[id(parameter)]
        assert number >= len(self._works), "a gradient was added to after its bucket had been sent"
        self._missing[number] -= 1
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:  # in the same order on every rank
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._works)]
        flat = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket])
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view(parameter.shape)
        self._works.append(dist.all_reduce(flat, async_op=True))

    def finish(self) -> None:
        """Every gradient is the sum of all ranks' after this."""
        self._is_on = False
        while len(self._works) < len(self._buckets):
            self._send()
        for work in self._works:
            work.wait()
        self._works.clear()


def _cut(parameters: list[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Neighbours, of at most `size` numbers together, or one parameter alone."""
    buckets: list[list[nn.Parameter]] = []
    room = -1
    for parameter in parameters:
        if parameter.numel() > room:
            buckets.append([])
            room = size
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets

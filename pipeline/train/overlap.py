"""Gradients summed over the ranks in place, on GPUs while the backward pass goes on, where each rank has whole ones: at ZeRO stage 0, in
fp32.

    backward   a gradient is made ─▶ copied to its place in a bucket, where others are added to it
               early, in the last micro-batch: a bucket is full ─▶ all-reduce, beside the rest
    finish     what the loss never saw counts as zero ─▶ the buckets that are left ─▶ wait for all

DeepSpeed sums at stage 0 once the backward pass is done, through a copy to a flat tensor and a copy back. This is DDP's way (Li et al.
2020, arXiv 2006.15704, section 3.2.3), with its bucket size and its order: the last parameters first, as their gradients come first.
Buckets are made once and stay.
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
            come in parts, of which nobody knows which is the last. On a CPU gloo would work on the cores that compute (a step of ViT-S on
            two ranks gains 1%), and its buffers among the gradients leave holes in the heap (0.4 GiB of 200 million parameters).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], is_early: bool = True) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._is_early = is_early
        self._buckets = _cut(trained[::-1], SUM_BUCKET)
        self._flats: list[torch.Tensor] = []  # one a bucket, once a gradient has come
        self._places: dict[int, tuple[int, torch.Tensor]] = {}  # of a parameter, by id: the number of its bucket, its part of the flat one
        self._missing: list[int] = []
        self._works: list[dist.Work] = []
        self._is_last = False
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self) -> None:
        """The backward pass that comes now is the last before the update."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._is_last = self._is_early

    def _arrived(self, parameter: torch.Tensor) -> None:
        number = self._move(parameter)
        if not self._is_last:
            return
        assert number >= len(self._works), "a gradient was added to after its bucket had been sent"
        self._missing[number] -= 1
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:  # in the same order on every rank
            self._send()

    def _move(self, parameter: torch.Tensor) -> int:
        """Have the parameter's gradient lie in its bucket, whose number this gives."""
        if not self._flats:
            self._lay_out()
        number, part = self._places[id(parameter)]
        if parameter.grad is None:
            part.zero_()
        elif parameter.grad.data_ptr() != part.data_ptr():
            part.copy_(parameter.grad)
        parameter.grad = part
        return number

    def _lay_out(self) -> None:
        for number, bucket in enumerate(self._buckets):
            flat = torch.empty(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                self._places[id(parameter)] = number, part.view(parameter.shape)
            self._flats.append(flat)

    def _send(self) -> None:
        self._works.append(dist.all_reduce(self._flats[len(self._works)], async_op=True))

    def finish(self) -> None:
        """Every gradient is the sum of all ranks' after this."""
        self._is_last = False
        for bucket in self._buckets[len(self._works) :]:
            for parameter in bucket:
                self._move(parameter)
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

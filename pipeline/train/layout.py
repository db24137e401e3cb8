"""Where the parameters lie in the tensors that an optimiser is given, which under ZeRO are a rank's part of many parameters end to end.

An optimiser whose update is not element-wise needs numbers of whole parameters: it sums over what this rank has of each, and a `Layout`
adds up all ranks' sums, for all parameters of a tensor in one collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Whole:
    """A parameter, whichever ranks have it. As a matrix: its first dimension by all others."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return self.numel // self.rows


@dataclass(frozen=True)
class Slice:
    """What this rank has of the `index`th parameter of a tensor: `numel` numbers from `start` of the flattened parameter on are those of
    the tensor from `offset` on."""

    index: int
    start: int
    numel: int
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(-1)[self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class Layout:
    """Of one tensor: all parameters that it is made of, over all ranks, and this rank's slices of them. `is_shared`: the ranks have
    different parts; else each has all of it."""

    wholes: Sequence[Whole]
    slices: Sequence[Slice]
    is_shared: bool = False

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's sums to those of all ranks, in place. All ranks together."""
        if self.is_shared:
            on = values.cuda() if torch.cuda.is_available() else values  # where the optimiser is offloaded they are in host memory
            dist.all_reduce(on)
            values.copy_(on)
        return values

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's share of the mean of each whole parameter's numbers, (wholes,), where `values` lie as the tensor does; all ranks'
        sum is the mean."""
        sums = torch.zeros(len(self.wholes), device=values.device, dtype=values.dtype)
        for part in self.slices:
            sums[part.index] = part.of(values).sum() / self.wholes[part.index].numel
        return sums


def alone(parameter: torch.Tensor) -> Layout:
    """Of a tensor that is one whole parameter."""
    return Layout([Whole("", tuple(parameter.shape))], [Slice(0, 0, parameter.numel(), 0)])


def rectangles(part: Slice, columns: int, flat: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """What `part` covers of a matrix with `columns`, as up to three rectangles: (first row, first column, (rows, columns) view of `flat`):
    the rest of a row, whole rows, the beginning of a row."""
    start, stop, mine = part.start, part.start + part.numel, part.of(flat)
    at = start
    while at < stop:
        row, column = divmod(at, columns)
        if column or stop - at < columns:
            end = min(stop, (row + 1) * columns)
            yield row, column, mine[at - start : end - start].view(1, -1)
        else:
            end = at + (stop - at) // columns * columns
            yield row, 0, mine[at - start : end - start].view(-1, columns)
        at = end

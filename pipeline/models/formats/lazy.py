"""Tensors that are made when somebody wants them, of the tensors of ours that it takes: so that a model of any size is written, under any
names and in any layout, with a few of its tensors in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.models.model import Model


class Rows(NamedTuple):
    """Rows `start` up to `stop` of our tensor `name`, or all of it."""

    name: str
    start: int = 0
    stop: int | None = None


Read = Callable[[Sequence[Rows]], list[torch.Tensor]]  # those rows, in the same order


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Lazy:
    """What `make` makes of the tensors that `parts` name. `like` has its shape and type, on the meta device."""

    like: torch.Tensor
    parts: tuple[Rows, ...]
    make: Callable[..., torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Lazy:
        """One that is there already."""
        return Lazy(tensor.to("meta"), (), lambda: tensor)

    @property
    def dtype(self) -> torch.dtype:
        """As it is written: floating-point numbers in fp32."""
        return torch.float32 if self.like.is_floating_point() else self.like.dtype

    @property
    def bytes(self) -> int:
        """As it is written."""
        return self.like.numel() * self.dtype.itemsize

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Lazy:
        return Lazy(change(self.like), self.parts, lambda *parts: change(self.make(*parts)))

    def chunk(self, count: int) -> list[Lazy]:
        """So many equal runs of its rows; each takes no others."""
        if count == 1:
            return [self]
        assert self.make is _as_is and self.like.shape[0] % count == 0, "a whole tensor of ours, cut evenly"
        ((name, _, _),) = self.parts
        size = self.like.shape[0] // count
        return [Lazy(self.like[:size], (Rows(name, i * size, (i + 1) * size),), _as_is) for i in range(count)]


def join(one: Lazy, other: Lazy, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Lazy:
    """What `change` makes of two."""
    first = len(one.parts)
    return Lazy(
        change(one.like, other.like), one.parts + other.parts, lambda *parts: change(one.make(*parts[:first]), other.make(*parts[first:]))
    )


@dataclass(frozen=True)
class State:
    """The state of a model: what tensors there are, and `read`, which fetches some."""

    tensors: dict[str, Lazy]
    read: Read

    @staticmethod
    def of(shapes: Mapping[str, torch.Tensor], read: Read) -> State:
        """`shapes`: tensors of these shapes and types, by our names; their numbers are not looked at."""
        return State({name: Lazy(like.to("meta"), (Rows(name),), _as_is) for name, like in shapes.items()}, read)

    def get(self, name: str) -> torch.Tensor:
        """One of ours, now."""
        (tensor,) = self.read([Rows(name)])
        return tensor


def state_of(model: Model) -> State:
    """That of a model in memory."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return State.of(state, lambda rows: [state[r.name] if r.stop is None else state[r.name][r.start : r.stop] for r in rows])

"""What collectives cost: seconds and bytes of all that torch carries between ranks, DeepSpeed's calls and ours.

Both call functions of torch.distributed, which call a ProcessGroup and wait for the Work that it gives them. `watching` puts a clock around
these calls, which none can pass by, and takes it away again.

On a CPU (gloo) a call blocks, so its wall time is what it costs. On a GPU (NCCL) calls return at once, and what they cost is what the
compute stream waits: CUDA events are recorded on it before and after each call and each wait (for a Work, or for another stream, on which
ZeRO's stage 3 gathers ahead). What overlaps with computing costs nothing and is not counted; nor is the time of collectives that DeepSpeed
runs on streams of its own, beyond what the compute stream then waits for them. Waiting for a slower rank is counted in both cases.

Bytes are of the whole tensor that a collective is about: what is reduced, the gathered result, what is scattered. A ring carries
2 (w - 1) / w of that a rank in an all-reduce, (w - 1) / w in an all-gather and in a reduce-scatter.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pipeline.train.speed import COMMUNICATION, COMPUTE, OTHER, Clock

# Method of a ProcessGroup -> (kind of collective, which of its arguments is the whole tensor: None for the barrier).
_CALLS: dict[str, tuple[str, int | None]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "send": ("send", 0),
    "recv": ("receive", 0),
    "recv_anysource": ("receive", 0),
    "barrier": ("barrier", None),
}


@contextmanager
def watching(clock: Clock) -> Iterator[None]:
    """Inside, `clock` learns of every collective of its thread's; bytes of other threads' are counted, too."""
    timed = _Events(clock) if clock.is_async else _Blocking(clock)
    if isinstance(timed, _Events):
        clock.exposed = timed.take
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        if name in vars(owner):  # versions of torch have some of them each
            replaced.append((owner, name, vars(owner)[name]))  # as it stands there: what getattr gives is no method any more
            setattr(owner, name, make(timed.around(getattr(owner, name))))

    for name, (kind, whole) in _CALLS.items():
        replace(dist.ProcessGroup, name, partial(_counted, clock, kind, whole))
    replace(dist.Work, "wait", lambda wait: wait)
    if clock.is_async:
        replace(torch.cuda.Stream, "wait_event", lambda wait: wait)  # wait_stream calls it
    try:
        yield
    finally:
        for owner, name, before in replaced:
            setattr(owner, name, before)


def _counted(clock: Clock, kind: str, whole: int | None, call: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        # args[0] is the group
        clock.sent[kind] = clock.sent.get(kind, 0) + (_bytes(args[whole + 1]) if whole is not None and len(args) > whole + 1 else 0)
        return call(*args, **kwargs)

    return counting


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of lists of them."""
    return tensors.numel() * tensors.element_size() if torch.is_tensor(tensors) else sum(map(_bytes, tensors))


class _Blocking:
    """Wall time of calls that block."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        clock = self.clock

        def timing(*args: Any, **kwargs: Any) -> Any:
            if clock.kind not in (COMPUTE, OTHER) or threading.get_ident() != clock.thread:
                return call(*args, **kwargs)
            before = clock.switch(COMMUNICATION)
            try:
                return call(*args, **kwargs)
            finally:
                clock.switch(before)

        return timing


class _Events:
    """Time that the compute stream, which is the current one where this is made, spends between the beginning and the end of calls."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.stream = clock, torch.cuda.current_stream()
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            is_counted = self.clock.kind in (COMPUTE, OTHER) and torch.cuda.current_stream() == self.stream
            if not is_counted or torch.cuda.is_current_stream_capturing():
                return call(*args, **kwargs)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self.stream)
            result = call(*args, **kwargs)
            end.record(self.stream)
            self._open.append((begin, end))
            while self._open and self._open[0][1].query():  # so that few are kept
                self._add(*self._open.popleft())
            return result

        return timing

    def take(self) -> float:
        """Seconds since the last call; waits for what is not done yet."""
        while self._open:
            begin, end = self._open.popleft()
            end.synchronize()
            self._add(begin, end)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._seconds += begin.elapsed_time(end) / 1000

"""How fast training is, and where its time goes, by the wall clock.

Every second of the loop is of one kind:

    input           this rank waited for its next micro-batch
    compute         forward, backward and update
    communication   inside collectives, waiting for slower ranks included (`communication.py` says what that is on a GPU)
    checkpoint      training stood still for a save
    validation      the objective on held-out data, and scores
    other           logging, and what else the hooks do between two steps

A collective belongs to the kind within which it is called where that is validation or checkpoint. On a GPU, which works while the host
goes on, what the host does between two steps costs nothing as long as the device has work, and counts as compute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipeline.core.world import World

Row = dict[str, float]
INPUT, COMPUTE, COMMUNICATION, CHECKPOINT, VALIDATION, OTHER = "input", "compute", "communication", "checkpoint", "validation", "other"
KINDS = (INPUT, COMPUTE, COMMUNICATION, CHECKPOINT, VALIDATION, OTHER)


class Clock:
    """Seconds of one rank's loop by kind since it was last read; `waited`: seconds waited for data, ever.

    Spans may be nested: a second belongs to the innermost. It is one thread's, that which calls `start`.
    """

    def __init__(self, is_async: bool = False) -> None:
        """`is_async`: on a device that works while the host goes on."""
        self.is_async = is_async
        self.exposed: Callable[[], float] = lambda: 0.0  # seconds since the last call that the device waited for collectives
        self.sent: dict[str, int] = {}  # bytes by kind of collective since it was last read
        self.waited = 0.0
        self.seconds: dict[str, float] = {}  # by kind since it was last read
        self.own: list[float] = []  # seconds a step of each rank by itself, not waiting for others, when it was last read
        self._steps = self._samples = 0
        self.start()

    def start(self) -> None:
        """Forget what was, and begin."""
        self.thread = threading.get_ident()
        self.kind, self._since = COMPUTE, time.perf_counter()
        self._take()

    def _take(self) -> tuple[dict[str, float], int, int, dict[str, int]]:
        """Seconds by kind, steps, samples, bytes by kind of collective since it was last called."""
        now = self.seconds, self._steps, self._samples, self.sent
        self.seconds, self._steps, self._samples, self.sent = dict.fromkeys(KINDS, 0.0), 0, 0, {}
        return now

    def count(self, samples: int) -> None:
        """A step of so many samples is done."""
        self._samples += samples
        self._steps += 1

    def span(self, kind: str) -> _Span:
        """A context manager: what is done in it is of this kind."""
        return _Span(self, kind)

    def waiting(self) -> _Span:
        return _Span(self, INPUT)

    def beside(self) -> _Span:
        """What the host does between two steps."""
        return _Span(self, COMPUTE if self.is_async else OTHER)

    def switch(self, kind: str) -> str:
        """From now on it is of `kind`; gives what it was before."""
        now, before = time.perf_counter(), self.kind
        self.seconds[before] += now - self._since
        if before == INPUT:
            self.waited += now - self._since
        self.kind, self._since = kind, now
        return before

    def read(self, flops_a_sample: float, world: World, peak: float | None = None) -> Row:
        """Of the steps since it was last read: samples and floating-point operations a second of all ranks together, without the time of
        validation and checkpoints; where `peak`, the most that one device can do a second, is known, how much of that was made use of
        (MFU); seconds a step by kind, which add up to `time/step`, as the mean over ranks, and of the rank that the others waited for;
        bytes a step that a rank gave to collectives. Every rank calls this together, and gets the same."""
        self.switch(self.kind)
        seconds, steps, samples, sent = self._take()  # now, for what follows is of the next time
        steps, exposed = max(1, steps), min(self.exposed(), seconds[COMPUTE])
        seconds[COMPUTE] -= exposed
        seconds[COMMUNICATION] += exposed
        ranks = world.table([seconds[kind] / steps for kind in KINDS])
        mean = {kind: sum(rank[k] for rank in ranks) / world.size for k, kind in enumerate(KINDS)}
        whole = max(sum(mean.values()), 1e-9)
        training = max(whole - mean[VALIDATION] - mean[CHECKPOINT], 1e-9)
        rate = samples / steps / training
        flops = rate * flops_a_sample
        row = {
            "train/images_per_s": rate,
            "train/tflops_per_s": flops / 1e12,
            **({"train/mfu": flops / (world.size * peak)} if peak else {}),
            "train/data_wait_fraction": mean[INPUT] / training,
            "time/step": whole,
            **{f"time/{kind}": seconds for kind, seconds in mean.items()},
        }
        self.own = [sum(seconds for kind, seconds in zip(KINDS, rank, strict=True) if kind in _OWN) for rank in ranks]
        if world.size > 1:
            slowest = max(range(world.size), key=self.own.__getitem__)
            row |= {"slowest/rank": slowest, **{f"slowest/{kind}": ranks[slowest][k] for k, kind in enumerate(KINDS)}}
        row |= {f"communication/{name}_bytes": sent[name] / steps for name in sorted(sent)}
        row["communication/bytes"] = sum(sent.values()) / steps
        return row


_OWN = (INPUT, COMPUTE, OTHER)  # what a rank is slow in; the others then wait for it in collectives


class _Span:
    __slots__ = ("_before", "_clock", "_kind")

    def __init__(self, clock: Clock, kind: str) -> None:
        self._clock, self._kind = clock, kind

    def __enter__(self) -> None:
        self._before = self._clock.switch(self._kind)

    def __exit__(self, *_: object) -> None:
        self._clock.switch(self._before)

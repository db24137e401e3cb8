"""A rank's own part in finding out who hangs and who lags: it leaves signs of life where a process beside it sees them (`watcher.py`).

    the training thread   `beat` at each thing that it begins: a part of the start, waiting for input, a step, validation, saving
    a thread              that the process runs at all; and ends it with exit code 33 where the watchers have decided so

The signs lie in memory that both processes have, so that leaving one costs a microsecond, and a rank that is stopped is seen from outside.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.core.errors import ExitCode
from pipeline.core.progress import say
from pipeline.core.world import World
from pipeline.train.hub import INPUT, SAVING, STARTING, STEP, VALIDATING
from pipeline.train.watcher import SIZE, Signs

if TYPE_CHECKING:
    from pipeline.checkpoint import Run
    from pipeline.stream.batches import MicroBatch

__all__ = ["INPUT", "SAVING", "STARTING", "STEP", "VALIDATING", "Lag", "Watch", "beat", "watched"]

_LOOK_EVERY = 0.5  # seconds
_LAST_WORDS = 1.0  # seconds that a message may take to whoever shows it
_DUMP = signal.SIGRTMIN + 5 if hasattr(signal, "SIGRTMIN") else None  # asks for the stacks; the others have meanings of their own

_signs: Signs | None = None  # of this process, while it is watched
_is_warm = False  # whether a step has been made: the first ones may compile for long


def beat(phase: int, step: int | None = None) -> None:
    """The training thread begins something of this kind; `step` optimiser steps are done. Until one is, all of it is starting."""
    global _is_warm
    if _signs is not None:
        _is_warm = _is_warm or step is not None
        _signs.beat(phase if _is_warm else STARTING, step)


def watched(batches: Generator[MicroBatch, None, None]) -> Generator[MicroBatch, None, None]:
    """The same, with signs of life."""
    try:
        while True:
            beat(INPUT)
            batch = next(batches)
            beat(STEP)
            yield batch
    finally:
        batches.close()


class Watch:
    """While inside, this rank is watched, where there are others that would wait for it. `hang`: seconds after which a rank that does not
    run has hung; None watches nobody. All ranks enter together."""

    def __init__(self, run: Run, world: World, hang: float | None) -> None:
        self.run, self.world, self.hang = run, world, hang
        self._over = threading.Event()
        self._beside = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        global _signs, _is_warm
        if self.hang is None or self.world.size == 1 or _DUMP is None:
            return self
        memory = self._beside.enter_context(tempfile.TemporaryFile(prefix="tessera-signs-"))
        stacks = self._beside.enter_context(tempfile.TemporaryFile(prefix="tessera-stacks-"))
        memory.truncate(SIZE)
        _signs, _is_warm = Signs(mmap.mmap(memory.fileno(), SIZE)), False
        _signs.beat(STARTING, 0)
        _signs.live()
        faulthandler.register(_DUMP, file=stacks, all_threads=True)
        about = {
            "rank": self.world.rank, "size": self.world.size, "pid": os.getpid(), "host": socket.gethostname(), "hang": self.hang,
            "signal": int(_DUMP), "signs": memory.fileno(), "stacks": stacks.fileno(),
            "url": self.run.directory.url, "endpoint": self.run.directory.endpoint,
        }  # fmt: skip
        hub = self.world.broadcast((_free_port(), secrets.token_hex(32)) if self.world.is_main else None)
        about["address"], about["key"] = [os.environ.get("MASTER_ADDR", "127.0.0.1"), hub[0]], hub[1]
        # Its standard input ends with this process, and so does it; what it is told lies there, where no other user reads it.
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "pipeline.train.watcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(memory.fileno(), stacks.fileno()),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(json.dumps(about).encode() + b"\n")
        self._watcher.stdin.flush()
        self._thread = threading.Thread(target=self._live, args=(_signs,), name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _signs
        if _signs is None:
            return
        self._over.set()
        self._thread.join()
        _signs = None
        assert self._watcher.stdin is not None and _DUMP is not None
        self._watcher.stdin.close()
        try:
            self._watcher.wait(5)
        except subprocess.TimeoutExpired:
            self._watcher.kill()
        faulthandler.unregister(_DUMP)
        self._beside.close()

    def _live(self, signs: Signs) -> None:
        said = ""
        while not self._over.wait(_LOOK_EVERY):
            signs.live()
            is_end, text = signs.verdict()
            if text and text != said:
                said = text
                say(text)
            if is_end:
                time.sleep(_LAST_WORDS)
                os._exit(int(ExitCode.INFRASTRUCTURE))  # the training thread may be where no exception reaches it


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


class Lag:
    """Tells a rank that is slower than the others for some time, at least `lasts` seconds, for then all wait for it at each step."""

    _LOOKS = 3  # in a row

    def __init__(self, factor: float | None, world: World, lasts: float = 60.0) -> None:
        self.factor, self.world, self.lasts = factor, world, lasts
        self._rank = -1  # the slowest one, if it is too slow
        self._looks, self._since, self._is_told = 0, 0.0, False

    def look(self, seconds: list[float]) -> float | None:
        """How many times as long as the median of the others the slowest takes by itself, by `seconds` of each rank (`Clock.own`, on all
        ranks); None where nobody looks."""
        return None if self.factor is None or self.world.size == 1 else self.judge(seconds)

    def judge(self, seconds: list[float]) -> float:
        """`seconds` by rank."""
        assert self.factor is not None
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        usual = median(seconds[:slowest] + seconds[slowest + 1 :])
        ratio, now = seconds[slowest] / usual if usual > 0 else 1.0, time.monotonic()
        if ratio <= self.factor or slowest != self._rank:
            self._rank = slowest if ratio > self.factor else -1
            self._looks, self._since, self._is_told = 0, now, False
        self._looks += 1
        is_lasting = self._rank >= 0 and self._looks >= self._LOOKS and now - self._since >= self.lasts
        if is_lasting and not self._is_told and self.world.is_main:
            self._is_told = True
            say(
                f"warning: pretrain: rank {slowest} lags: for input and computing it takes {ratio:.1f} times as long as the "
                "others, which wait for it (a slower device, other work on its machine, or slow input)"
            )
        return ratio

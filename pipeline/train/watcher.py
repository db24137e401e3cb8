"""The process beside each rank that sees whether the rank still runs, when the rank itself cannot: python -m pipeline.train.watcher.

    rank ──signs of life──▶ its watcher ──reports──▶ the watcher of rank 0 ──who hangs──▶ all watchers ──stacks, then the end──▶ ranks

Who hangs, and after how long, is said in `hub.py`. After half of the time each watcher writes its rank's stacks, to standard error and to
`stacks/` in the run's directory; after all of it the ranks end with exit code 33, and whoever started them may start them again, from the
last checkpoint.

It imports little but the standard library until there are stacks to keep, so that it takes ten megabytes and starts at once.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from pipeline.train.hub import DOING, Hub, Report, Verdict, connect
from pipeline.train.stacks import kernel_stacks, process_state, python_stacks

_LAYOUT = struct.Struct(
    "<qqqddqq"
)  # things begun, steps done, phase, when it was begun, when the process ran; whether to end, bytes of text
_TEXT = 1024  # bytes
SIZE = _LAYOUT.size + _TEXT
_TICK = 1.0  # seconds
_DUMPED = 3.0  # seconds that a rank may take to write its stacks
_ENDED = 5.0  # seconds that it may take to end


class Signs:
    """What a rank and its watcher tell each other, in memory that both have. Each word is written by one of them alone."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._counter = self._step = 0

    def beat(self, phase: int, step: int | None = None) -> None:
        self._counter += 1
        self._step = self._step if step is None else step
        struct.pack_into("<qqq", self._memory, 0, self._counter, self._step, phase)

    def live(self) -> None:
        struct.pack_into("<d", self._memory, 24, time.monotonic())

    def read(self) -> tuple[int, int, int, float]:
        return _LAYOUT.unpack_from(self._memory)[:4]

    def tell(self, text: str, is_end: bool) -> None:
        data = text.encode()[:_TEXT]
        self._memory[_LAYOUT.size : _LAYOUT.size + len(data)] = data
        struct.pack_into("<qq", self._memory, 32, is_end, len(data))

    def verdict(self) -> tuple[bool, str]:
        is_end, length = struct.unpack_from("<qq", self._memory, 32)
        return bool(is_end), self._memory[_LAYOUT.size : _LAYOUT.size + length].decode(errors="ignore")


class Watcher:
    """Of one rank; `about` is what that told it."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about, self.rank, self.pid = about, int(about["rank"]), int(about["pid"])
        self.signs = Signs(mmap.mmap(about["signs"], SIZE))
        self._idle = self._mute = 0.0
        self._at, self._cpu, self._lived, self._counter = time.monotonic(), -1, 0.0, -1
        self._told: list[int] = []

    def report(self) -> Report:
        counter, step, phase, lived = self.signs.read()
        now, (state, cpu) = time.monotonic(), process_state(self.pid)
        # Time for which this process stood still as well does not count: the whole machine did, or somebody stopped all.
        passed, self._at = min(now - self._at, 2 * _TICK), now
        runs = lived != self._lived or (cpu != self._cpu and state != "T")
        self._mute = 0.0 if runs else self._mute + passed
        self._idle = 0.0 if counter != self._counter else self._idle + passed
        self._lived, self._cpu, self._counter = lived, cpu, counter
        return Report(self.rank, counter, step, phase, self._idle, self._mute, state, self.pid, self.about["host"])

    def follow(self, verdict: Verdict, report: Report) -> None:
        if verdict.ranks and verdict.ranks != self._told:
            self._told = verdict.ranks
            if verdict.speaker == self.rank:
                self.signs.tell(verdict.text, False)
            self._keep(self._stacks(verdict, report), report.step)
        if verdict.is_end:
            self.signs.tell(verdict.text if verdict.speaker == self.rank else "", True)
            self._end()

    def _stacks(self, verdict: Verdict, report: Report) -> str:
        """What this rank does, as text; Python's own where it runs, read from outside where it does not."""
        who = f"rank {self.rank} of {self.about['size']}, process {self.pid} on {report.host}"
        head = f"{who}: {DOING[report.phase]} after step {report.step}"
        found = [f"{head}; {'hangs' if self.rank in verdict.ranks else 'waits'} ({verdict.text.partition(': pretrain: ')[2]})"]
        size = os.fstat(self.about["stacks"]).st_size
        if report.mute < 2 * _TICK:
            os.kill(self.pid, self.about["signal"])
            deadline = time.monotonic() + _DUMPED
            while time.monotonic() < deadline and os.fstat(self.about["stacks"]).st_size == size:
                time.sleep(0.1)
            time.sleep(0.2)  # all of it
        if written := os.pread(self.about["stacks"], 1 << 20, size).decode(errors="replace"):
            return "\n".join([*found, written])
        return "\n".join([*found, kernel_stacks(self.pid), python_stacks(self.pid)])

    def _keep(self, text: str, step: int) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        from pipeline.core.storage import Storage

        try:
            Storage(self.about["url"], self.about["endpoint"]).write(f"stacks/step-{step}-rank-{self.rank:05d}.txt", text.encode())
        except Exception as e:  # noqa: BLE001  they are on standard error; the run ends all the same
            sys.stderr.write(f"warning: the stacks of rank {self.rank} could not be kept in the run's directory ({e})\n")

    def _end(self) -> None:
        deadline = time.monotonic() + _ENDED
        while time.monotonic() < deadline:
            if process_state(self.pid)[0] in ("", "Z"):
                return
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)  # the only one that reaches a process that is stopped


def main() -> None:
    about = json.loads(sys.stdin.buffer.readline())
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)  # meant for the rank; this one ends when it does
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    watcher, address, key = Watcher(about), (about["address"][0], int(about["address"][1])), bytes.fromhex(about["key"])
    try:
        hub = Hub(about["size"], about["hang"], address[1], key) if watcher.rank == 0 else None
    except OSError as e:
        watcher.signs.tell(
            f"warning: pretrain.guard.hang: nobody watches for ranks that hang, port {address[1]} cannot be had ({e})", False
        )
        return
    line: Connection | None = None
    while True:
        report = watcher.report()
        try:
            if hub is not None:
                verdict = hub.take(report)
                if text := hub.absent():
                    watcher.signs.tell(text, False)
            else:
                line = line or connect(address, key)
                line.send_bytes(json.dumps(asdict(report)).encode())
                verdict = Verdict(**json.loads(line.recv_bytes()))
        except (OSError, EOFError):  # rank 0 has not begun, or its machine is gone, which the others' own collectives find out
            line = None
        else:
            watcher.follow(verdict, report)
        time.sleep(_TICK)


if __name__ == "__main__":
    main()

"""Who hangs: what each watcher reports of its rank, the judgement on it, and the hub at rank 0's watcher, where reports come together.

A rank has hung where its process does not run (it was stopped, or is stuck in the kernel), for `hang` seconds; or where it has begun
nothing new for as long as the kind of thing allows. Of several that wait, the one that is furthest behind is the one the others wait for.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

STARTING, INPUT, STEP, VALIDATING, SAVING = range(5)
DOING = ("starting", "waiting for input", "in a training step", "validating", "saving")
# How long one thing may take, in multiples of `hang` and in seconds beside: a store may be asked for long, a step may compile once more.
# Starting goes up to the end of the first step: operators and blocks are compiled, caches are cold, a whole checkpoint is read.
_LIMITS = {STARTING: (10, 900.0), INPUT: (1, 900.0), STEP: (4, 0.0), VALIDATING: (1, 1800.0), SAVING: (math.inf, 0.0)}
_GATHERED = 60.0  # seconds after which every rank has reported, where nothing is wrong
_SILENT = 60.0  # seconds that the other end of a connection may say nothing; reports come every second
_STRANGE = (AuthenticationError, AssertionError, EOFError, OSError)  # of an end that has not the key, or is gone, or never says a word


@dataclass(frozen=True)
class Report:
    """Of one rank: `counter` things begun, `step` done, `phase`; `idle` seconds since the last was begun; `mute` seconds for which its
    process has not run; its `state` as the kernel has it; `pid` on `host`."""

    rank: int
    counter: int
    step: int
    phase: int
    idle: float
    mute: float
    state: str
    pid: int
    host: str


@dataclass(frozen=True)
class Verdict:
    """Which ranks hang, `text` says so, `speaker` is the rank that tells people; `is_end`: it is time to end."""

    ranks: list[int] = field(default_factory=list)
    text: str = ""
    speaker: int = -1
    is_end: bool = False


def judge(reports: Sequence[Report], hang: float, part: float = 1.0) -> tuple[list[Report], str]:
    """Those that hang, and what they do, in a clause; nobody where none has for `part` of the time that it may."""
    stopped = [r for r in reports if r.mute > part * hang and (r.phase != STARTING or r.state == "T")]
    if stopped:
        of = {"T": "is stopped", "D": "is stuck in the kernel", "Z": "is dead"}.get(stopped[0].state, "does not run")
        return stopped, f"{of} and has not run for {stopped[0].mute:.0f} s"
    if not reports:
        return [], ""
    least = min(r.counter for r in reports)
    behind = [r for r in reports if r.counter == least]
    times, beside = _LIMITS[behind[0].phase]
    if all(r.idle > part * (times * hang + beside) for r in behind):
        return behind, f"has got no further for {behind[0].idle:.0f} s, {DOING[behind[0].phase]}"
    return [], ""


class Hub:
    """At the watcher of rank 0: takes the reports of `size` ranks at `port`, from whoever has `key`, and gives the verdict. Raises OSError
    where the port cannot be had."""

    def __init__(self, size: int, hang: float, port: int, key: bytes) -> None:
        self.size, self.hang, self.port = size, hang, port
        self._key = key
        self._reports: dict[int, Report] = {}
        self._verdict = Verdict()
        self._lock = threading.Lock()
        self._began, self._has_told = time.monotonic(), False
        self._listener = _listen(port, max(128, min(size, 4096)))  # strangers among them: who finds no room tries again a second later
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
                # Each by itself, before it has said anything: a stranger that stays silent keeps nobody waiting.
                threading.Thread(target=self._serve, args=(peer,), daemon=True).start()
            except (OSError, RuntimeError):  # gone again, or for the moment there are too many open files or threads
                time.sleep(0.1)

    def _serve(self, peer: socket.socket) -> None:
        with _patient(peer) as connection:
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
            except _STRANGE:
                return
            try:
                while True:
                    report = Report(**json.loads(connection.recv_bytes()))
                    connection.send_bytes(json.dumps(asdict(self.take(report))).encode())
            except (EOFError, OSError):
                return  # its rank has ended, or it will connect again

    def take(self, report: Report) -> Verdict:
        with self._lock:
            self._reports[report.rank] = report
            if len(self._reports) == self.size and not self._verdict.is_end:
                self._decide()
            return self._verdict

    def absent(self) -> str:
        """Told once, where some rank has not reported for so long that something is wrong; otherwise empty."""
        with self._lock:
            if self._has_told or time.monotonic() - self._began < _GATHERED or len(self._reports) == self.size:
                return ""
            self._has_told = True
            named = _named(rank for rank in range(self.size) if rank not in self._reports)
        return (
            f"warning: pretrain.guard.hang: {named} reported nothing to port {self.port} of rank 0 for {_GATHERED:.0f} s: until all do, "
            "nobody watches for ranks that hang"
        )

    def _decide(self) -> None:
        reports = list(self._reports.values())
        for part, is_end in ((1.0, True), (0.5, False)):
            hung, what = judge(reports, self.hang, part)
            if hung:
                where = f"{_named(r.rank for r in hung)} ({hung[0].host}, process {hung[0].pid}) {what}"
                text = (
                    f"error: pretrain: {where}: the run ends; the same command goes on from the last checkpoint"
                    if is_end
                    else f"warning: pretrain: {where}, and all others wait; the stacks of all ranks are written to stacks/ of the run"
                )
                ranks = [r.rank for r in hung]
                speaker = min({r.rank for r in reports if r.mute < 5} - (set(ranks) if len(ranks) < len(reports) else set()), default=-1)
                if is_end or self._verdict.ranks != ranks:
                    self._verdict = Verdict(ranks, text, speaker, is_end)
                return
        self._verdict = Verdict()


def _named(ranks: Iterable[int]) -> str:
    found = list(ranks)
    return f"rank{'s' * (len(found) > 1)} {', '.join(map(str, found[:8]))}{' ..' if len(found) > 8 else ''}"


def _listen(port: int, backlog: int) -> socket.socket:
    """On all addresses of this machine, those of IPv6 among them where it has any, whatever its net.ipv6.bindv6only says."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("::", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _patient(peer: socket.socket) -> Connection:
    """Over `peer`; what waits for the other end for longer than `_SILENT` raises OSError."""
    peer.setblocking(True)
    limit = struct.pack("@ll", *divmod(int(_SILENT * 1e6), 10**6))  # a timeval
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return Connection(peer.detach())


def connect(address: tuple[str, int], key: bytes) -> Connection:
    """To the hub, as multiprocessing's `Client`, which knows no IPv6. Raises OSError."""
    line = _patient(socket.create_connection(address, timeout=_SILENT))
    try:
        answer_challenge(line, key)
        deliver_challenge(line, key)
    except _STRANGE as e:
        line.close()
        raise OSError(f"{address[0]}:{address[1]} is not our hub ({e})") from e
    return line

"""Whose turn it is.

Each host has a line of requests that wait, and manners: how many requests at once (one at first, one more with each answer up to the
config's `per_host`, half after an answer that says "too many"), how far apart, and until when it wants to be left alone. A request that
waits for its host takes no connection, so hosts that are slow or dead hold up nobody else's.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Generic, Protocol, TypeVar

PAUSE = 1.0  # seconds: the first pause; each further one is twice as long
STRIKES = 8  # pauses in a row after which a host is overloaded still, and is given up
FAILURES = 6  # pauses in a row after which no connection can be made, or a host that never answered does not, and is given up
_FAILURE_PAUSE = 4.0  # seconds, the longest of these pauses
_GIVEN_UP = 600.0  # seconds
_MANY = 10_000  # hosts, of which those that ask nothing of us are forgotten


def backoff(times: int, most: float) -> float:
    """Seconds to wait after the `times`-th failure in a row (1, 2, ..): doubling, by chance up to a half more or less, at most `most`."""
    return min(most, PAUSE * 2.0 ** min(times - 1, 30) * random.uniform(0.5, 1.5))


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None where it says neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


class Host:
    """One host's manners, remembered as long as its worker lives. Times are the loop's, in seconds."""

    def __init__(self) -> None:
        self.at_once = 1  # requests
        self.not_before = 0.0  # the next request
        self.answered = False
        self._strikes = self._failures = 0
        self._paused_until = 0.0
        self._given_up: tuple[str, float] | None = None

    def given_up(self, now: float) -> str | None:
        """The reason why nothing is asked of it for now."""
        return self._given_up[0] if self._given_up is not None and now < self._given_up[1] else None

    def answer(self, per_host: int) -> None:
        """It answered, and was not overloaded."""
        self.answered, self._strikes, self._failures = True, 0, 0
        self.at_once = min(per_host, self.at_once + 1)

    def overloaded(self, reason: str, wait: float | None, patience: float, now: float) -> None:
        """It said so, and asked to `wait`. Answers to what was under way when it first said so change nothing more."""
        self.answered, self._failures = True, 0
        if now < self._paused_until:
            return
        self._strikes += 1
        self.at_once = max(1, self.at_once // 2)
        self._pause(now + (backoff(self._strikes, patience) if wait is None or wait > patience else wait))
        if self._strikes >= STRIKES:
            self._give_up(reason, now)

    def no_answer(self, reason: str, connected: bool, now: float) -> None:
        """`connected`: it took the connection at least. If it ever answered, that it does not answer for one URL says nothing of others."""
        if (connected and self.answered) or now < self._paused_until:
            return
        self._failures += 1
        self._pause(now + backoff(self._failures, _FAILURE_PAUSE))
        if self._failures >= FAILURES:
            self._give_up(reason, now)

    def is_plain(self, now: float) -> bool:
        """Whether there is nothing to remember of it."""
        return now >= self.not_before and not (self._strikes or self._failures) and self.given_up(now) is None

    def _pause(self, until: float) -> None:
        self._paused_until = until
        self.not_before = max(self.not_before, until)

    def _give_up(self, reason: str, now: float) -> None:
        self._given_up = reason, now + _GIVEN_UP
        self.not_before = self._paused_until = now
        self._strikes = self._failures = 0


class Hosts:
    """All hosts by name."""

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}

    def __getitem__(self, name: str) -> Host:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host()
        return host

    def forget(self, now: float) -> None:
        """Those that ask nothing of us, where there are many."""
        if len(self._hosts) > _MANY:
            self._hosts = {name: host for name, host in self._hosts.items() if not host.is_plain(now)}


class Request(Protocol):
    @property
    def host(self) -> str: ...


R = TypeVar("R", bound=Request)


@dataclass
class _Line(Generic[R]):
    """Requests to one host: those that wait, how many are under way, and whether it stands in the queue or has a timer that will put it
    there."""

    host: Host
    waiting: deque[R]
    under_way: int = 0
    listed: bool = False


class Queue(Generic[R]):
    """Requests in, and out as their hosts may be asked; for one event loop."""

    def __init__(self, hosts: Hosts, per_host: int, interval: float, room: Callable[[], Awaitable[None]]) -> None:
        """`interval`: seconds between two requests to a host; `room` is awaited before a request is given out."""
        self._loop = asyncio.get_running_loop()
        self._hosts, self._per_host, self._interval, self._room = hosts, per_host, interval, room
        self._lines: dict[str, _Line[R]] = {}
        self._ready: deque[_Line[R]] = deque()
        self._again: deque[_Line[R]] = deque()  # may hold some more than once
        self._takers: deque[asyncio.Future[None]] = deque()

    def put(self, request: R, first: bool = False) -> None:
        line = self._lines.get(request.host)
        if line is None:
            line = self._lines[request.host] = _Line(self._hosts[request.host], deque())
        (line.waiting.appendleft if first else line.waiting.append)(request)
        self._offer(line)

    def put_later(self, request: R, seconds: float) -> None:
        self._loop.call_later(seconds, self.put, request)

    async def take(self) -> tuple[R, bool]:
        """(a request whose host may be asked now, whether its connection is likely not needed after it). `done` has to follow."""
        while True:
            while not (self._again or self._ready):
                taker = self._loop.create_future()
                self._takers.append(taker)
                await taker
            await self._room()
            line = self._next()
            if line is None:
                continue
            if not self._may_start(line):  # it was put off, or its room taken, while it stood in the queue
                self._offer(line)
                continue
            request = line.waiting.popleft()
            line.under_way += 1
            now = self._loop.time()
            if line.host.given_up(now) is None:
                line.host.not_before = max(line.host.not_before, now) + self._interval
            self._offer(line)
            # Those of the others are likely free by then, and few enough wait.
            return request, len(line.waiting) < 2 * line.under_way - 1

    def done(self, request: R) -> None:
        """Its place is free. The same host has it first, so that its connection is used again and few others are open; what a host may
        have beyond stands in the queue."""
        line = self._lines[request.host]
        line.under_way -= 1
        if self._may_start(line):
            self._again.append(line)
            self._wake()
        else:
            self._offer(line)

    def _next(self) -> _Line[R] | None:
        if self._again:
            return self._again.popleft()
        if not self._ready:
            return None
        line = self._ready.popleft()
        line.listed = False
        return line

    def _may_start(self, line: _Line[R]) -> bool:
        return bool(line.waiting) and line.under_way < min(line.host.at_once, self._per_host) and line.host.not_before <= self._loop.time()

    def _offer(self, line: _Line[R]) -> None:
        if line.listed or not line.waiting or line.under_way >= min(line.host.at_once, self._per_host):
            return
        line.listed = True
        wait = line.host.not_before - self._loop.time()
        if wait > 0:
            self._loop.call_later(wait, self._list, line)
        else:
            self._list(line)

    def _list(self, line: _Line[R]) -> None:
        self._ready.append(line)
        self._wake()

    def _wake(self) -> None:
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(None)
                break

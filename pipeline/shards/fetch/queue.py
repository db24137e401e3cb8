"""Whose turn it is.

Each host has a line of requests that wait. One that waits takes no connection, so hosts that are slow or dead hold up nobody else's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.shards.fetch.hosts import Host, Hosts


class Request(Protocol):
    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


R = TypeVar("R", bound=Request)


@dataclass
class _Line(Generic[R]):
    """Requests to one host: those that wait, how many are under way, and were at most, and whether it stands in the queue or has a timer
    that will put it there."""

    host: Host
    waiting: deque[R]
    under_way: int = 0
    most: int = 0
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
            line = self._lines[request.host] = _Line(self._hosts.begin(request.host), deque())
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
            line.most = max(line.most, line.under_way)
            now = self._loop.time()
            if line.host.given_up(request.port, now) is None:
                line.host.not_before = max(line.host.not_before, now) + self._interval
            self._offer(line)
            # As many as are open are closed with the last requests, each with one.
            return request, len(line.waiting) < min(line.most, line.host.at_once)

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

    def close(self) -> None:
        """Forget all requests. Timers that run still hold nothing then."""
        for line in self._lines.values():
            line.waiting.clear()

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

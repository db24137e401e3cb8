"""Bytes that were received and not yet taken: what bounds the memory of a download that is faster than its user."""

from __future__ import annotations

import asyncio
import threading

LIMIT = 1 << 26  # bytes


class Budget:
    """Beyond `limit` no request begins until half of that is left: many at a time cost less than one by one. Beyond twice `limit` only one
    answer goes on, so that it ends whatever its length. The most in memory is then 2 `limit`, one whole answer, and a buffer of each
    connection."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._used = 0
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._waiting: list[asyncio.Future[None]] = []
        self._holder: object | None = None

    @property
    def used(self) -> int:
        return self._used

    async def room(self) -> None:
        """Wait until a request may begin."""
        while self._used >= self._limit:
            await self._change()

    def add(self, size: int) -> None:
        with self._lock:
            self._used += size

    def must_wait(self, answer: object) -> bool:
        """Whether `answer` may not go on yet. The first that asks beyond the limit may, until `end`."""
        if self._used <= 2 * self._limit:
            return False
        if self._holder is None:
            self._holder = answer
        return self._holder is not answer

    async def wait(self, answer: object, clock: asyncio.Timeout) -> None:
        """Until `answer` may go on; `clock` stands still meanwhile, since it is not the host that is slow."""
        when = clock.when()
        left = None if when is None else when - self._loop.time()
        clock.reschedule(None)
        while self.must_wait(answer):
            await self._change()
        clock.reschedule(None if left is None else self._loop.time() + left)

    def end(self, answer: object) -> None:
        if self._holder is answer:
            self._holder = None
            self._wake()

    def give(self, size: int) -> None:
        """Bytes are taken, or thrown away; from any thread."""
        with self._lock:
            before, self._used = self._used, self._used - size
            crossed = self._used < self._limit // 2 <= before or self._used <= 2 * self._limit < before
        if crossed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def clear(self) -> None:
        """Nothing is under way, and what was not taken never will be."""
        with self._lock:
            self._used = 0

    async def _change(self) -> None:
        waiter = self._loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

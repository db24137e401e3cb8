"""URLs in, images or reasons out, as they arrive: the bridge between a worker's own thread and the event loop."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from pipeline.config.shard import Fetch
from pipeline.shards.fetch import robots
from pipeline.shards.fetch.addresses import Guard
from pipeline.shards.fetch.answers import Fetched
from pipeline.shards.fetch.budget import LIMIT, Budget
from pipeline.shards.fetch.client import Client
from pipeline.shards.fetch.hosts import Hosts
from pipeline.shards.fetch.visits import Known, Run
from pipeline.shards.images import Dropped

T = TypeVar("T")
Result = tuple[int, Fetched | Dropped]

_kept: list[Fetcher] = []  # one at most


def fetcher_of(config: Fetch, max_bytes: int, share: int) -> Fetcher:
    """The fetcher of this process, for all of its downloads, of which each shard is one: it lives on until the process ends, or asks for
    another configuration. For one thread."""
    if not _kept or _kept[0].arguments != (config, max_bytes, share):
        _end_kept()
        _kept.append(Fetcher(config, max_bytes, share).__enter__())
    return _kept[0]


@atexit.register
def _end_kept() -> None:
    while _kept:
        _kept.pop().__exit__(None, None, None)


class Fetcher:
    """Downloads for one worker: a context manager, used from synchronous code, for one `fetch` at a time. What it knows of hosts (names,
    robots.txt, pauses, who was given up, open connections) stays from one to the next."""

    def __init__(self, config: Fetch, max_bytes: int, share: int = 1, room: int = LIMIT) -> None:
        """`max_bytes` of one image; `share`: of how many workers this is one, since what a host is asked at once, and the rate, are theirs
        together; `room`: bytes that wait to be taken before nothing more is asked for."""
        self.arguments = config, max_bytes, share
        self._room = room

    def __enter__(self) -> Fetcher:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="download", daemon=True)
        self._thread.start()
        self._known = self._call(self._open()).result()
        self._results = self._fetch([])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._results.close()
        self._call(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def fetch(self, urls: Sequence[str]) -> Generator[Result, None, None]:
        """(index into `urls`, image or reason), each URL once, in the order of arrival. Whoever takes them slowly makes it ask slowly;
        whoever leaves early, or begins another list, ends what is under way."""
        self._results.close()
        self._results = self._fetch(urls)
        return self._results

    def _fetch(self, urls: Sequence[str]) -> Generator[Result, None, None]:
        out: SimpleQueue[Result | None] = SimpleQueue()
        budget = self._known.budget
        budget.clear()

        def deliver(index: int, result: Fetched | Dropped) -> None:
            budget.add(_size(result))
            out.put((index, result))

        run = Run(*self.arguments, deliver)
        working = self._call(run.work(self._known, urls))
        try:
            working.add_done_callback(lambda _: out.put(None))
            while (item := out.get()) is not None:
                budget.give(_size(item[1]))
                yield item
            working.result()
        finally:
            self._loop.call_soon_threadsafe(run.stop)
            wait([working])

    async def _open(self) -> Known:
        config, _, _ = self.arguments
        budget = Budget(self._room)
        client = Client(Guard(config.allow), budget, config.agent, config.opt_out, config.timeout.seconds)
        return Known(client, budget, Hosts(), robots.RulesCache())

    async def _close(self) -> None:
        await self._known.client.close()
        queries = asyncio.all_tasks() - {asyncio.current_task()}
        for query in queries:
            query.cancel()
        await asyncio.gather(*queries, return_exceptions=True)

    def _call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _size(result: Fetched | Dropped) -> int:
    return len(result.data) if isinstance(result, Fetched) else 0

"""URLs in, images or reasons out, as they arrive: the bridge between a worker's own thread and the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
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
from pipeline.shards.fetch.names import THREADS
from pipeline.shards.fetch.visits import Known, Run
from pipeline.shards.images import Dropped

T = TypeVar("T")
Result = tuple[int, Fetched | Dropped]


@lru_cache(maxsize=4)
def rules_of(agent: str) -> robots.RulesCache:
    """What this process knows of robots.txt as `agent`: for all of its downloads, of which each shard is one."""
    return robots.RulesCache()


class Fetcher:
    """Downloads for one worker: a context manager, used from synchronous code, for one `fetch` at a time. What it knows of hosts (names,
    robots.txt, pauses, open connections) stays from one to the next."""

    def __init__(self, config: Fetch, max_bytes: int, share: int = 1, room: int = LIMIT, rules: robots.RulesCache | None = None) -> None:
        """`max_bytes` of one image; `share`: of how many workers this is one, since what a host is asked at once, and the rate, are theirs
        together; `room`: bytes that wait
        to be taken before nothing more is asked for; `rules`: what others before it have read of robots.txt, see `rules_of`."""
        self._config, self._max_bytes, self._share, self._room = config, max_bytes, share, room
        self._rules = robots.RulesCache() if rules is None else rules

    def __enter__(self) -> Fetcher:
        self._loop = asyncio.new_event_loop()
        self._resolvers = ThreadPoolExecutor(THREADS, "resolver")
        self._loop.set_default_executor(self._resolvers)
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._known = self._call(self._open()).result()
        self._results = self._fetch([])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._results.close()
        self._call(self._known.client.close()).result()
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._rules.forget_failures()

    def fetch(self, urls: Sequence[str]) -> Iterator[Result]:
        """(index into `urls`, image or reason), each URL once, in the order of arrival. Whoever takes them slowly makes it ask slowly;
        whoever leaves early, or begins another list, ends what is under way."""
        self._results.close()
        self._results = self._fetch(urls)
        return self._results

    def _fetch(self, urls: Sequence[str]) -> Generator[Result, None, None]:
        out: SimpleQueue[Result | None] = SimpleQueue()
        budget = self._known.budget

        def deliver(index: int, result: Fetched | Dropped) -> None:
            budget.add(_size(result))
            out.put((index, result))

        run = Run(self._config, self._max_bytes, self._share, deliver)
        working = self._call(run.work(self._known, urls))
        working.add_done_callback(lambda _: out.put(None))
        try:
            while (item := out.get()) is not None:
                budget.give(_size(item[1]))
                yield item
            working.result()
        finally:
            self._loop.call_soon_threadsafe(run.stop)
            wait([working])
            while not out.empty():
                budget.give(_size(item[1]) if (item := out.get()) is not None else 0)

    async def _open(self) -> Known:
        config = self._config
        budget = Budget(self._room)
        client = Client(Guard(config.allow), budget, config.agent, config.opt_out, config.timeout.seconds)
        return Known(client, budget, Hosts(), self._rules)

    def _call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _size(result: Fetched | Dropped) -> int:
    return len(result.data) if isinstance(result, Fetched) else 0

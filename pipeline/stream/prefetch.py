"""Blocks of remote datasets fetched before they are needed, in the order of need, so that one slow request delays nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.core.errors import TesseraError
from pipeline.stream.order import STRIPE, WINDOW
from pipeline.stream.reader import Dataset

Block = tuple[Dataset, int, int]  # a dataset, a shard of it, a block of that

CONNECTIONS = 16
AHEAD = 1 << 30  # bytes on disk that nobody has asked for yet; a fourth of the cache where that is less
BATCHES = 512  # planned ahead at most, where all their blocks are here already
_RECENT = 2 * WINDOW * STRIPE  # blocks remembered as asked for, a dataset: what its cache surely holds


class Prefetcher:
    """`needs` are the blocks of one batch after the other; `advance` says that the next of them is being made.

    A fetch that fails is not reported here: whoever reads the sample tries again, and tells.
    """

    def __init__(self, needs: Iterator[Iterable[Block]], ahead: int) -> None:
        self._needs, self._ahead = needs, ahead
        self._planned: deque[float] = deque()  # bytes of new blocks, for each batch planned and not yet made
        self._early = 0  # batches made before they were planned
        self._bytes = 0.0
        self._datasets: set[int] = set()
        self._recent: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")
        self._thread = threading.Thread(target=self._plan, name="prefetch", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Raises what ended the planning, if anything did."""
        with self._changed:
            if self._error:
                raise self._error
            if self._planned:
                self._bytes -= self._planned.popleft()
            else:
                self._early += 1
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)  # a store that stalls must not hold up the end

    def _plan(self) -> None:
        try:
            self._plan_all()
        except BaseException as e:  # noqa: BLE001  the thread has nobody to tell but `advance`
            self._error = e

    def _plan_all(self) -> None:
        for blocks in self._needs:
            size = 0.0
            for dataset, shard, block in blocks:
                if self._is_new((id(dataset), shard, block)):
                    size += dataset.part * dataset.mean_bytes
                    self._pool.submit(_fetch, dataset, shard, block)
            with self._changed:
                if self._early:
                    self._early -= 1
                else:
                    self._planned.append(size)
                    self._bytes += size
                self._changed.wait_for(lambda: self._closed or (self._bytes < self._ahead and len(self._planned) < BATCHES))
                if self._closed:
                    return

    def _is_new(self, name: tuple[int, int, int]) -> bool:
        is_new = name not in self._recent
        self._recent[name] = None
        self._recent.move_to_end(name)
        self._datasets.add(name[0])
        if len(self._recent) > _RECENT * len(self._datasets):
            self._recent.popitem(last=False)
        return is_new


def _fetch(dataset: Dataset, shard: int, block: int) -> None:
    try:
        dataset.fetch(shard, block)
    except TesseraError:
        return  # met again, and told, by whoever reads the sample

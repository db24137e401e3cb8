"""A file on any storage as Python and Arrow read files, by ranges that are asked for again where the store stutters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.core.retry import retrying
from pipeline.core.storage import Storage

_REQUESTS = 16  # at once


class Ranges(io.RawIOBase):
    """The first `size` bytes of a remote file, to be read from anywhere; some ranges of it are fetched at once, in parallel."""

    def __init__(self, directory: Storage, name: str, size: int, ranges: Sequence[tuple[int, int]] = ()) -> None:
        what = f"data {directory.url}/{name}"
        self._fetch = lambda start, end: retrying(what, lambda: directory.read_range(name, start, end))
        self._size, self._position = size, 0
        self._held = list[tuple[int, bytes]]()
        if ranges:
            with ThreadPoolExecutor(_REQUESTS) as pool:
                self._held = [(start, data) for (start, _), data in zip(ranges, pool.map(lambda r: self._fetch(*r), ranges), strict=True)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        for first, held in self._held:
            if first <= start and end <= first + len(held):
                data = held[start - first : end - first]
                break
        else:
            data = self._fetch(start, end) if end > start else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

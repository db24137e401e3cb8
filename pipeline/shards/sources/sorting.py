"""More rows than fit in memory, in order: sorted runs in a temporary file, merged as they are read."""

from __future__ import annotations

import heapq
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from itertools import islice
from typing import Any, TypeVar

from pipeline.core.files import write_whole

T = TypeVar("T", bound=tuple[Any, ...])

HELD = 250_000  # rows in memory; and of each run that many in a file, of which there are 2,000 with half a billion rows:
_BLOCK = 256
_LENGTH = 8  # bytes before a block


def in_order(rows: Iterable[T], key: Callable[[T], Any], held: int | None = None) -> Iterator[T]:
    """`rows`, tuples of what JSON has, sorted by `key`. Where there are more than `held` (default: `HELD`), they lie in a temporary file,
    which goes with the iterator; memory is then that of so many rows, or of 256 a run of them.

    Raises:
        StorageError: the disk is full.
    """
    source, held = iter(rows), held or HELD
    run = sorted(islice(source, held), key=key)
    if len(run) < held:
        yield from run
        return
    with tempfile.TemporaryFile(prefix="tessera-sort-", buffering=0) as file:
        runs = list[tuple[int, int]]()
        while run:
            runs.append(_write(file, run))
            run = sorted(islice(source, held), key=key)
        yield from heapq.merge(*(_read(file.fileno(), *place) for place in runs), key=key)


def _write(file: FileIO, run: list[Any]) -> tuple[int, int]:
    """Where a run begins and ends."""
    start = file.tell()
    for first in range(0, len(run), _BLOCK):
        data = json.dumps(run[first : first + _BLOCK]).encode()  # names that are not UTF-8 come through
        write_whole(file, len(data).to_bytes(_LENGTH, "little") + data)
    return start, file.tell()


def _read(file: int, at: int, end: int) -> Iterator[Any]:
    while at < end:
        length = int.from_bytes(os.pread(file, _LENGTH, at), "little")
        yield from map(tuple, json.loads(os.pread(file, length, at + _LENGTH)))
        at += _LENGTH + length

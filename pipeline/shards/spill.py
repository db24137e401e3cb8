"""Rows on their way through a shuffle that is larger than memory: files of many ranges, of which a range is read by its place in them.

offsets: uint64 (ranges + 1,) ‖ range 0 ‖ range 1 ‖ ..         each none, one or several Arrow streams, compressed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.core.retry import retrying
from pipeline.core.storage import Storage

_READERS = 16
_TAKEN = 1 << 25  # bytes of rows that are copied at once
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclass(frozen=True)
class Spilt:
    """Where the rows of each range are: each of `files`, lists of names, has `width` neighbouring ranges."""

    files: list[list[str]]
    width: int

    def read(self, place: Storage, group: int, schema: pa.Schema) -> pa.Table:
        """The rows of a range, in the order of the files."""
        return read_range(place, self.files[group // self.width], group % self.width, schema)


class SpillWriter:
    """A file of `count` ranges, held compressed until it is whole."""

    def __init__(self, count: int) -> None:
        self._blobs: list[list[bytes]] = [[] for _ in range(count)]

    def add(self, table: pa.Table, groups: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Row n, or row `rows[n]`, is of the range `groups[n]`. Within a range rows keep their order."""
        order = np.argsort(groups, kind="stable")
        ends = np.cumsum(np.bincount(groups, minlength=len(self._blobs)))
        most = max(1, len(table) * _TAKEN // max(1, table.nbytes))
        for group in np.unique(groups).tolist():
            chosen = order[ends[group - 1] if group else 0 : ends[group]]
            for start in range(0, len(chosen), most):
                some = chosen[start : start + most]
                self._blobs[group].append(_encode(table.take(pa.array(some if rows is None else rows[some]))))

    def write(self, place: Storage, name: str) -> None:
        """Publish it."""
        offsets = np.zeros(len(self._blobs) + 1, dtype="<u8")
        offsets[0] = offsets.nbytes
        offsets[1:] = offsets[0] + np.cumsum([sum(map(len, blobs)) for blobs in self._blobs])
        place.write(name, b"".join([offsets.tobytes(), *(blob for blobs in self._blobs for blob in blobs)]))


def read_range(place: Storage, names: Sequence[str], group: int, schema: pa.Schema) -> pa.Table:
    """The rows of one range in all of these files, in the order of the files: two requests a file. The last column is taken to be the long
    one, of strings without gaps, which is never in memory twice."""
    pool = pa.default_memory_pool()
    pool.release_unused()  # what the task before had
    with ThreadPoolExecutor(_READERS) as readers:
        tables = [table for data in readers.map(lambda name: _fetch(place, name, group), names) for table in _decode(data)]
    columns = [[chunk for table in tables for chunk in table[name].chunks] for name in schema.names]
    del tables
    *short, long = columns
    del columns
    arrays = [pa.chunked_array(chunks, kind).combine_chunks() for chunks, kind in zip(short, schema.types[:-1], strict=True)]
    table = pa.table([*arrays, _join(long)], schema=schema)
    pool.release_unused()
    return table


def _join(parts: list[pa.StringArray]) -> pa.StringArray | pa.ChunkedArray:
    """One array of many, each of which is given back once it is copied. Above 2 GiB they stay as they are: Arrow counts in 31 bits."""
    rows, size = sum(map(len, parts)), sum(int(_ends(part)[-1] - _ends(part)[0]) for part in parts)
    if size >= 2**31:
        return pa.chunked_array(parts, pa.string())
    data, ends = pa.allocate_buffer(size), np.zeros(rows + 1, dtype=np.int32)
    room, row, at = np.frombuffer(data, dtype=np.uint8), 0, 0
    parts.reverse()
    while parts:
        part = parts.pop()
        theirs = _ends(part)
        first, last = int(theirs[0]), int(theirs[-1])
        if last > first:
            room[at : at + last - first] = np.frombuffer(part.buffers()[2], dtype=np.uint8)[first:last]
        ends[row + 1 : row + 1 + len(part)] = theirs[1:] - first + at
        row, at = row + len(part), at + last - first
    return pa.StringArray.from_buffers(rows, pa.py_buffer(ends), data)


def _ends(part: pa.StringArray) -> np.ndarray:
    """Where its strings begin and end in its bytes: int32 (strings + 1,)."""
    return np.frombuffer(part.buffers()[1], dtype=np.int32)[part.offset : part.offset + len(part) + 1]


def _fetch(place: Storage, name: str, group: int) -> bytes:
    what = f"storage {place.url}/{name}"
    start, end = np.frombuffer(retrying(what, lambda: place.read_range(name, 8 * group, 8 * group + 16)), dtype="<u8").tolist()
    return retrying(what, lambda: place.read_range(name, start, end)) if end > start else b""


def _decode(data: bytes) -> Iterator[pa.Table]:
    reader = pa.BufferReader(data)
    while reader.tell() < reader.size():
        yield pa.ipc.open_stream(reader).read_all()


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=_OPTIONS) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()

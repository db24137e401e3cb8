"""Rows on their way through a shuffle that is larger than memory: files of many groups, of which a group is read by its range.

offsets: uint64 (groups + 1,) ‖ group 0 ‖ group 1 ‖ ..         each group an Arrow stream, compressed; an empty one has no bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from pipeline.core.retry import retrying
from pipeline.core.storage import Storage

_READERS = 16
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


def write_spill(place: Storage, name: str, table: pa.Table, groups: np.ndarray, count: int) -> None:
    """Publish a table's rows; row n belongs to group `groups[n]` of `count`. Within a group rows keep their order."""
    table = table.take(pa.array(np.argsort(groups, kind="stable")))
    firsts = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=count))])
    offsets, blobs = np.zeros(count + 1, dtype="<u8"), list[bytes]()
    offsets[0] = offsets.nbytes
    for group in range(count):
        rows = int(firsts[group + 1] - firsts[group])
        blob = _encode(table.slice(int(firsts[group]), rows)) if rows else b""
        blobs.append(blob)
        offsets[group + 1] = offsets[group] + len(blob)
    place.write(name, b"".join([offsets.tobytes(), *blobs]))


def read_group(place: Storage, names: Sequence[str], group: int, schema: pa.Schema) -> pa.Table:
    """The rows of one group in all of these files, in the order of the files."""
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda name: _read(place, name, group), names))
    return pa.concat_tables([schema.empty_table(), *(t for t in tables if t is not None)]).combine_chunks()


def _read(place: Storage, name: str, group: int) -> pa.Table | None:
    what = f"storage {place.url}/{name}"
    start, end = np.frombuffer(retrying(what, lambda: place.read_range(name, 8 * group, 8 * group + 16)), dtype="<u8").tolist()
    if start == end:
        return None
    return pa.ipc.open_stream(retrying(what, lambda: place.read_range(name, start, end))).read_all()


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=_OPTIONS) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()

"""The samples of a finished shard, read in order for a pass over a dataset: in batches, and of each sample what is asked for."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DataError, StorageError
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage
from pipeline.shards.manifest import INDEX_SCHEMA, read_part

MEMBERS = frozenset({"image", "txt", "json"})
_HELD = 1 << 27  # bytes of a batch, as it lies in the tar and decoded; a larger sample is a batch of its own
_SPAN = 1 << 26  # bytes of a tar that one request asks for
_PLACES = [name for name in INDEX_SCHEMA.names if name != "sha256"]


@dataclass(frozen=True)
class Row:
    """A sample as its shard holds it; a member is None where there is none, or it was not asked for. `label` is -1 for none."""

    key: str
    label: int
    image: bytes | None = None
    text: str | None = None
    json: bytes | None = None


def read_index(directory: Storage, index_name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The index of a shard: all of it, or those of `columns` that it has.

    Raises:
        DataError: it is missing, is none, or, where all of it is read, lacks a column that every index has.
    """
    where = f"data {directory.url}/{index_name}"
    index = parse_index(index_bytes(directory, index_name), where, columns)
    if columns is None:
        check_columns(index, INDEX_SCHEMA.names, where)
    return index


def index_bytes(directory: Storage, index_name: str) -> bytes:
    """The file itself; a store that stutters is asked again. Raises DataError where it is missing."""
    return retrying(f"data {directory.url}/{index_name}", lambda: read_part(directory, index_name))


def parse_index(data: bytes, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All columns, or those of `columns` that it has. Raises DataError where this is no Parquet."""
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        wanted = None if columns is None else [column for column in columns if column in file.schema_arrow.names]
        return file.read(columns=wanted, use_threads=False)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{where}: cannot be read ({e})") from e


def check_columns(index: pa.Table, needed: Sequence[str], where: str) -> None:
    """Raises DataError where one of the `needed` columns is not there."""
    lacking = [column for column in needed if column not in index.column_names]
    if lacking:
        raise DataError(f"{where}: there is no column {lacking[0]!r}")


def read_rows(directory: Storage, name: str, index: pa.Table, needs: frozenset[str], batch: int) -> Iterator[list[Row]]:
    """The samples of a shard in order, with the members that `needs` names, at most `batch` at a time; the next are read ahead.

    Raises:
        DataError: the shard is missing, or the bytes of a sample are not those that the index names.
    """
    whole = "image" in needs or not directory.is_local  # a request for each member would take longer than their neighbours
    read = _read_whole if whole else _read_members
    with ThreadPoolExecutor(1) as pool:
        coming: Future[list[Row]] | None = None
        for first, count in _cut(index, needs, batch):
            before, coming = coming, pool.submit(read, directory, name, index.slice(first, count), needs)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def _cut(index: pa.Table, needs: frozenset[str], batch: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each batch."""
    offset, length = index["offset"].to_numpy(), index["length"].to_numpy()
    pixels = 3 * index["width"].to_numpy().astype(np.int64) * index["height"].to_numpy() if "image" in needs else 0
    cost, ends, first, held = length + pixels, offset + length, 0, 0
    for row in range(len(index)):
        if row > first and (row - first == batch or held + cost[row] > _HELD or ends[row] - offset[first] > _SPAN):
            yield first, row - first
            first, held = row, 0
        held += int(cost[row])
    if len(index):
        yield first, len(index) - first


def _read_whole(directory: Storage, name: str, index: pa.Table, needs: frozenset[str]) -> list[Row]:
    """All bytes of neighbouring samples in one request, compared with their checksums."""
    places = index.select(_PLACES).to_pylist()
    start, end = places[0]["offset"], max(p["offset"] + p["length"] for p in places)
    data, rows = memoryview(_fetch(directory, name, start, end)), []
    for place in places:
        at = place["offset"] - start
        if zlib.crc32(data[at : at + place["length"]]) != place["crc32"]:
            raise DataError(f"sample {place['key']}: its bytes are not those that the index names (crc32)")
        members = {m: bytes(data[o - start : o - start + n]) for m, o, n in _wanted(place, needs)}
        rows.append(_row(place, members))
    return rows


def _read_members(directory: Storage, name: str, index: pa.Table, needs: frozenset[str]) -> list[Row]:
    """The wanted members alone, of a local shard; unchecked but for their length."""
    rows = []
    try:
        with open(f"{directory.path}/{name}", "rb", buffering=0) as file:
            for place in index.select(_PLACES).to_pylist():
                members = {m: os.pread(file.fileno(), n, o) for m, o, n in _wanted(place, needs)}
                if any(len(members[m]) != n for m, _, n in _wanted(place, needs)):
                    raise DataError(f"sample {place['key']}: the shard ends before it")
                rows.append(_row(place, members))
    except FileNotFoundError:
        raise DataError("it is missing") from None
    except OSError as e:
        raise StorageError(f"it cannot be read ({e})") from e
    return rows


def _fetch(directory: Storage, name: str, start: int, end: int) -> bytes:
    try:
        return retrying(f"data {directory.url}/{name}", lambda: directory.read_range(name, start, end))
    except FileNotFoundError:
        raise DataError("it is missing") from None


def _wanted(place: dict[str, Any], needs: frozenset[str]) -> list[tuple[str, int, int]]:
    """(member, offset, length) of those that are asked for and there."""
    return [(m, place[f"{m}_offset"], place[f"{m}_length"]) for m in sorted(needs) if place[f"{m}_length"] >= 0]


def _row(place: dict[str, Any], members: dict[str, bytes]) -> Row:
    text = members.get("txt")
    return Row(
        place["key"], place["cls"], members.get("image"), None if text is None else text.decode("utf-8", "replace"), members.get("json")
    )

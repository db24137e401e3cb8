"""The rows of a source, told apart, split, shuffled and cut into shards: in passes over rows, none of which holds many.

    list     each part of the source ──▶ its rows by ranges of a hash of their keys (`listing.py`)
    settle   each range: rows that earlier versions have go, the first of those with one key stays, lost ones are counted
             └─ in the order of that hash already ──▶ cut into shards
             └─ in another order (blocks of rows, or the source's own) ──▶ ranges of that order
    arrange  each of these ranges ──▶ cut into shards

A range has about half a million rows, and 448 MiB of them at most (`division.py`), so its task stays under 1.5 GiB. Its rows become a
Parquet file, a row group a shard. A shard never reaches over two ranges: the last one of each range and split is smaller.

Where there are many ranges, a file that had all of them would have a few rows of each, and each range would be read out of every file. So
files have wider pieces at first, as many as the root of the number of ranges, and another pass goes before `settle`, and before `arrange`:

    divide   a piece out of as many files as give a full one ──▶ a file of the ranges in it
"""

from __future__ import annotations

import heapq
import io
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.files import in_tmpdir
from pipeline.core.storage import Storage
from pipeline.shards.division import ROW_BYTES, Division
from pipeline.shards.layout import cut_by_bytes, cut_by_rows, split_of
from pipeline.shards.ranges import Ranges
from pipeline.shards.sources.base import Item, printable
from pipeline.shards.spill import SpillWriter, Spilt, read_range
from pipeline.shards.withdrawn import is_denied, keep_withdrawn

ROWS = pa.schema(
    [
        ("hash", pa.uint64()),  # of the key
        ("order", pa.uint64()),  # by which rows are shuffled
        ("position", pa.uint64()),  # in the source
        ("key", pa.string()),
        ("bytes", pa.int64()),
        ("lost", pa.string()),  # the reason, of rows that are of no use
        ("item", pa.string()),
    ]
)
KNOWN = pa.schema([("key", pa.string())])
_PLANNED = pa.schema([("key", pa.string()), ("item", pa.string())])


@dataclass(frozen=True)
class Rule:
    """What decides the plan. `rows` a shard, all but the last of a range where `exact`; None: by bytes."""

    splits: dict[str, float]
    size: int
    rows: int | None
    exact: bool
    shuffle: bool
    chunk: int  # rows that a task gathers before it compresses them
    spill: int  # bytes of rows that make a file on their way
    named: int  # lost rows that a range names


@dataclass(frozen=True)
class Earlier:
    """The rows that versions of a dataset before have: for each a directory of files, and how many ranges these are."""

    places: list[tuple[Storage, int]] = field(default_factory=list)

    def known(self, keys: pa.Array, group: int, groups: int) -> np.ndarray:
        """Which of the keys of a range of hashes an earlier version has: bool (keys,). Holds one file at a time: there may be far more of
        them than this version has ranges."""
        found = np.zeros(len(keys), dtype=bool)
        for place, count in self.places:
            for other in range(group * count // groups, min(count, -(-(group + 1) * count // groups))):
                theirs = pq.read_table(io.BytesIO(place.read(known_name(other))))["key"]
                found |= pc.is_in(keys, value_set=theirs).to_numpy(zero_copy_only=False)
        return found


def known_name(group: int) -> str:
    return f"known/{group:05d}.parquet"


def rows_name(group: int) -> str:
    return f"rows/{group:05d}.parquet"


# Divide


def divide_rows(name: str, piece: int, spills: list[str], division: Division, place: Storage) -> dict[str, Any]:
    """Write a piece of some files, of one file's size together, as a file of the ranges in it (the body of a Ray task)."""
    table = read_range(place, spills, piece, ROWS)
    file, ranges = SpillWriter(len(division.local(piece))), division.local(piece)
    file.add(table, division.of(table) - ranges.start)
    del table
    file.write(place, f"divided/{name}")
    return {"piece": piece, "spill": f"divided/{name}"}


# Settle


def settle_rows(
    name: str, group: int, spilt: Spilt, division: Division, onward: Division | None, rule: Rule, earlier: Earlier, place: Storage
) -> dict[str, Any]:
    """Which rows of a range of hashes stay, and where they go (the body of a Ray task). `onward`: ranges of another order; None: the order
    is that of the hashes."""
    rows = _Rows.read(spilt, place, group)
    order = rows.sorted([("hash", "ascending"), ("key", "ascending"), ("position", "ascending")])
    is_known = pa.array(earlier.known(order["key"].combine_chunks(), group, division.count))
    keep_withdrawn(place, group, order.filter(pc.and_(is_known, is_denied(order["lost"])))["key"])
    order = order.filter(pc.invert(is_known))
    is_again = np.zeros(len(order), dtype=bool)
    if len(order) > 1:
        keys = order["key"].combine_chunks()
        is_again[1:] = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    again, order = order.filter(pa.array(is_again)), order.filter(pa.array(~is_again))
    # What is denied is looked at again by the next version.
    _write_parquet(place, known_name(group), KNOWN, iter([order.filter(pc.invert(is_denied(order["lost"]))).select(KNOWN.names)]))
    is_lost = pc.is_valid(order["lost"])
    lost, order = order.filter(is_lost), order.filter(pc.invert(is_lost))
    dropped = Counter({"duplicate-key": len(again)} if len(again) else {})
    dropped.update(lost["lost"].to_pylist())
    result = {
        "group": group,
        "read": len(order) + dropped.total(),
        "dropped": dict(dropped),
        "named": heapq.nsmallest(rule.named, _named(rows, again, lost, rule.named), key=lambda d: d["file"]),
    }
    if onward is None:
        return {**result, "spill": None, "shards": _cut(rows, order, group, rule, False, place)}
    file, groups = SpillWriter(onward.pieces), onward.of(order) // onward.width
    file.add(rows.table, groups, order["row"].to_numpy())
    file.write(place, f"settled/{name}")
    return {**result, "spill": [f"settled/{name}", rows.bytes(order)], "shards": []}


@dataclass(frozen=True)
class _Rows:
    """A range in memory. What is long of it, the items, is never copied as a whole: rows are sorted and left out by their numbers."""

    table: pa.Table

    @staticmethod
    def read(spilt: Spilt, place: Storage, group: int) -> _Rows:
        return _Rows(spilt.read(place, group, ROWS))

    def sorted(self, by: list[tuple[str, str]]) -> pa.Table:
        """All columns but the items, and `row`, the number by which `items` has the rest."""
        numbers = pa.array(np.arange(len(self.table)))
        return self.table.drop_columns("item").append_column("row", numbers).sort_by(by).combine_chunks()

    def items(self, rows: pa.Table) -> pa.ChunkedArray:
        return self.table["item"].take(rows["row"])

    def bytes(self, rows: pa.Table) -> int:
        return len(rows) * ROW_BYTES + int(pc.sum(pc.binary_length(self.table["item"])).as_py() or 0)


def _named(rows: _Rows, again: pa.Table, lost: pa.Table, most: int) -> Iterator[dict[str, str]]:
    for text in rows.items(again.slice(0, most)).to_pylist():
        yield _told(text, "duplicate-key", "another row has the same key, and comes first")
    for batch in lost.to_batches(max_chunksize=4096):
        part = pa.Table.from_batches([batch])
        for reason, text in zip(part["lost"].to_pylist(), rows.items(part).to_pylist(), strict=True):
            yield _told(text, reason, str(Item.decode(text).extra["detail"]))


def _told(text: str, reason: str, detail: str) -> dict[str, str]:
    return {"file": printable(Item.decode(text).path), "reason": reason, "detail": printable(detail)}


def first_rows(spilt: Spilt, count: int, rule: Rule, place: Storage) -> list[tuple[str, Item]]:
    """(key, item) of `count` rows of the source, chosen by the hashes of their keys, and nearest each other in the order of shards."""
    rows = _Rows.read(spilt, place, 0)
    order = rows.sorted([("order" if rule.shuffle else "hash", "ascending"), ("key", "ascending")])
    order = order.filter(pc.is_null(order["lost"])).slice(0, count)
    return list(zip(order["key"].to_pylist(), map(Item.decode, rows.items(order).to_pylist()), strict=True))


# Arrange


def arrange_rows(name: str, group: int, spilt: Spilt, rule: Rule, mixed: bool, place: Storage) -> dict[str, Any]:
    """Cut a range of an order into shards (the body of a Ray task). `mixed`: within each its rows are shuffled."""
    rows = _Rows.read(spilt, place, group)
    return {"group": group, "shards": _cut(rows, rows.sorted([("order", "ascending"), ("key", "ascending")]), group, rule, mixed, place)}


def _cut(rows: _Rows, order: pa.Table, group: int, rule: Rule, mixed: bool, place: Storage) -> list[list[Any]]:
    """Write the rows of shards, those of `rows` in an `order`; (split, rows, bytes) of each shard."""
    shards = list[list[Any]]()
    keys = order["key"].to_pylist() if len(rule.splits) > 1 else []
    splits = np.array([split_of(key, rule.splits) for key in keys] if keys else [next(iter(rule.splits))] * len(order))
    del keys

    def tables() -> Iterator[pa.Table]:
        for split in sorted(rule.splits):
            part = order.filter(pa.array(splits == split)) if len(order) else order
            sizes = part["bytes"].to_numpy()
            for cut in cut_by_bytes(sizes, rule.size) if rule.rows is None else cut_by_rows(len(part), rule.rows, not rule.exact):
                one = part.slice(cut.start, cut.stop - cut.start)
                one = one.sort_by([("hash", "ascending"), ("key", "ascending")]) if mixed else one
                shards.append([split, len(one), int(sizes[cut].sum())])
                yield pa.table([one["key"], rows.items(one)], schema=_PLANNED)

    if len(order):
        _write_parquet(place, rows_name(group), _PLANNED, tables())
    return shards


def _write_parquet(place: Storage, name: str, schema: pa.Schema, groups: Iterator[pa.Table]) -> None:
    """A row group a table, each of which is given back before the next one is made."""
    with tempfile.NamedTemporaryFile(prefix="tessera-rows-") as file:
        with (
            in_tmpdir(tempfile.gettempdir()),
            pq.ParquetWriter(file.name, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer,
        ):
            for table in groups:
                writer.write_table(table, row_group_size=max(1, len(table)))
                del table
                pa.default_memory_pool().release_unused()
        place.put(Path(file.name), name)


def planned_rows(place: Storage, group: int, row_group: int) -> Iterator[tuple[str, Item]]:
    """(key, item) of the rows of one shard, in the order in which they are written."""
    name = rows_name(group)
    if place.is_local:
        file = pq.ParquetFile(f"{place.path}/{name}")
    else:
        size = place.head(name).size
        file = pq.ParquetFile(io.BufferedReader(Ranges(place, name, size), 1 << 22))
    with file:
        table = file.read_row_group(row_group, use_threads=False)
    for batch in table.to_batches(max_chunksize=1024):  # its items as Python's objects take twice what they take here
        yield from zip(batch["key"].to_pylist(), map(Item.decode, batch["item"].to_pylist()), strict=True)

"""The rows of a source, told apart, split, shuffled and cut into shards: in three passes over rows, none of which holds many.

    list     each part of the source ──▶ its rows by ranges of a hash of their keys (`spill.py`)
    settle   each range: rows that earlier versions have go, the first of those with one key stays, lost ones are counted
             └─ in the order of that hash already ──▶ cut into shards
             └─ in another order (blocks of rows, or the source's own) ──▶ ranges of that order
    arrange  each of these ranges ──▶ cut into shards

A range has about half a million rows, so its task stays under a gigabyte. Its rows become a Parquet file, a row group a shard. A shard
never reaches over two ranges: the last one of each range and split is smaller.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.storage import Storage
from pipeline.shards.layout import cut_by_bytes, cut_by_rows, group_of, key_order, planned_bytes, sample_key, split_of
from pipeline.shards.manifest import NAMED
from pipeline.shards.ranges import Ranges
from pipeline.shards.sources.base import Ignored, Item, Lost, Part, Source, printable
from pipeline.shards.spill import read_group, write_spill
from pipeline.shards.withdrawn import is_denied, keep_withdrawn

PARTS_BIT = 40  # a row's place in the source: its part's number above, its number in the part below
_CHUNK_BYTES = 1 << 26  # of rows as JSON, that a task gathers before it writes them
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


@dataclass(frozen=True)
class Rule:
    """What decides the plan. `rows` a shard, all but the last of a range where `exact`; None: by bytes."""

    splits: dict[str, float]
    size: int
    rows: int | None
    exact: bool
    shuffle: bool
    groups: int
    chunk: int  # rows that a task gathers before it writes them


@dataclass(frozen=True)
class Earlier:
    """The rows that versions of a dataset before have: for each a directory of files, and how many ranges these are."""

    places: list[tuple[Storage, int]] = field(default_factory=list)

    def keys(self, group: int, groups: int) -> pa.Array:
        found = [pa.array([], pa.string())]
        for place, count in self.places:
            for other in range(group * count // groups, min(count, -(-(group + 1) * count // groups))):
                found.append(pq.read_table(io.BytesIO(place.read(known_name(other)))).column("key").combine_chunks())
        return pa.concat_arrays([f.combine_chunks() if isinstance(f, pa.ChunkedArray) else f for f in found])


def known_name(group: int) -> str:
    return f"known/{group:05d}.parquet"


def rows_name(group: int) -> str:
    return f"rows/{group:05d}.parquet"


# Pass 1


def list_rows(name: str, first: int, parts: list[Part], source: Source, rule: Rule, place: Storage) -> dict[str, Any]:
    """Write the rows of some parts, of which `first` is the number of the first one, to files of their own (the body of a Ray task)."""
    rows, ignored, classes, spills = dict[str, int](), 0, set[str](), list[str]()
    gathered = _Gathered()
    for number, part in enumerate(parts, first):
        count = 0
        for row in source.rows(part):
            if isinstance(row, Ignored):
                ignored += row.count
                continue
            position = number << PARTS_BIT | count
            count += 1
            if isinstance(row, Item) and row.class_name is not None:
                classes.add(row.class_name)
            gathered.add(row, position, source, rule)
            if len(gathered) >= rule.chunk or gathered.bytes >= _CHUNK_BYTES:
                spills.append(gathered.write(place, f"listed/{name}-{len(spills)}", rule))
        rows[str(number)] = count
    if len(gathered):
        spills.append(gathered.write(place, f"listed/{name}-{len(spills)}", rule))
    return {"rows": rows, "ignored": ignored, "classes": sorted(classes), "spills": spills}


class _Gathered:
    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in ROWS.names}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._columns["key"])

    def add(self, row: Item | Lost, position: int, source: Source, rule: Rule) -> None:
        if isinstance(row, Lost):
            item, lost = Item(row.path, 0, extra={"detail": row.detail}), row.reason
        else:
            item, lost = row, None
        key = sample_key(item.identity)
        hashed = key_order(key)
        order = position if not rule.shuffle else source.order(item, hashed) if lost is None else hashed
        text = item.encode()
        for name, value in zip(ROWS.names, (hashed, order, position, key, planned_bytes(item), lost, text), strict=True):
            self._columns[name].append(value)
        self.bytes += len(text)

    def write(self, place: Storage, name: str, rule: Rule) -> str:
        table = pa.table([self._columns[n] for n in ROWS.names], schema=ROWS)
        self._clear()
        write_spill(place, name, table, group_of(table["hash"].to_numpy(), rule.groups), rule.groups)
        return name


# Pass 2


def settle_rows(
    name: str, group: int, spills: list[str], bounds: list[int] | None, rule: Rule, earlier: Earlier, place: Storage
) -> dict[str, Any]:
    """Which rows of a range of hashes stay, and where they go (the body of a Ray task). `bounds`: where ranges of another order begin;
    None: the order is that of the hashes."""
    table = read_group(place, spills, group, ROWS)
    known = earlier.keys(group, rule.groups)
    if len(known):
        is_known = pc.is_in(table["key"], value_set=known)
        keep_withdrawn(place, group, table.filter(pc.and_(is_known, is_denied(table["lost"])))["key"])
        table = table.filter(pc.invert(is_known))
    table = table.sort_by([("hash", "ascending"), ("key", "ascending"), ("position", "ascending")]).combine_chunks()
    keys = table["key"].combine_chunks() if isinstance(table["key"], pa.ChunkedArray) else table["key"]
    is_again = np.zeros(len(table), dtype=bool)
    if len(table) > 1:
        is_again[1:] = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    again, table = table.filter(pa.array(is_again)), table.filter(pa.array(~is_again))
    # What is denied is looked at again by the next version.
    _write_parquet(place, known_name(group), KNOWN, [table.filter(pc.invert(is_denied(table["lost"]))).select(KNOWN.names)])
    named = [_named(text, "duplicate-key", "another row has the same key, and comes first") for text in _first(again)]
    dropped = Counter({"duplicate-key": len(again)} if len(again) else {})
    is_lost = pc.is_valid(table["lost"])
    lost, table = table.filter(is_lost), table.filter(pc.invert(is_lost))
    dropped.update(lost["lost"].to_pylist())
    for reason, text in zip(lost["lost"].to_pylist(), lost["item"].to_pylist(), strict=True):
        named.append(_named(text, reason, str(Item.decode(text).extra["detail"])))
    result = {
        "group": group,
        "read": len(table) + dropped.total(),
        "dropped": dict(dropped),
        "named": sorted(named, key=lambda d: d["file"])[:NAMED],
    }
    if bounds is None:
        return {**result, "shards": _cut(table, group, rule, False, place)}
    groups = np.searchsorted(np.array(bounds, dtype=np.uint64), table["order"].to_numpy(), side="right") - 1
    write_spill(place, f"settled/{name}", table, groups.astype(np.int64), rule.groups)
    return {**result, "shards": []}


def first_rows(spills: list[str], count: int, rule: Rule, place: Storage) -> list[tuple[str, Item]]:
    """(key, item) of `count` rows of the source, chosen by the hashes of their keys, and nearest each other in the order of shards."""
    table = read_group(place, spills, 0, ROWS)
    table = table.filter(pc.is_null(table["lost"])).sort_by([("order" if rule.shuffle else "hash", "ascending"), ("key", "ascending")])
    table = table.slice(0, count)
    return list(zip(table["key"].to_pylist(), map(Item.decode, table["item"].to_pylist()), strict=True))


def _first(again: pa.Table) -> list[str]:
    return again["item"].slice(0, NAMED).to_pylist()


def _named(text: str, reason: str, detail: str) -> dict[str, str]:
    return {"file": printable(Item.decode(text).path), "reason": reason, "detail": printable(detail)}


# Pass 3


def arrange_rows(name: str, group: int, spills: list[str], rule: Rule, mixed: bool, place: Storage) -> dict[str, Any]:
    """Cut a range of an order into shards (the body of a Ray task). `mixed`: within each its rows are shuffled."""
    table = read_group(place, spills, group, ROWS)
    return {"group": group, "shards": _cut(table.sort_by([("order", "ascending"), ("key", "ascending")]), group, rule, mixed, place)}


def _cut(table: pa.Table, group: int, rule: Rule, mixed: bool, place: Storage) -> list[list[Any]]:
    """Write the rows of shards; (split, rows, bytes) of each."""
    shards, written = list[list[Any]](), list[pa.Table]()
    keys = table["key"].to_pylist() if len(rule.splits) > 1 else []
    splits = np.array([split_of(key, rule.splits) for key in keys] if keys else [next(iter(rule.splits))] * len(table))
    for split in sorted(rule.splits):
        part = table.filter(pa.array(splits == split)) if len(table) else table
        sizes = part["bytes"].to_numpy()
        for cut in cut_by_bytes(sizes, rule.size) if rule.rows is None else cut_by_rows(len(part), rule.rows, not rule.exact):
            rows = part.slice(cut.start, cut.stop - cut.start)
            written.append((rows.sort_by([("hash", "ascending"), ("key", "ascending")]) if mixed else rows).select(["key", "item"]))
            shards.append([split, len(rows), int(sizes[cut].sum())])
    if written:
        _write_parquet(place, rows_name(group), written[0].schema, written)
    return shards


def _write_parquet(place: Storage, name: str, schema: pa.Schema, groups: list[pa.Table]) -> None:
    """A row group a table."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for table in groups:
            writer.write_table(table, row_group_size=max(1, len(table)))
    place.write(name, sink.getvalue())


def read_rows(place: Storage, group: int, row_group: int) -> Iterator[tuple[str, Item]]:
    """(key, item) of the rows of one shard, in the order in which they are written."""
    name = rows_name(group)
    if place.is_local:
        file = pq.ParquetFile(f"{place.path}/{name}")
    else:
        size = place.head(name).size
        file = pq.ParquetFile(io.BufferedReader(Ranges(place, name, size), 1 << 22))
    with file:
        table = file.read_row_group(row_group, use_threads=False)
    yield from zip(table["key"].to_pylist(), map(Item.decode, table["item"].to_pylist()), strict=True)


def group_bounds(groups: int, rows: np.ndarray | None) -> list[int]:
    """Where `groups` ranges of an order begin: equal ones of 64 bits, or, of the order of a source whose parts have int64 (parts,) `rows`,
    such as have equally many rows."""
    if rows is None:
        return [-(-(n << 32) // groups) << 32 for n in range(groups)]
    ends, total = np.cumsum(rows), int(rows.sum())
    bounds = [0]
    for n in range(1, groups):
        row = total * n // groups
        part = int(np.searchsorted(ends, row, side="right"))
        bounds.append(part << PARTS_BIT | row - int(ends[part] - rows[part]))
    return bounds

"""The plan of a version: which rows make which shard. Made once, kept until the version is published, so that a killed job goes on.

<dataset>/.plan/v<N>/begun.json    what it is the plan of
                     listed/ ..    rows on their way (`shuffle.py`), and a record of each piece of work (`records.py`)
                     rows/         the rows of each shard: a file a range, a row group a shard
                     plan.parquet  one row a shard; last
                     fill/         a record of each shard that is written
                     known/        keys of all its rows but denied ones; stays, for the next version to leave them out
"""

from __future__ import annotations

import heapq
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.shard import Shard
from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.fill import PROBED, Filling, probe_rows, rows_of_shard
from pipeline.shards.layout import shard_name
from pipeline.shards.manifest import NAMED
from pipeline.shards.records import run_recorded
from pipeline.shards.shuffle import Earlier, Rule, arrange_rows, group_bounds, list_rows, settle_rows
from pipeline.shards.sources import Part, Source

GROUP_ROWS = 500_000  # of a range, about: a task that sorts it takes 0.6 GB
CHUNK = 100_000  # rows that a task gathers before it writes them
_PIECE_ROWS, _PIECE_PARTS = 500_000, 100  # that one task lists
_FILE = "plan.parquet"
_SCHEMA = pa.schema(
    [("split", pa.string()), ("number", pa.int64()), ("group", pa.int32()), ("row_group", pa.int32()), ("rows", pa.int64())]
)
_ON_THE_WAY = ("listed", "settled", "list", "settle", "arrange", "probe")


@dataclass(frozen=True)
class Header:
    """What a plan says of the rows as a whole: `read` of them, of which `dropped` (by reason) are in no shard. `rows_a_shard`: where bytes
    are not known beforehand, and were measured; later versions keep it. `groups`: ranges of hashes."""

    version: int
    config: str
    source: str
    stamp: str
    classes: list[str]
    rows_a_shard: int | None = None
    groups: int = 1
    read: int = 0
    ignored: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    named: list[dict[str, str]] = field(default_factory=list)


class Plan:
    """One row a shard, in the order of splits' numbers: `table` has the columns of `_SCHEMA`, and is held as it is, a million of them in
    some tens of megabytes."""

    def __init__(self, header: Header, table: pa.Table) -> None:
        self.header, self.table = header, table

    def __len__(self) -> int:
        return len(self.table)

    def jobs(self) -> Iterator[tuple[int, tuple[str, str, int, int]]]:
        """Rows, and (name, split, group, row group), of each shard."""
        for batch in self.table.to_batches(max_chunksize=4096):
            for split, number, group, row_group, rows in zip(*(c.to_pylist() for c in batch.columns), strict=True):
                yield rows, (shard_name(split, number), split, group, row_group)

    def save(self, place: Storage) -> None:
        sink = io.BytesIO()
        pq.write_table(self.table.replace_schema_metadata({"tessera": json.dumps(asdict(self.header))}), sink, compression="zstd")
        place.write(_FILE, sink.getvalue())


def find_plan(place: Storage) -> Plan | None:
    try:
        table = pq.read_table(io.BytesIO(place.read(_FILE)))
    except FileNotFoundError:
        return None
    return Plan(Header(**json.loads(table.schema.metadata[b"tessera"])), table.replace_schema_metadata(None))


def number_shards(shards: dict[int, list[list[Any]]], firsts: dict[str, int]) -> pa.Table:
    """The rows of a plan from each range's shards, (split, rows, bytes) each; `firsts`: the first number that is free in a split."""
    following = dict(firsts)
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for group in sorted(shards):
        for row_group, (split, rows, _) in enumerate(shards[group]):
            number = following.setdefault(split, 0)
            following[split] = number + 1
            for name, value in zip(_SCHEMA.names, (split, number, group, row_group, rows), strict=True):
                columns[name].append(value)
    return pa.table(columns, schema=_SCHEMA)


def pieces(parts: list[Part], rows: int = _PIECE_ROWS) -> Iterator[tuple[int, tuple[str, int, list[Part]]]]:
    """Neighbouring parts for one task each: (how many, (name, number of the first, parts))."""
    first, taken, weight = 0, list[Part](), 0
    for part in parts:
        taken.append(part)
        weight += part.rows if part.rows is not None else part.bytes // 100
        if weight >= rows or len(taken) >= _PIECE_PARTS:
            yield len(taken), (f"{first:08d}", first, taken)
            first, taken, weight = first + len(taken), [], 0
    if taken:
        yield len(taken), (f"{first:08d}", first, taken)


class Planner:
    """Makes the plan of a version at `place`, or goes on with it. `header` holds what is known before: the stamp, and of versions before
    the classes and the rows of a shard."""

    def __init__(self, shard: Shard, source: Source, header: Header, rows: int, earlier: Earlier, place: Storage, workers: int) -> None:
        self.shard, self.source, self.header, self.earlier, self.place = shard, source, header, earlier, place
        self.workers = workers
        self.groups = max(1, -(-rows // GROUP_ROWS))
        self.rule = Rule(shard.splits, shard.size, shard.samples, shard.samples is not None, shard.shuffle, self.groups, CHUNK)

    def plan(self, firsts: dict[str, int]) -> Plan:
        """Raises as the source does, and DataError where a split of a first version would get no rows."""
        header, found = self.header, find_plan(self.place)
        if found is not None and (found.header.config, found.header.source) == (header.config, header.source):
            return found  # rows that the source has now and had not then are for the next version
        begun = json.dumps([header.config, header.source, header.stamp, self.groups])
        if self._begun() != begun:
            self.place.remove()
            self.place.write("begun.json", begun.encode())
        parts = self.source.parts()
        counts, ignored, names, spills = self._list(parts)
        classes = header.classes + [c for c in names if c not in set(header.classes)]
        rows = int(counts.sum())
        rows_a_shard = self._rows_of_shard(rows, spills, classes)
        measured = rows_a_shard if rows > PROBED else self.header.rows_a_shard  # of so few rows nothing was
        shards, header = self._arrange(counts, spills, rows_a_shard)
        plan = Plan(
            Header(**{**asdict(header), "ignored": ignored, "classes": classes, "rows_a_shard": measured}),
            number_shards(shards, firsts),
        )
        plan.save(self.place)
        for stage in _ON_THE_WAY:
            self.place.remove(stage)
        return plan

    def _begun(self) -> str:
        try:
            return self.place.read("begun.json").decode()
        except FileNotFoundError:
            return ""

    def _list(self, parts: list[Part]) -> tuple[np.ndarray, int, list[str], list[str]]:
        """Rows of each part, files that are ignored, names of classes, and the files of rows."""
        counts, ignored = np.zeros(len(parts), dtype=np.int64), 0
        names, spills = set[str](), list[str]()
        shared = (self.source, self.rule, self.place)
        done = run_recorded("list", "parts", "list", list_rows, lambda: pieces(parts), shared, self.place, self.workers)
        for result in done:
            for number, count in result["rows"].items():
                counts[int(number)] = count
            ignored += result["ignored"]
            names.update(result["classes"])
            spills += result["spills"]
        return counts, ignored, sorted(names), sorted(spills)

    def _rows_of_shard(self, rows: int, spills: list[str], classes: list[str]) -> int | None:
        """None: bytes are known, and decide."""
        if self.shard.samples is not None or self.header.rows_a_shard is not None:
            return self.shard.samples or self.header.rows_a_shard
        if self.source.has_sizes and (self.shard.images.resize is None or rows <= PROBED):
            return None
        if rows <= PROBED:
            return PROBED
        filling = Filling.of(self.source, self.shard, classes, 1)
        shared = (spills, self.rule, filling, self.place)
        (probed,) = run_recorded("probe", "rows", "probe", probe_rows, lambda: [(PROBED, ("probe",))], shared, self.place, 1)
        return rows_of_shard(probed, self.shard.size)

    def _arrange(self, counts: np.ndarray, spills: list[str], rows_a_shard: int | None) -> tuple[dict[int, list[list[Any]]], Header]:
        rule = replace(self.rule, rows=rows_a_shard)
        is_hashed = rule.shuffle and not self.source.in_blocks
        bounds = None if is_hashed else group_bounds(self.groups, None if rule.shuffle else counts)
        shards: dict[int, list[list[Any]]] = {}
        read, dropped, named = 0, Counter[str](), list[dict[str, str]]()

        def jobs(stage: str) -> list[tuple[int, tuple[str, int]]]:
            return [(1, (f"{stage}-{group:05d}", group)) for group in range(self.groups)]

        shared: tuple[Any, ...] = (spills, bounds, rule, self.earlier, self.place)
        for result in run_recorded("plan", "ranges", "settle", settle_rows, lambda: jobs("settle"), shared, self.place, self.workers):
            shards[result["group"]] = result["shards"]
            read += result["read"]
            dropped.update(result["dropped"])
            named = heapq.nsmallest(NAMED, named + result["named"], key=lambda d: d["file"])
        if not is_hashed:
            shared = ([f"settled/settle-{group:05d}" for group in range(self.groups)], rule, rule.shuffle, self.place)
            for result in run_recorded(
                "arrange", "ranges", "arrange", arrange_rows, lambda: jobs("arrange"), shared, self.place, self.workers
            ):
                shards[result["group"]] = result["shards"]
        header = replace(self.header, groups=self.groups, read=read, dropped=dict(sorted(dropped.items())), named=named)
        self._check_splits({split for part in shards.values() for split, *_ in part}, read)
        return shards, header

    def _check_splits(self, found: set[str], read: int) -> None:
        if self.header.version > 1 or not read:
            return
        for split, share in self.shard.splits.items():
            if split not in found and found:
                raise DataError(f"shard.splits.{split}: a share of {share:g} leaves it none of the {read} images")

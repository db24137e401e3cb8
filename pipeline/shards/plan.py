"""The plan of a version: which rows make which shard. Made once, kept until the version is published, so that a killed job goes on.

<dataset>/.plan/v<N>/begun.json    what it is the plan of
                     listed/, divided/ ..  rows on their way (`shuffle.py`), and a record of each piece of work (`records.py`)
                     rows/         the rows of each shard: a file a range, a row group a shard
                     plan.parquet  one row a shard; last
                     fill/         a record of each shard that is written
                     known/        keys of all its rows but denied ones; stays, for the next version to leave them out
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.shard import Shard
from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.division import Division, even_bounds, source_bounds
from pipeline.shards.fill import PROBED, Filling, probe_rows, rows_of_shard
from pipeline.shards.layout import shard_name
from pipeline.shards.listing import list_rows
from pipeline.shards.manifest import first_named, named_each
from pipeline.shards.records import Job, Result, run_recorded
from pipeline.shards.shuffle import Earlier, Rule, arrange_rows, divide_rows, settle_rows
from pipeline.shards.sources import Part, Source
from pipeline.shards.spill import Spilt

GROUP_ROWS = 500_000  # of a range, about
CHUNK = 100_000  # rows that a task gathers before it compresses them
SPILL_BYTES = 1 << 28  # of rows in a file on their way, before they are compressed
PIECE_ROWS, PIECE_PARTS = 500_000, 100  # that one task lists
_FILE = "plan.parquet"
_SCHEMA = pa.schema(
    [("split", pa.string()), ("number", pa.int64()), ("group", pa.int32()), ("row_group", pa.int32()), ("rows", pa.int64())]
)
_FORM = 2  # of what lies here while it is made: what a job of another release began is begun anew
_STAGES = ("list", "divide", "settle", "arrange", "probe")
_ON_THE_WAY = ("listed", "divided", "settled")


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
        pq.write_table(self.table.replace_schema_metadata({"tessera": json.dumps([_FORM, asdict(self.header)])}), sink, compression="zstd")
        place.write(_FILE, sink.getvalue())


def find_plan(place: Storage) -> Plan | None:
    """None where there is none, or that of another release, which is made anew."""
    try:
        table = pq.read_table(io.BytesIO(place.read(_FILE)))
    except FileNotFoundError:
        return None
    form, header = found if isinstance(found := json.loads(table.schema.metadata[b"tessera"]), list) else (1, found)
    return Plan(Header(**header), table.replace_schema_metadata(None)) if form == _FORM else None


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


def pieces(parts: list[Part], rows: int = PIECE_ROWS) -> Iterator[tuple[int, tuple[str, int, list[Part]]]]:
    """Neighbouring parts for one task each: (how many, (name, number of the first, parts))."""
    first, taken, weight = 0, list[Part](), 0
    for part in parts:
        taken.append(part)
        weight += part.rows if part.rows is not None else part.bytes // 100
        if weight >= rows or len(taken) >= PIECE_PARTS:
            yield len(taken), (f"{first:08d}", first, taken)
            first, taken, weight = first + len(taken), [], 0
    if taken:
        yield len(taken), (f"{first:08d}", first, taken)


def moves(stage: str, spills: list[tuple[str, int]], division: Division, size: int) -> Iterator[Job]:
    """What `divide_rows` does with files, of each (name, bytes of rows): a job takes a piece of so many that it has `size` bytes, about."""
    batches, weight = [list[str]()], 0
    for name, length in spills:
        if weight >= size * division.pieces:
            batches.append([])
            weight = 0
        batches[-1].append(name)
        weight += length
    for piece in range(division.pieces):
        for number, names in enumerate(batches):
            yield 1, (f"{stage}-{piece:05d}-{number:05d}", piece, names)


class Planner:
    """Makes the plan of a version at `place`, or goes on with it. `header` holds what is known before: the stamp, and of versions before
    the classes and the rows of a shard."""

    def __init__(self, shard: Shard, source: Source, header: Header, rows: int, earlier: Earlier, place: Storage, workers: int) -> None:
        self.shard, self.source, self.header, self.earlier, self.place = shard, source, header, earlier, place
        self.workers = workers
        self.division = Division.into(max(1, -(-rows // GROUP_ROWS)))
        named = named_each(self.division.count)
        self.rule = Rule(shard.splits, shard.size, shard.samples, shard.samples is not None, shard.shuffle, CHUNK, SPILL_BYTES, named)

    def plan(self, firsts: dict[str, int]) -> Plan:
        """Raises as the source does, and DataError where a split of a first version would get no rows."""
        header, found = self.header, find_plan(self.place)
        if found is not None and (found.header.config, found.header.source) == (header.config, header.source):
            return found  # rows that the source has now and had not then are for the next version
        begun = json.dumps([_FORM, header.config, header.source, header.stamp, self.division.count])
        if self._begun() != begun:
            self.place.remove()
            self.place.write("begun.json", begun.encode())
        marks, ignored, names, spills = self._list(self.source.parts())
        classes = header.classes + [c for c in names if c not in set(header.classes)]
        rows, size = sum({part: rows for part, rows, _ in marks}.values()), sum(size for *_, size in marks)
        division = self.division.for_bytes(size)
        spilt = self._divide("listed", spills, division)
        rows_a_shard = self._rows_of_shard(rows, spilt, classes)
        measured = rows_a_shard if rows > PROBED else self.header.rows_a_shard  # of so few rows nothing was
        shards, header = self._arrange(marks, spilt, division, rows_a_shard)
        plan = Plan(
            Header(**{**asdict(header), "ignored": ignored, "classes": classes, "rows_a_shard": measured}),
            number_shards(shards, firsts),
        )
        plan.save(self.place)
        for stage in (*_ON_THE_WAY, *_STAGES):
            self.place.remove(stage)
        return plan

    def _begun(self) -> str:
        try:
            return self.place.read("begun.json").decode()
        except FileNotFoundError:
            return ""

    def _run(
        self, label: str, unit: str, stage: str, body: Callable[..., Result], jobs: Callable[[], Iterable[Job]], *shared: Any
    ) -> Iterator[Result]:
        return run_recorded(label, unit, stage, body, jobs, (*shared, self.place), self.place, self.workers)

    def _list(self, parts: list[Part]) -> tuple[list[list[int]], int, list[str], list[tuple[str, int]]]:
        """Marks (`source_bounds`), files that are ignored, names of classes, and the files of rows with their bytes."""
        marks, ignored = list[list[int]](), 0
        names, spills = set[str](), list[tuple[str, int]]()
        for result in self._run("list", "parts", "list", list_rows, lambda: pieces(parts), self.source, self.rule, self.division):
            marks += result["marks"]
            ignored += result["ignored"]
            names.update(result["classes"])
            spills += map(tuple, result["spills"])
        return sorted(marks), ignored, sorted(names), sorted(spills)

    def _divide(self, stage: str, spills: list[tuple[str, int]], division: Division) -> Spilt:
        """Where the rows of each range are; where the pieces of files are wider, after a pass that brings them there."""
        if division.width == 1:
            return Spilt([[name for name, _ in spills]], division.count)
        jobs = partial(moves, stage, spills, division, SPILL_BYTES)
        files: list[list[str]] = [[] for _ in range(division.pieces)]
        for result in self._run("divide", "files", "divide", divide_rows, jobs, division):
            files[result["piece"]].append(result["spill"])
        self.place.remove(stage)
        return Spilt([sorted(found) for found in files], division.width)

    def _rows_of_shard(self, rows: int, spilt: Spilt, classes: list[str]) -> int | None:
        """None: bytes are known, and decide."""
        if self.shard.samples is not None or self.header.rows_a_shard is not None:
            return self.shard.samples or self.header.rows_a_shard
        if self.source.has_sizes and (self.shard.images.resize is None or rows <= PROBED):
            return None
        if rows <= PROBED:
            return PROBED
        filling = Filling.of(self.source, self.shard, classes, 1)
        (probed,) = self._run("probe", "rows", "probe", probe_rows, lambda: [(PROBED, ("probe",))], spilt, self.rule, filling)
        return rows_of_shard(probed, self.shard.size)

    def _arrange(
        self, marks: list[list[int]], spilt: Spilt, division: Division, rows_a_shard: int | None
    ) -> tuple[dict[int, list[list[Any]]], Header]:
        rule, onward = replace(self.rule, rows=rows_a_shard), None
        if not rule.shuffle or self.source.in_blocks:
            bounds = even_bounds(division.count) if rule.shuffle else source_bounds(marks, division.count)
            onward = Division.into(len(bounds), bounds)
        shards: dict[int, list[list[Any]]] = {}
        read, dropped, named, spills = 0, Counter[str](), list[dict[str, str]](), list[tuple[str, int]]()

        def jobs(stage: str, count: int) -> list[Job]:
            return [(1, (f"{stage}-{group:05d}", group)) for group in range(count)]

        settle = partial(jobs, "settle", division.count)
        for result in self._run("plan", "ranges", "settle", settle_rows, settle, spilt, division, onward, rule, self.earlier):
            shards[result["group"]] = result["shards"]
            read += result["read"]
            dropped.update(result["dropped"])
            named = first_named(named, result["named"])
            spills += [tuple(result["spill"])] if result["spill"] else []
        if onward is not None:
            spilt = self._divide("settled", sorted(spills), onward)
            arrange = partial(jobs, "arrange", onward.count)
            for result in self._run("arrange", "ranges", "arrange", arrange_rows, arrange, spilt, rule, rule.shuffle):
                shards[result["group"]] = result["shards"]
        header = replace(self.header, groups=division.count, read=read, dropped=dict(sorted(dropped.items())), named=named)
        self._check_splits({split for part in shards.values() for split, *_ in part}, read)
        return shards, header

    def _check_splits(self, found: set[str], read: int) -> None:
        if self.header.version > 1 or not read:
            return
        for split, share in self.shard.splits.items():
            if split not in found and found:
                raise DataError(f"shard.splits.{split}: a share of {share:g} leaves it none of the {read} images")

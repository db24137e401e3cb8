"""Columns of numbers that are added to the indices of a finished dataset: scores, perceptual hashes.

A Ray task a shard reads the shard's samples batch by batch and publishes its index anew, whole or not at all; the tars stay as they are.
A column carries the fingerprint of what made it, so a pass that was killed goes on where it stopped. `columns.json` is written last: it
says which columns all shards have. Whoever holds indices in a cache names them by it too.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.core.errors import DataError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.shards.manifest import ShardRecord, ShardTable, encode_index, find_json, read_manifest
from pipeline.shards.passes import over_shards
from pipeline.shards.rows import Row, read_index, read_rows

FILE = "columns.json"
FINGERPRINT = "fingerprint"  # the key in a field's metadata


@dataclass(frozen=True)
class Columns:
    """What is to be added.

    `types`: of numbers, by name. `fingerprint`: of all that decides the values. `make` gets at most `batch` rows, neighbours in their
    shard, with the members that `needs` names (image, txt, json), and returns for each of `types` a value a row, None where there is none;
    it is pickled once, and runs in many processes, one call at a time. `gpus` is the share of a GPU that a task has.
    """

    types: dict[str, pa.DataType]
    fingerprint: str
    make: Callable[[list[Row]], Sequence[Sequence[Any]]]
    needs: frozenset[str] = frozenset({"image"})
    batch: int = 64
    gpus: float = 0

    def is_in(self, schema: pa.Schema) -> bool:
        """Whether an index has them, made by the same."""
        return all(name in schema.names and maker_of(schema.field(name)) == self.fingerprint for name in self.types)


@dataclass(frozen=True)
class _Part:
    """Of one column of one shard: its rows, the values in them, and of these the sum, the least and the largest."""

    rows: int
    values: int
    sum: float
    least: float
    most: float

    @staticmethod
    def of(column: pa.ChunkedArray) -> _Part:
        values = column.drop_null().cast(pa.float64(), safe=False).to_pylist()
        return _Part(len(column), len(values), math.fsum(values), min(values, default=math.inf), max(values, default=-math.inf))


@dataclass(frozen=True)
class Added:
    """What one task sends back; `computed` is false where the columns were there already."""

    computed: bool
    parts: dict[str, _Part]


class _Sum:
    """Of one column of all shards; the same to the last digit, in whatever order they come."""

    def __init__(self) -> None:
        self.rows, self.values, self.computed, self._sums = 0, 0, 0, array("d")
        self._least, self._most = math.inf, -math.inf

    def add(self, part: _Part, computed: bool) -> None:
        self.rows, self.values, self.computed = self.rows + part.rows, self.values + part.values, self.computed + computed
        self._least, self._most = min(self._least, part.least), max(self._most, part.most)
        self._sums.append(part.sum)

    def about(self) -> dict[str, Any]:
        there = self.values > 0
        return {
            "rows": self.rows,
            "values": self.values,
            "mean": math.fsum(self._sums) / self.values if there else None,
            "min": self._least if there else None,
            "max": self._most if there else None,
        }


def maker_of(column: pa.Field) -> str | None:
    """The fingerprint of what made a column of an index; None for those that were written with it."""
    found = (column.metadata or {}).get(FINGERPRINT.encode())
    return found.decode() if found else None


def find_columns(directory: Storage) -> dict[str, dict[str, Any]]:
    """By column that was added to all shards: `fingerprint`, `dataset` (the hash of the manifest then), `rows`, `values` (of these rows),
    and of those `mean`, `min`, `max`, None where there are none."""
    return find_json(directory, FILE)


def added_by(directory: Storage) -> dict[str, str]:
    """The fingerprints of what made the columns that were added, by column."""
    return {name: about[FINGERPRINT] for name, about in find_columns(directory).items()}


def add_columns(directory: Storage, columns: Columns, workers: int | None = None, label: str = "columns") -> dict[str, dict[str, Any]]:
    """Add `columns` to the index of every shard of the dataset at `directory`, and return what `find_columns` then says of them. What is
    there already, by the same maker, stays. Needs a Ray that is initialised; may be interrupted and repeated.

    Raises:
        DataError, StorageError: there is no dataset; or some shards failed, also when they were tried again: the first are named.
        InfrastructureError: a machine failed more often than tasks are retried.
    """
    manifest, known = read_manifest(directory), find_columns(directory)
    wanted = {FINGERPRINT: columns.fingerprint, "dataset": manifest.hash}
    if all(wanted.items() <= known.get(name, {}).items() for name in columns.types) and _are_in(directory, columns):
        say(f"{label:<12} {', '.join(columns.types)}: there already")
        return {name: known[name] for name in columns.types}
    stale = [name for name in columns.types if known.get(name, wanted)[FINGERPRINT] != columns.fingerprint]
    if stale:  # from now on some shards have other values
        known = {name: about for name, about in known.items() if name not in stale}
        directory.write(FILE, _encode(known))
    sums = {name: _Sum() for name in columns.types}

    def told() -> str:
        return f"{sum(s.computed for s in sums.values()) // len(sums):,} shards computed"

    tasks = over_shards(label, directory, add_to_shard, (directory, columns), told, workers, columns.gpus, kept=True)
    for added in tasks:
        for name, part in added.parts.items():
            sums[name].add(part, added.computed)
    known |= {name: wanted | sums[name].about() for name in columns.types}
    directory.write(FILE, _encode(known))
    return {name: known[name] for name in columns.types}


def _are_in(directory: Storage, columns: Columns) -> bool:
    """Whether the first shard has them indeed: indices can be made anew by hand."""
    return columns.is_in(read_index(directory, ShardTable(directory)[0].index_name).schema)


def add_to_shard(record: ShardRecord, directory: Storage, columns: Columns) -> Added:
    """Publish the index of a shard with `columns` (the body of a Ray task)."""
    index = read_index(directory, record.index_name)
    if columns.is_in(index.schema):
        return _added(index, columns, False)
    for column in columns.types:
        if column in index.schema.names and maker_of(index.schema.field(column)) is None:
            raise DataError(f"the index has a column {column!r} already, which was written with it (name another)")
    values: list[list[Any]] = [[] for _ in columns.types]
    for rows in read_rows(directory, record.name, index, columns.needs, columns.batch):
        for held, made in zip(values, columns.make(rows), strict=True):
            assert len(made) == len(rows), "a value a row"
            held += made
    index = _with(index, columns, values)
    directory.write(record.index_name, encode_index(index))
    return _added(index, columns, True)


def _with(index: pa.Table, columns: Columns, values: list[list[Any]]) -> pa.Table:
    """Added columns stand behind the others, by name: the same bytes, whichever came first."""
    added = dict(zip(columns.types, values, strict=True))
    index = index.select([name for name in index.column_names if name not in added])
    for name, kind in columns.types.items():
        column = pa.field(name, kind, metadata={FINGERPRINT: columns.fingerprint})
        index = index.append_column(column, pa.array(added[name], kind))
    first = [f.name for f in index.schema if maker_of(f) is None]
    return index.select([*first, *sorted(set(index.column_names) - set(first))])


def _added(index: pa.Table, columns: Columns, computed: bool) -> Added:
    return Added(computed, {name: _Part.of(index[name]) for name in columns.types})


def _encode(known: dict[str, dict[str, Any]]) -> bytes:
    return (json.dumps(known, indent=1, sort_keys=True) + "\n").encode()

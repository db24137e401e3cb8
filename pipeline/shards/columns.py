"""Columns of numbers that are added to the indices of a finished dataset: scores, perceptual hashes.

A Ray task a shard reads the shard's samples batch by batch and publishes its index anew, whole or not at all; the tars stay as they are.
A column carries the fingerprint of what made it, so a pass that was killed goes on where it stopped. `columns.json` is written last: it
says which columns all shards have. Whoever holds indices in a cache names them by it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.core.errors import DataError, InfrastructureError, StorageError, TesseraError, UserError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.shards.manifest import ShardTable, encode_index, read_manifest
from pipeline.shards.rows import Row, read_index, read_rows

FILE = "columns.json"
FINGERPRINT = "fingerprint"  # the key in a field's metadata
_MOST_FAILURES = 100  # shards that may fail before the others are given up too
_LISTED = 10  # in one sentence


@dataclass(frozen=True)
class Columns:
    """What is to be added.

    `types`: of numbers, by name. `fingerprint`: of all that decides the values. `make` gets at most `batch` rows, neighbours in their
    shard, with the members that `needs` names (image, txt, json), and returns for each of `types` a value a row, None where there is none;
    it is pickled once, and runs in many processes, one call at a time. `gpus` is the share of a GPU that a task has. `where` begins errors.
    """

    types: dict[str, pa.DataType]
    fingerprint: str
    make: Callable[[list[Row]], Sequence[Sequence[Any]]]
    needs: frozenset[str] = frozenset({"image"})
    batch: int = 64
    gpus: float = 0
    where: str = "columns"

    def is_in(self, schema: pa.Schema) -> bool:
        """Whether an index has them, made by the same."""
        return all(name in schema.names and maker_of(schema.field(name)) == self.fingerprint for name in self.types)


@dataclass(frozen=True)
class Added:
    """What one task sends back: values and their sum, least and largest, by column; or why there are none."""

    name: str
    computed: bool = False
    rows: int = 0
    sums: dict[str, tuple[int, float, float, float]] = field(default_factory=dict)
    failure: TesseraError | None = None


def maker_of(column: pa.Field) -> str | None:
    """The fingerprint of what made a column of an index; None for those that were written with it."""
    found = (column.metadata or {}).get(FINGERPRINT.encode())
    return found.decode() if found else None


def find_columns(directory: Storage) -> dict[str, dict[str, Any]]:
    """By column that was added to all shards: `fingerprint`, `dataset` (the hash of the manifest then), `rows`, `values` (of these rows),
    and of those `mean`, `min`, `max`, None where there are none."""
    try:
        return json.loads(directory.read(FILE))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise DataError(f"data {directory.url}/{FILE}: this is not JSON ({e})") from e


def add_columns(directory: Storage, columns: Columns, workers: int | None = None, label: str = "columns") -> dict[str, dict[str, Any]]:
    """Add `columns` to the index of every shard of the dataset at `directory`, and return what `find_columns` then says of them. What is
    there already, by the same maker, stays. Needs a Ray that is initialised; may be interrupted and repeated.

    Raises:
        DataError, StorageError: there is no dataset; or some shards failed, also when they were tried again: the first are named.
        InfrastructureError: a machine failed more often than tasks are retried.
    """
    manifest, known = read_manifest(directory), find_columns(directory)
    wanted = {FINGERPRINT: columns.fingerprint, "dataset": manifest.hash}
    if all(wanted.items() <= known.get(name, {}).items() for name in columns.types):
        say(f"{label:<12} {', '.join(columns.types)}: there already")
        return {name: known[name] for name in columns.types}
    stale = [name for name in columns.types if known.get(name, wanted)[FINGERPRINT] != columns.fingerprint]
    if stale:  # from now on some shards have other values
        known = {name: about for name, about in known.items() if name not in stale}
        directory.write(FILE, _encode(known))
    shards = ShardTable(directory)
    done, failures = _run(directory, columns, [(r.samples, (r.name,)) for r in shards], workers, label)
    again = [shard for shard in failures if isinstance(failures[shard], StorageError | InfrastructureError)]
    if again and len(failures) < _MOST_FAILURES:
        say(f"warning: {label}: {len(again):,} shards failed and are tried again ({failures[again[0]]})")
        more, still = _run(directory, columns, [(1, (name,)) for name in again], workers, label)
        done, failures = done + more, {name: e for name, e in failures.items() if name not in again} | still
    if failures:
        _refuse(directory, columns, len(shards), failures)
    known |= {name: wanted | _sum_up(done, name) for name in columns.types}
    directory.write(FILE, _encode(known))
    return {name: known[name] for name in columns.types}


def add_to_shard(name: str, directory: Storage, columns: Columns) -> Added:
    """Publish the index of the shard `name` with `columns` (the body of a Ray task)."""
    try:
        index_name = name.removesuffix(".tar") + ".index.parquet"
        index = read_index(directory, index_name)
        if columns.is_in(index.schema):
            return _added(name, index, columns, False)
        for column in columns.types:
            if column in index.schema.names and maker_of(index.schema.field(column)) is None:
                raise DataError(f"the index has a column {column!r} already, which was written with it (name another)")
        values: list[list[Any]] = [[] for _ in columns.types]
        for rows in read_rows(directory, name, index, columns.needs, columns.batch):
            for held, made in zip(values, columns.make(rows), strict=True):
                assert len(made) == len(rows), "a value a row"
                held += made
        index = _with(index, columns, values)
        directory.write(index_name, encode_index(index))
        return _added(name, index, columns, True)
    except (UserError, InfrastructureError) as e:
        return Added(name, failure=e)


def _with(index: pa.Table, columns: Columns, values: list[list[Any]]) -> pa.Table:
    """Added columns stand behind the others, by name: the same bytes, whichever came first."""
    added = dict(zip(columns.types, values, strict=True))
    index = index.select([name for name in index.column_names if name not in added])
    for name, kind in columns.types.items():
        column = pa.field(name, kind, metadata={FINGERPRINT: columns.fingerprint})
        index = index.append_column(column, pa.array(added[name], kind))
    first = [f.name for f in index.schema if maker_of(f) is None]
    return index.select([*first, *sorted(set(index.column_names) - set(first))])


def _added(name: str, index: pa.Table, columns: Columns, computed: bool) -> Added:
    sums = {}
    for column in columns.types:
        values = index[column].drop_null().cast(pa.float64(), safe=False).to_pylist()
        sums[column] = (len(values), math.fsum(values), min(values, default=math.inf), max(values, default=-math.inf))
    return Added(name, computed, len(index), sums)


def _run(
    directory: Storage, columns: Columns, jobs: list[tuple[int, tuple[str]]], workers: int | None, label: str
) -> tuple[list[Added], dict[str, TesseraError]]:
    """What the shards have now, and by name why some failed."""
    from pipeline.shards.tasks import run_tasks  # Ray comes with it, of which a plan has no need

    done, failures = list[Added](), dict[str, TesseraError]()

    def told() -> str:
        return f"{sum(a.computed for a in done):,} of {len(done):,} shards computed" + (f", {len(failures):,} failed" if failures else "")

    tasks = run_tasks(label, "samples", add_to_shard, jobs, (directory, columns), workers, told, gpus=columns.gpus)
    for added in tasks:
        if added.failure is None:
            done.append(added)
        else:
            failures[added.name] = added.failure
        if len(failures) >= _MOST_FAILURES:
            tasks.close()
    return done, failures


def _sum_up(done: list[Added], column: str) -> dict[str, Any]:
    """The same to the last digit, in whatever order the shards came."""
    counts, sums, least, most = zip(*(added.sums[column] for added in done), strict=True)
    about: dict[str, Any] = {"rows": sum(added.rows for added in done), "values": (values := sum(counts))}
    if not values:
        return about | {"mean": None, "min": None, "max": None}
    return about | {"mean": math.fsum(sums) / values, "min": min(least), "max": max(most)}


def _refuse(directory: Storage, columns: Columns, shards: int, failures: dict[str, TesseraError]) -> None:
    kinds = {type(e) for e in failures.values()}
    kind = kinds.pop() if len(kinds) == 1 else DataError
    told = "; ".join(f"{name}: {failures[name]}" for name in sorted(failures)[:_LISTED]) + ("; .." if len(failures) > _LISTED else "")
    least = "at least " if len(failures) >= _MOST_FAILURES else ""
    names = ", ".join(columns.types)
    raise kind(f"{columns.where}: {least}{len(failures)} of the {shards} shards in {directory.url} have no {names} now: {told}")


def _encode(known: dict[str, dict[str, Any]]) -> bytes:
    return (json.dumps(known, indent=1, sort_keys=True) + "\n").encode()

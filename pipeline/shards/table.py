"""The table of shards, `shards.parquet`: one row a shard, made for a million of them.

It is written in row groups, sorted by name. A reader holds the counts alone; names and hashes are read group by group,
when they are asked for, and on an object store by range, so that most of the table stays where it is.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards.ranges import Ranges

FILE = "shards.parquet"
ROW_GROUP = 16_384  # shards
SHARDS_SCHEMA = pa.schema(
    [("name", pa.string()), ("split", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())]
)
_COUNTS = ["split", "samples", "bytes"]  # neighbours in the file: one range a row group
_GROUPS_HELD = 64  # of names and hashes, 1.5 MB each
_TAIL = 1 << 18  # bytes; the footer of a million shards has 40 kB, and a table of two thousand shards fits as a whole


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One row of the table of shards; `sha256` is of the whole tar."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index.parquet"

    def __str__(self) -> str:
        return self.name

    def row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SHARDS_SCHEMA.names}


def file_of(version: int) -> str:
    """The table of a version, where the dataset has several (`manifest.py`)."""
    return f"shards-v{version}.parquet"


def encode_table(shards: Iterable[ShardRecord]) -> bytes:
    """The Parquet file, with nothing in it that changes from run to run."""
    rows = sorted(shards, key=lambda s: s.name)
    table = pa.table([[getattr(s, name) for s in rows] for name in SHARDS_SCHEMA.names], schema=SHARDS_SCHEMA)
    sorting = pq.SortingColumn.from_ordering(SHARDS_SCHEMA, [("name", "ascending")])
    sink = io.BytesIO()
    # A dictionary of names or hashes, each there once, would only be in the way.
    pq.write_table(table, sink, ROW_GROUP, compression="zstd", use_dictionary=["split", "samples"], sorting_columns=sorting)
    return sink.getvalue()


class ShardTable:
    """The shards of one split, or of all splits, numbered in the order of their names. Safe to read from several threads.

    `samples` and `bytes` are int64 (shards,).

    Raises:
        DataError: there is no such split, no table of shards, or it cannot be read.
    """

    def __init__(self, directory: Storage, split: str | None = None, version: int | None = None) -> None:
        """`version`: of the dataset; None: the newest."""
        self.directory, self.split = directory, split
        self._file = FILE if version is None or not directory.exists(file_of(version)) else file_of(version)
        self._size = 0
        with _explained(directory, self._file):
            self._meta = self._read_meta()
            self._firsts = np.cumsum([0, *(self._meta.row_group(g).num_rows for g in range(self._meta.num_row_groups))])
            self.samples, self.bytes, self._rows = self._read_counts()
            self._sort_by_name()
        self._group = lru_cache(maxsize=_GROUPS_HELD)(self._read_group)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> ShardRecord:
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = number if self._rows is None else int(self._rows[number])
        group = int(np.searchsorted(self._firsts, row, side="right")) - 1
        name, split, digest = (column[row - self._firsts[group]].as_py() for column in self._group(group))
        return ShardRecord(name, split, int(self.samples[number]), int(self.bytes[number]), digest)

    def __iter__(self) -> Iterator[ShardRecord]:
        return (self[number] for number in range(len(self)))

    def _read_meta(self) -> pq.FileMetaData:
        if self.directory.is_local:
            meta = pq.read_metadata(f"{self.directory.path}/{self._file}")
        else:
            if not self.directory.exists(self._file):
                raise FileNotFoundError(self._file)
            self._size = int(self.directory.fs.size(f"{self.directory.path}/{self._file}"))
            meta = pq.read_metadata(Ranges(self.directory, self._file, self._size, [(max(0, self._size - _TAIL), self._size)]))
        lacking = [name for name in SHARDS_SCHEMA.names if name not in meta.schema.names]
        if lacking:
            raise DataError(
                f"data {self.directory.url}/{self._file}: there is no column {lacking[0]!r} (there: {', '.join(meta.schema.names)})"
            )
        return meta

    def _read_counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(samples, bytes, which rows of the file these are; None: all of them)."""
        total, found = int(self._firsts[-1]), set[str]()
        mask, samples, sizes = np.ones(total, dtype=bool), np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
        for rows, batch in self._read(_COUNTS):
            splits = batch["split"].dictionary_encode()
            names = splits.dictionary.to_pylist()
            found.update(names)
            if self.split is not None and names != [self.split]:
                mask[rows] = splits.indices.to_numpy() == (names.index(self.split) if self.split in names else -1)
            samples[rows], sizes[rows] = batch["samples"].to_numpy(), batch["bytes"].to_numpy()
        if not mask.any():
            raise DataError(f"data {self.directory.url}: there is no split {self.split!r} (allowed: {', '.join(sorted(found))})")
        return (samples, sizes, None) if mask.all() else (samples[mask], sizes[mask], np.flatnonzero(mask))

    def _sort_by_name(self) -> None:
        """Older tables, and those of other writers, may be in any order: then their names have to be looked at."""
        if self._is_marked_sorted():
            return
        last = ""
        for names in self._names():
            # One before them, so that the batches are compared with each other too.
            beside = pa.concat_arrays([pa.array([last]), names])
            if not pc.all(pc.less(beside[:-1], beside[1:])).as_py():
                break
            last = names[-1].as_py() if len(names) else last
        else:
            return
        order = pc.sort_indices(pa.chunked_array(list(self._names()))).to_numpy().view(np.int64)
        self.samples, self.bytes = self.samples[order], self.bytes[order]
        self._rows = order if self._rows is None else self._rows[order]

    def _names(self) -> Iterator[pa.Array]:
        """The names of this split, batch by batch, as they lie in the file."""
        for rows, batch in self._read(["name"]):
            names = batch["name"]
            if self._rows is not None:
                first, end = np.searchsorted(self._rows, [rows.start, rows.stop])
                names = names.take(pa.array(self._rows[first:end] - rows.start))
            yield names

    def _is_marked_sorted(self) -> bool:
        """Whether the writer says so of each row group, and the groups follow each other."""
        groups = [self._meta.row_group(g) for g in range(self._meta.num_row_groups)]
        first = self._meta.schema.names.index("name")
        if not all(g.sorting_columns and g.sorting_columns[0] == pq.SortingColumn(first) for g in groups):
            return False
        bounds = [g.column(first).statistics for g in groups]
        return all(b is not None and b.has_min_max for b in bounds) and all(a.max < b.min for a, b in pairwise(bounds))

    def _read_group(self, group: int) -> list[pa.Array]:
        columns = ["name", "split", "sha256"]
        with _explained(self.directory, self._file):
            table = self._open([group], columns).read_row_group(group, columns=columns, use_threads=False)
        return [table[name].combine_chunks() for name in columns]

    def _read(self, columns: list[str]) -> Iterator[tuple[slice, pa.RecordBatch]]:
        """Rows of the file, and these columns of them: a batch at a time, in this thread, so that little is held beside."""
        first = 0
        for batch in self._open(range(self._meta.num_row_groups), columns).iter_batches(ROW_GROUP, columns=columns, use_threads=False):
            yield slice(first, first := first + len(batch)), batch

    def _open(self, groups: Sequence[int], columns: list[str]) -> pq.ParquetFile:
        """The file, with what these columns take at hand where each request to the store would cost a round trip."""
        if self.directory.is_local:
            return pq.ParquetFile(f"{self.directory.path}/{self._file}", metadata=self._meta)
        return pq.ParquetFile(Ranges(self.directory, self._file, self._size, [self._span(g, columns) for g in groups]), metadata=self._meta)

    def _span(self, group: int, columns: list[str]) -> tuple[int, int]:
        """Bytes of the file, from and up to, that hold these columns of a row group (and what lies between them)."""
        parts = [self._meta.row_group(group).column(self._meta.schema.names.index(name)) for name in columns]
        starts = [p.dictionary_page_offset if p.dictionary_page_offset is not None else p.data_page_offset for p in parts]
        return min(starts), max(start + p.total_compressed_size for start, p in zip(starts, parts, strict=True))


@contextmanager
def _explained(directory: Storage, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"data {directory.url}/{name}: is missing") from None
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"data {directory.url}/{name}: cannot be read ({e})") from e

"""A dataset directory as numbered samples: sample number -> bytes, checked against the index.

Local shards are read in place. Of a shard on an object store, blocks of neighbouring samples are fetched by range into
the machine's cache (`cache.py`); nothing is unpacked, nothing is unpickled, no command is run.

    number --(samples kept in each shard)--> shard, row --(its index)--> offset, length --(file | cached block)--> bytes
"""

from __future__ import annotations

import io
import os
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import fingerprint
from pipeline.config.data import Bound
from pipeline.config.inputs import Cache as CacheSection
from pipeline.core.errors import DataError
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage
from pipeline.shards.columns import added_by
from pipeline.shards.manifest import Manifest, read_manifest
from pipeline.shards.table import ShardRecord, ShardTable
from pipeline.stream.cache import Cache
from pipeline.stream.deny import lists_of
from pipeline.stream.index import COLUMNS, Index, Sample
from pipeline.stream.ledger import BadSample
from pipeline.stream.order import WINDOW
from pipeline.stream.view import Rule, select

BLOCK = 64  # neighbouring samples that are drawn together from a remote dataset, and come in one request
SMALL = 1 << 29  # bytes of a split that is fetched in parts of _PART bytes instead of blocks
_PART = 1 << 25
_OPEN = 256  # local shards that are open at a time
_INDICES = 2 * WINDOW  # shards whose index is at hand: those of a window, and of the next, which is being fetched
_WHOLE = 1 << 40  # bytes; more than any index has


class _File:
    """An open local shard, closed when no thread reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


class Dataset:
    """One split of a dataset, `len(dataset)` samples numbered in shard order, less those on deny-lists. Safe to read from several threads.

    Raises:
        DataError: no such split, or a deny-list is missing, or nothing is left. ConfigError: a bound on an unknown column.
    """

    def __init__(
        self,
        directory: Storage,
        split: str,
        *,
        deny: Sequence[str] = (),
        own_deny: bool = True,
        where: Mapping[str, Bound] | None = None,
        block: int | None = None,
        cache: CacheSection | None = None,
        version: int | None = None,
    ) -> None:
        self.directory, self.split = directory, split
        self.manifest: Manifest = read_manifest(directory, version)
        self.shards = ShardTable(directory, split, self.manifest.version)
        self._cache_section = cache or CacheSection()
        # On a local disk any sample is as near as any other, as long as the indices of all shards are at hand.
        self.block = block or (1 if directory.is_local and len(self.shards) <= _OPEN else BLOCK)
        # What every machine reads as a whole within an epoch or two anyway comes in larger parts, with fewer requests.
        total = max(1, int(self.shards.bytes.sum()))
        of_part = max(1, int(_PART * self.shards.samples.sum() / total / self.block)) if total <= SMALL else 1
        self.part = self.block * of_part  # neighbouring samples that one request brings
        self._added = added_by(directory) if where or not directory.is_local else {}  # an index in the cache may be older
        self._lost: dict[int, _LostIndex] = {}  # shards without a readable index
        self._missing: set[int] = set()  # shards that are not there
        self._fetched_again: set[str] = set()  # parts in which a sample was damaged
        self._index = lru_cache(maxsize=_INDICES)(self._read_index)
        self._file = lru_cache(maxsize=_OPEN)(lambda shard: _File(Path(directory.path) / self.shards[shard].name))
        self.view, self._selection = f"{self.manifest.hash}/{split}", None
        self.sizes = self.shards.samples
        lists = lists_of(directory, deny, self.manifest.version if own_deny else None)
        if (lists or where) and (rule := Rule(lists, where or {}, self.cache)):
            self.view = "/".join([self.view, rule.hash, *sorted(maker for c, maker in self._added.items() if c in (where or {}))])
            self._selection = select(rule, f"{self.view}/{self.manifest.config}", _Names(self.shards), self._sound_index, self.cache)
            self.sizes = self._selection.kept
            if not self.sizes.sum():
                raise DataError(f"data {directory.url}: deny-lists and bounds leave none of its {self.shards.samples.sum()} samples")
        self._ends = np.cumsum(self.sizes, dtype=np.int64)

    @property
    def cache(self) -> Cache:
        if not hasattr(self, "_cache"):
            self._cache = Cache(self._cache_section.path, self._cache_section.size)
        return self._cache

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def classes(self) -> list[str]:
        return self.manifest.classes

    @property
    def mean_bytes(self) -> float:
        """Of a sample in the shards, headers included."""
        return float(self.shards.bytes.sum() / max(1, self.shards.samples.sum()))

    def labels(self) -> np.ndarray:
        """Every sample's label in shard order, -1 for none: int64 (len,). Reads the indices, not the shards."""
        columns = []
        for shard in range(len(self.shards)):
            labels = self._sound_index(shard, ["cls"])["cls"].to_numpy()
            columns.append(np.delete(labels, self._selection.left_out(shard)) if self._selection else labels)
        return np.concatenate(columns)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, row among the samples kept there) of sample `number`."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.sizes[shard])

    def __getitem__(self, number: int) -> Sample:
        """Raises DataError where the bytes are not those the index names."""
        try:
            return self.read(number)
        except BadSample as e:
            raise DataError(f"data {self.directory.url}/{e}") from e

    def read(self, number: int) -> Sample:
        """Raises BadSample for what stays unreadable, InfrastructureError where the store keeps failing."""
        shard, row = self.locate(number)
        index, data = self._known(shard, row), b""
        for attempt in (1, 2):
            try:
                data = self._bytes(shard, index, row, again=attempt == 2)
            except FileNotFoundError as e:
                self._missing.add(shard)
                raise BadSample(self.shards[shard].name, index.keys[row].as_py(), "missing", "the shard is not there") from e
            if zlib.crc32(data) == index.crc32[row]:
                return index.sample(row, data)
        name, key, length = self.shards[shard].name, index.keys[row].as_py(), int(index.length[row])
        if len(data) < length:
            raise BadSample(name, key, "truncated", f"{len(data)} of {length} bytes")
        raise BadSample(name, key, "checksum", "its crc32 differs")

    def key_of(self, number: int) -> str:
        """Raises BadSample where the shard's index is gone."""
        shard, row = self.locate(number)
        return self._known(shard, row).keys[row].as_py()

    # Blocks: what prefetching asks for

    def block_of(self, number: int) -> tuple[int, int]:
        """(shard, block) that holds sample `number`."""
        shard, row = self.locate(number)
        return shard, row // self.part

    def fetch(self, shard: int, block: int) -> int:
        """Bring a block into the cache; its bytes, 0 where it was there. What is damaged or gone is told on reading."""
        try:
            index = self._known(shard, block * self.part)
            name, start, end = self._part(index, block)
            if self.cache.has(name):
                return 0
            self.cache.read(name, self._fetcher(index, start, end), 0, 0)
            return end - start
        except (BadSample, FileNotFoundError):
            return 0

    def _part(self, index: Index, block: int) -> tuple[str, int, int]:
        """A block's name in the cache, and where it is in the tar, from and up to."""
        start, end = index.span(block, self.part)
        return f"{index.record.sha256[:40]}-{start}-{end}", start, end

    def _fetcher(self, index: Index, start: int, end: int) -> Callable[[], bytes]:
        name = index.record.name
        return lambda: retrying(f"data {self.directory.url}/{name}", lambda: self.directory.read_range(name, start, end))

    def _bytes(self, shard: int, index: Index, row: int, again: bool) -> bytes:
        if shard in self._missing:
            raise FileNotFoundError(self.shards[shard].name)  # each of its samples would ask for it again, for seconds
        offset, length = int(index.offset[row]), int(index.length[row])
        if self.directory.is_local:
            file = self._file(shard)  # held while it is read: another thread may push it out of the least recently used
            return os.pread(file.descriptor, length, offset)
        name, start, end = self._part(index, row // self.part)
        if again and name not in self._fetched_again:  # once: all of its samples may be bad
            self._fetched_again.add(name)
            self.cache.drop(name)
        return self.cache.read(name, self._fetcher(index, start, end), offset - start, length)

    def _known(self, shard: int, row: int) -> Index:
        """Raises BadSample, saying `row` for a key, where the shard's index cannot be read."""
        if shard not in self._lost:
            try:
                return self._index(shard)
            except _LostIndex as e:
                self._lost[shard] = e
        lost = self._lost[shard]
        raise BadSample(self.shards[shard].name, f"in row {row}", lost.reason, lost.detail)

    def _read_index(self, shard: int) -> Index:
        try:
            index = Index(
                self.shards[shard], self._index_table(shard, COLUMNS), self._selection.left_out(shard) if self._selection else None
            )
        except (KeyError, ValueError, TypeError) as e:
            raise _LostIndex("index", f"it lacks {e}" if isinstance(e, KeyError) else str(e)) from e
        if index.rows != (samples := self.shards[shard].samples):
            raise _LostIndex("index", f"{index.rows} rows, the table of shards says {samples} samples")
        return index

    def _index_table(self, shard: int, columns: Sequence[str] | None) -> pa.Table:
        """Those of `columns` that it has, or all."""
        record = self.shards[shard]
        for is_last in (self.directory.is_local, True):
            try:
                file = pq.ParquetFile(io.BytesIO(self._index_bytes(record)))
                there = file.schema_arrow.names
                if is_last or set(columns or ()) <= set(there):
                    return file.read(columns=[c for c in columns if c in there] if columns else None, use_threads=False)
            except FileNotFoundError as e:
                raise _LostIndex("missing", f"{record.index_name} is not there") from e
            except (pa.ArrowInvalid, OSError) as e:
                if is_last:
                    raise _LostIndex("index", f"{record.index_name} is no Parquet ({e})") from e
            self.cache.drop(self._index_part(record))  # it may be damaged there, or older than a column
        raise AssertionError

    def _sound_index(self, shard: int, columns: Sequence[str] | None) -> pa.Table:
        """Raises DataError where it cannot be read."""
        try:
            return self._index_table(shard, columns)
        except _LostIndex as e:
            raise DataError(f"data {self.directory.url}/{self.shards[shard].name}: {e}") from e

    def _index_bytes(self, record: ShardRecord) -> bytes:
        what = f"data {self.directory.url}/{record.index_name}"
        if self.directory.is_local:
            return retrying(what, lambda: self.directory.read(record.index_name))
        # By range, since S3's client asks for the size first otherwise.
        return self.cache.read(
            self._index_part(record), lambda: retrying(what, lambda: self.directory.read_range(record.index_name, 0, _WHOLE))
        )

    def _index_part(self, record: ShardRecord) -> str:
        """An index may be adopted anew with other columns, or get some later: the fingerprint of what made it tells them apart."""
        return f"{record.sha256[:40]}-{self.manifest.config[:8]}-{fingerprint(self._added)[:8] if self._added else ''}index"


class _LostIndex(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Names(Sequence[str]):
    """The shards' index names, fetched as they are asked for."""

    def __init__(self, shards: ShardTable) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, shard: Any) -> Any:
        return self._shards[shard].index_name


def open_dataset(
    url: str,
    split: str = "train",
    endpoint: str | None = None,
    *,
    deny: Sequence[str] = (),
    own_deny: bool = True,
    where: Mapping[str, Bound] | None = None,
    block: int | None = None,
    cache: CacheSection | None = None,
) -> Dataset:
    """The split `split` of the dataset at `url` (`URL` or `URL@version`), less what `deny`, its own lists and `where` leave out.

    Raises:
        DataError: no dataset there, no such split or version, or a damaged one.
    """
    base, at, word = url.rpartition("@")
    version = int(word) if at and word.isdigit() else None
    directory = Storage(url if version is None else base, endpoint)
    return Dataset(directory, split, deny=deny, own_deny=own_deny, where=where, block=block, cache=cache, version=version)

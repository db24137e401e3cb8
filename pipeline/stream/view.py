"""What is left of a dataset by deny-lists and bounds: worked out once a machine, as the rows left out of each shard.

The view's name is a hash of the lists' bytes and of the bounds, so it is known before the work is done, and is the same
everywhere. The work itself (one look at every index) is kept in the machine's cache as a Parquet file, a row a shard, and
read again piece by piece, so that the rows left out of a million shards need not be in memory.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import fingerprint
from pipeline.config.data import Bound
from pipeline.core.errors import ConfigError
from pipeline.core.progress import Progress
from pipeline.stream.cache import Cache
from pipeline.stream.deny import DenyList, Keys

_GROUP = 1024  # shards a row group, and so in memory at once
_READERS = 8
_SCHEMA = pa.schema([("kept", pa.int64()), ("left_out", pa.list_(pa.int32()))])

ReadIndex = Callable[[int, Sequence[str] | None], pa.Table]  # (shard, columns; None: all) -> those of them that its index has


class Rule:
    """The lists of keys and the bounds that decide over a sample."""

    def __init__(self, lists: Sequence[DenyList], where: Mapping[str, Bound], cache: Cache) -> None:
        """Lists without keys, and those of the same bytes as another, decide nothing. Raises DataError where a list cannot be read."""
        digests = {listed.digest(cache): listed for listed in lists}
        self.lists = {digest: listed for digest, listed in digests.items() if digest is not None}
        self.where = dict(where)
        bounds = {column: bound.model_dump() for column, bound in self.where.items()}
        self.hash = fingerprint({"deny": sorted(self.lists), "where": bounds})

    def __bool__(self) -> bool:
        """Whether there is anything to decide."""
        return bool(self.lists or self.where)

    @cached_property
    def denied(self) -> Keys:
        """The keys of all lists. Raises DataError where one cannot be read."""
        return Keys(chain.from_iterable(listed.keys() for listed in self.lists.values()))

    def left_out(self, index: pa.Table, name: str) -> np.ndarray:
        """Rows of an index that go, int32, ascending. Raises ConfigError for a column that is not there or holds no numbers."""
        go = np.zeros(len(index), dtype=bool)
        if self.lists:
            go |= self.denied.holds(index["key"])
        for column, bound in self.where.items():
            if column not in index.column_names or not (
                pa.types.is_floating(index.schema.field(column).type) or pa.types.is_integer(index.schema.field(column).type)
            ):
                raise ConfigError(
                    f"data.where.{column}: the index {name} has no such column of numbers (there: {', '.join(numeric(index.schema))})"
                )
            values = index[column].to_numpy().astype(np.float64)  # a missing value becomes nan, which no bound admits
            low, high = -np.inf if bound.min is None else bound.min, np.inf if bound.max is None else bound.max
            go |= ~((values >= low) & (values <= high))
        return np.flatnonzero(go).astype(np.int32)


class Selection:
    """`kept` (shards,) int64: samples left in each shard."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        self.kept = self._file.read(columns=["kept"])["kept"].to_numpy()
        self._lock = threading.Lock()  # a file is read by one thread at a time
        self._group = lru_cache(maxsize=4)(
            lambda group: self._file.read_row_group(group, columns=["left_out"])["left_out"].combine_chunks()
        )

    def left_out(self, shard: int) -> np.ndarray:
        """Rows of `shard` that are left out, ascending. int32."""
        group, row = divmod(shard, _GROUP)
        with self._lock:
            return self._group(group)[row].values.to_numpy()


def select(rule: Rule, name: str, shards: Sequence[str], read: ReadIndex, cache: Cache) -> Selection:
    """Apply `rule` to the dataset view called `name`, or take what was worked out on this machine before."""
    file = f"view-{hashlib.sha256(name.encode()).hexdigest()[:32]}.parquet"
    path = cache.path / ".views" / file  # out of sight of the cache's trimming
    path.parent.mkdir(exist_ok=True)
    with cache.lock(file):
        if not _is_whole(path):  # a power cut may leave less
            temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
            try:
                _write(temporary, rule, shards, read)
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
    return Selection(path)


def _is_whole(path: Path) -> bool:
    try:
        pq.read_metadata(path)
        return True
    except (FileNotFoundError, pa.ArrowInvalid):
        return False


def _write(path: Path, rule: Rule, shards: Sequence[str], read: ReadIndex) -> None:
    columns = [*(["key"] if rule.lists else []), *rule.where]
    if rule.lists:
        _ = rule.denied  # read once, before there are several threads

    def one(shard: int) -> tuple[int, np.ndarray]:
        index = read(shard, columns)
        if len(index.column_names) < len(columns):
            index = read(shard, None)  # to say which there are
        rows = rule.left_out(index, shards[shard])
        return len(index) - len(rows), rows

    with (
        pq.ParquetWriter(path, _SCHEMA) as writer,
        ThreadPoolExecutor(_READERS) as pool,
        Progress("filter", len(shards), "shards") as shown,
    ):
        for group in _groups(len(shards)):
            done = []
            for result in pool.map(one, group):
                done.append(result)
                shown.update()
            writer.write_table(pa.table([[kept for kept, _ in done], [rows for _, rows in done]], schema=_SCHEMA), row_group_size=_GROUP)


def _groups(count: int) -> Iterator[range]:
    return (range(start, min(start + _GROUP, count)) for start in range(0, count, _GROUP))


def numeric(schema: pa.Schema) -> list[str]:
    """Columns that bounds can be put on."""
    return [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]

"""Sets of keys that can be asked for many at a time, as large as the lists that name them.

Keys are held as numbers: 10 bytes each where they have 20 hexadecimal digits, as ours do, 16 where they are short; 10 million take 100 MB,
and three times that while they are read and sorted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage
from pipeline.shards.digests import DigestTable, halves, parse_digests, short_keys

_Halves = tuple[np.ndarray, np.ndarray]

_DIGITS = 20  # of our own keys
_BATCH = 1 << 18  # keys


class Keys:
    """A set of keys that can be asked for many at a time."""

    def __init__(self, keys: Iterable[pa.Array]) -> None:
        digests, short, others = list[_Halves](), list[_Halves](), set[str]()
        for batch in keys:
            digest, is_short, rest = _sorted_out(batch)
            digests.append(digest[1])
            short.append(is_short[1])
            others.update(batch.filter(pa.array(rest)).to_pylist())
        self._digests, self._short, self._others = _table(digests), _table(short), frozenset(others)

    def __len__(self) -> int:
        return len(self._digests) + len(self._short) + len(self._others)

    def holds(self, column: pa.ChunkedArray) -> np.ndarray:
        """Which of a column's keys are among these, bool (n,)."""
        keys = column.combine_chunks().cast(pa.string())
        found = np.zeros(len(keys), dtype=bool)
        digest, short, rest = _sorted_out(keys)
        for (fits, halved), table in ((digest, self._digests), (short, self._short)):
            if len(table):
                found[fits] = table.find(*halved) >= 0
        if self._others and rest.any():
            found[rest] = [key in self._others for key in keys.filter(pa.array(rest)).to_pylist()]
        return found


def _sorted_out(keys: pa.Array) -> tuple[tuple[np.ndarray, _Halves], tuple[np.ndarray, _Halves], np.ndarray]:
    """Of keys, a string each: (which are digests, and these), (which are short, and these), which are neither."""
    is_digest, digests = parse_digests(keys, _DIGITS)
    is_short, short = short_keys(keys)
    return (is_digest, halves(digests)), (is_short, halves(short)), ~(is_digest | is_short)


def _table(parts: list[_Halves]) -> DigestTable:
    if not parts:
        return DigestTable(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64))
    high = np.concatenate([part[0] for part in parts])
    low = np.concatenate([part[1] for part in parts])
    parts.clear()  # what is sorted need not be there twice
    return DigestTable(high, low)


def parquet_keys(file: pq.ParquetFile) -> Iterator[pa.Array]:
    """The column `key` of a list, strings, some at a time."""
    for batch in file.iter_batches(_BATCH, columns=["key"], use_threads=False):
        yield batch["key"].cast(pa.string()).drop_null()


def read_keys(directory: Storage, name: str, where: str) -> Keys:
    """Those of the list `name`, by way of a file on this machine; `where` begins what is said of it.

    Raises:
        DataError: there is no such list, or it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-deny-") as folder:
        path = Path(folder, "list")
        try:
            retrying(f"{where}: {directory.url}/{name}", lambda: directory.get(name, path))
            with pq.ParquetFile(path) as file:
                if "key" not in file.schema_arrow.names:
                    raise DataError(f"{where}: {directory.url}/{name} has no column 'key' (there: {', '.join(file.schema_arrow.names)})")
                return Keys(parquet_keys(file))
        except FileNotFoundError:
            raise DataError(f"{where}: {directory.url}/{name} vanished after it was listed") from None
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{where}: {directory.url}/{name} cannot be read ({e})") from e

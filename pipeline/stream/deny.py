"""Lists of keys to leave out: a text file, a line a key, or Parquet with a column `key`, as large as the dataset.

Keys are held as numbers (`shards/keys.py`). A list's bytes go by way of a file, never through memory as a whole.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.files import split_file
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage
from pipeline.core.stores import S3
from pipeline.shards.deny import own_lists
from pipeline.shards.keys import Keys as Keys
from pipeline.shards.keys import parquet_keys
from pipeline.stream.cache import Cache

T = TypeVar("T")

_LINES = 1 << 24  # bytes of a text, about


class DenyList:
    """One list, at `name` in `directory`; `where` begins what is said of it."""

    def __init__(self, directory: Storage, name: str, where: str) -> None:
        self.directory, self.name, self.where = directory, name, where
        self.url = f"{directory.url}/{name}"

    def digest(self, cache: Cache) -> str | None:
        """The sha256 of its bytes; None where it has no keys. On S3, what one process of the machine has read the others need not: the
        store tells by its ETag whether it is the same object.

        Raises:
            DataError: there is no such list, or it is neither Parquet with a column `key` nor UTF-8 text.
        """
        return (cache.read(f"deny-{told}", self._digest) if (told := self._told()) else self._digest()).decode() or None

    def keys(self) -> Iterator[pa.Array]:
        """Its keys, strings, some at a time. Raises as `digest`."""
        with self._file() as path:
            yield from self._keys(path)

    def _told(self) -> str | None:
        """What names the object as the store has it now."""
        if self.directory.protocol not in S3:
            return None
        head = self._sought(lambda: self.directory.head(self.name))
        return hashlib.sha256(f"{self.directory.endpoint} {self.url} {head.size} {head.md5}".encode()).hexdigest() if head.md5 else None

    def _digest(self) -> bytes:
        with self._file() as path, path.open("rb") as file:
            has_keys = any(len(keys) for keys in self._keys(path))
            return hashlib.file_digest(file, "sha256").hexdigest().encode() if has_keys else b""

    @contextmanager
    def _file(self) -> Iterator[Path]:
        """It as a file on this machine."""
        if self.directory.is_local:
            path = Path(self.directory.path, self.name)
            if not path.is_file():
                raise DataError(f"{self.where}{self.url}: there is no such file")
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="tessera-deny-") as folder:
            path = Path(folder, "list")
            self._sought(lambda: self.directory.get(self.name, path))
            yield path

    def _sought(self, action: Callable[[], T]) -> T:
        try:
            return retrying(f"data {self.url}", action)
        except FileNotFoundError:
            raise DataError(f"{self.where}{self.url}: there is no such file") from None

    def _keys(self, path: Path) -> Iterator[pa.Array]:
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                file.seek(0)
                yield from self._lines(file)
                return
        try:
            parquet = pq.ParquetFile(path)
            if "key" not in parquet.schema_arrow.names:
                raise DataError(f"{self.where}{self.url} has no column 'key' (there: {', '.join(parquet.schema_arrow.names)})")
            yield from parquet_keys(parquet)
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{self.where}{self.url}: cannot be read ({e})") from e

    def _lines(self, file: IO[bytes]) -> Iterator[pa.Array]:
        try:
            while lines := file.readlines(_LINES):
                yield pa.array([key for line in lines for text in line.decode().splitlines() if (key := text.strip())], pa.string())
        except UnicodeDecodeError as e:
            raise DataError(f"{self.where}{self.url} is neither Parquet nor UTF-8 text ({e})") from e


def lists_of(directory: Storage, named: Iterable[str], own: int | None) -> list[DenyList]:
    """The lists at the URLs `named`, and those in the dataset's `directory` that hold for version `own` of it (None: none of these)."""
    lists = [DenyList(*split_file(url, directory.endpoint), "data.deny: ") for url in named]
    return lists + ([] if own is None else [DenyList(directory, path, "data ") for path in own_lists(directory, own)])

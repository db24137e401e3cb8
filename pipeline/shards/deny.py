"""Deny-lists of a dataset: `deny/<name>.parquet`, keys whose samples are left out as it is read. Shards stay as they are.

A list has the column `key`, sorted, and further ones that say why: a row a reason, so an image in two evaluation sets has two rows. It is
written whole or not at all, the same bytes whatever order its rows came in, and holds in its footer how many keys it has, and what it was
made of, so that it need not be made again. It may be of any length: rows are sorted in runs that go to the disk, and the runs are merged
a stretch of keys at a time.

A list that was worked out for version n of a dataset is called `<name>-v<n>`, for the first one `<name>` alone. A version has of each name
the list of its own or of the newest version before it, so that what comes later changes nothing of an earlier version. A takedown holds for
all versions: its list has one name.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import DataError
from pipeline.core.storage import Storage

DIRECTORY = "deny"
_LIST = re.compile(r"([^.].*?)(?:-v(\d+))?\.parquet")
_ABOUT, _COUNT = b"tessera", b"tessera.keys"  # keys in the file's metadata
_RUN = 1 << 27  # bytes of rows that are sorted in memory
_STRETCH = 1 << 19  # rows that are merged at a time, about
_GROUP = 1 << 18  # rows a row group
_TAIL = 8  # bytes at the end of a Parquet file: its footer's length, and a mark


def list_name(name: str) -> str:
    return f"{DIRECTORY}/{name}.parquet"


def name_for(name: str, version: int) -> str:
    """What the list `name` is called that was worked out for a version of its dataset."""
    return name if version == 1 else f"{name}-v{version}"


def own_lists(directory: Storage, version: int | None) -> list[str]:
    """The paths of the lists in a dataset's directory that hold for a version of it (None: the newest), by name."""
    return [path for _, path in sorted(_newest(directory, version).items())]


def holds(directory: Storage, name: str, version: int) -> bool:
    """Whether a list called `name`, of a version or of one before it, holds for that version."""
    return name in _newest(directory, version)


def _newest(directory: Storage, version: int | None) -> dict[str, str]:
    """By name, the paths of the lists that hold for a version."""
    newest: dict[str, tuple[int, str]] = {}
    for file in directory.names(DIRECTORY):
        if match := _LIST.fullmatch(file):
            name, of = match[1], int(match[2] or 1)
            if (version is None or of <= version) and of >= newest.get(name, (0, ""))[0]:
                newest[name] = of, f"{DIRECTORY}/{file}"
    return {name: path for name, (_, path) in newest.items()}


def find_about(directory: Storage, name: str) -> dict[str, Any] | None:
    """What `DenyListWriter` was told of the list `name`, and how many `keys` it has; None where there is no such list, or it is of another
    maker. Reads the footer alone."""
    key = list_name(name)
    try:
        size = directory.head(key).size
        (length, _) = struct.unpack("<I4s", directory.read_range(key, size - _TAIL, size))
        footer = pq.read_metadata(io.BytesIO(b"PAR1" + directory.read_range(key, size - _TAIL - length, size)))
        about = (footer.metadata or {}).get(_ABOUT)
        return None if about is None else {**json.loads(about), "keys": count_keys(footer)}
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError, struct.error) as e:
        raise DataError(f"data {directory.url}/{key}: cannot be read ({e})") from e


def count_keys(footer: pq.FileMetaData) -> int:
    """By the footer of a list; of other makers' its rows."""
    return int((footer.metadata or {}).get(_COUNT, footer.num_rows))


class DenyListWriter:
    """`with DenyListWriter(directory, "takedown", {"by": pa.string()}) as out: out.add(rows); out.publish(about)`.

    `reasons`: the further columns. Nothing is published by leaving.
    """

    def __init__(self, directory: Storage, name: str, reasons: dict[str, pa.DataType]) -> None:
        self._directory, self._name = directory, name
        self.schema = pa.schema([("key", pa.string()), *reasons.items()])
        self._held: list[pa.Table] = []
        self._runs: list[pa.Table] = []  # sorted; on disk but for the last
        self._keys = 0
        self.rows = 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="tessera-deny-")
        return self

    def __exit__(self, *_: object) -> None:
        self._runs.clear()
        self._folder.cleanup()

    def add(self, rows: pa.Table) -> None:
        """Take in rows of `schema`, in any order."""
        self._held.append(rows.cast(self.schema))
        self.rows += len(rows)
        if sum(t.nbytes for t in self._held) > _RUN:
            self._spill()

    def publish(self, about: dict[str, Any], seen: Callable[[pa.Table], None] | None = None) -> int:
        """Write the list over what was there; how many keys it has. `about` is JSON, and decides whether the list has to be made again.
        `seen` gets all rows in order, those of a key together."""
        if self._held:
            self._runs.append(self._sorted(self._held))
        path = Path(self._folder.name, "list.parquet")
        schema = self.schema.with_metadata({_ABOUT: json.dumps(about, sort_keys=True).encode()})
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for group in _groups(self._watched(seen), self.schema):
                writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=_GROUP)
            writer.add_key_value_metadata({_COUNT: str(self._keys)})
        self._directory.put(path, list_name(self._name))
        return self._keys

    def _watched(self, seen: Callable[[pa.Table], None] | None) -> Iterator[pa.Table]:
        for stretch in self._merged():
            self._keys += pc.count_distinct(stretch["key"]).as_py()
            if seen is not None:
                seen(stretch)
            yield stretch

    def _sorted(self, tables: list[pa.Table]) -> pa.Table:
        """By key, and by the other columns where keys are equal."""
        table = pa.concat_tables(tables).combine_chunks()
        return table.take(pc.sort_indices(table, [(name, "ascending") for name in self.schema.names])).combine_chunks()

    def _spill(self) -> None:
        path = Path(self._folder.name, f"{len(self._runs)}.arrow")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, self.schema) as writer:
            writer.write_table(self._sorted(self._held))
        self._held.clear()
        self._runs.append(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def _merged(self) -> Iterator[pa.Table]:
        """All rows in order: of each run the rows of one stretch of keys, sorted together, then those of the next. A key's are in one."""
        keys = [_Keys(run) for run in self._runs]
        every = max(1, _STRETCH // max(1, len(keys)))
        borders = sorted({run[row] for run in keys for row in range(every, len(run), every)})
        begins = [0] * len(keys)  # of each run, the first row that has not been passed on
        for border in [*borders[:: max(1, len(keys))], None]:
            ends = [len(run) if border is None else bisect_left(run, border) for run in keys]
            parts = [run.slice(begin, end - begin) for run, begin, end in zip(self._runs, begins, ends, strict=True)]
            if any(len(part) for part in parts):
                yield self._sorted(parts)
            begins = ends


class _Keys:
    """The keys of a run, as `bisect` looks at them."""

    def __init__(self, run: pa.Table) -> None:
        self._column = run["key"]

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> str:
        return self._column[row].as_py()


def _groups(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of one size, but for the last."""
    left = schema.empty_table()
    for table in tables:
        left = pa.concat_tables([left, table])
        while len(left) >= _GROUP:
            yield left.slice(0, _GROUP).combine_chunks()
            left = left.slice(_GROUP)
    if len(left):
        yield left.combine_chunks()

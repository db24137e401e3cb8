"""Deny-lists that a dataset has of its own: `deny/<name>.parquet` in its directory, column `key`, sorted, and further columns that say why.

The loader leaves out what they name, so that no shard is ever rewritten. A list is published whole or not at all.

A list that was worked out for version n of a dataset is called `<name>-v<n>`, for the first one `<name>` alone. A version has of each name
the list of its own or of the newest version before it, so that what comes later changes nothing of an earlier version.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.storage import Storage

FOLDER = "deny"
_LIST = re.compile(r"([^.].*?)(?:-v(\d+))?\.parquet")
_ROW_GROUP = 1 << 20


def name_for(name: str, version: int) -> str:
    """What the list `name` is called that was worked out for a version of its dataset."""
    return name if version == 1 else f"{name}-v{version}"


def own_lists(directory: Storage, version: int) -> list[str]:
    """The paths of the lists in a dataset's directory that hold for a version of it, by name."""
    newest: dict[str, tuple[int, str]] = {}
    for file in directory.names(FOLDER):
        if match := _LIST.fullmatch(file):
            name, of = match[1], int(match[2] or 1)
            if of <= version and of >= newest.get(name, (0, ""))[0]:
                newest[name] = of, f"{FOLDER}/{file}"
    return [path for _, (_, path) in sorted(newest.items())]


def write_list(directory: Storage, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Publish the rows of `tables`, which come in order of their keys; gives how many there are."""
    count = 0
    with tempfile.TemporaryDirectory(prefix="tessera-deny-") as folder:
        path = Path(folder, "list.parquet")
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in tables:
                count += len(table)
                if len(table):
                    writer.write_table(table, row_group_size=_ROW_GROUP)
        directory.put(path, f"{FOLDER}/{name}.parquet")
    return count

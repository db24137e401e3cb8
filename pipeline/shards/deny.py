"""Deny-lists that a dataset has of its own: `deny/<name>.parquet` in its directory, column `key`, sorted, and further columns that say why.

The loader leaves out what they name, so that no shard is ever rewritten. A list is published whole or not at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.storage import Storage

FOLDER = "deny"
_ROW_GROUP = 1 << 20


def list_path(name: str) -> str:
    """Where the list called `name` lies in its dataset's directory."""
    return f"{FOLDER}/{name}.parquet"


def own_lists(directory: Storage) -> list[str]:
    """The paths of the lists that lie in a dataset's directory, by name."""
    return [f"{FOLDER}/{name}" for name in directory.names(FOLDER) if name.endswith(".parquet") and not name.startswith(".")]


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
        directory.put(path, list_path(name))
    return count
